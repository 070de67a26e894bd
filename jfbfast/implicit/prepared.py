"""A layer prepared for a solve: the same function, without gradients, cheaper to evaluate.

Its convolutions are evaluated by twins with weights of their own: spectral norms materialised, a
batch norm that follows folded in, channels-last, the bias and a ReLU that follows fused where torch
offers it, and optionally in lower precision or by Winograd's convolution (`conv3x3`). Everything
else of the module is shared with it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from jfbfast.backends.conv3x3 import conv3x3, is_conv3x3, transformed_weight, winograd_allowed
from jfbfast.backends.dispatch import ONEDNN_HAS_BFLOAT16
from jfbfast.implicit.frozen import owner
from jfbfast.models.lipschitz import NormalisedConv2d, SpectralNormConv2d
from jfbfast.solvers import Layer


def _plain(module: nn.Module) -> bool:
    """Nothing but its class's forward happens when it is called."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _foldable(module: nn.Module) -> bool:
    """A convolution whose function is known from its weight, which may be computed (spectral norm)."""
    if not (isinstance(module, nn.Conv2d) and _plain(module)):
        return False
    known = (nn.Conv2d.forward, NormalisedConv2d.forward, SpectralNormConv2d.forward)
    return type(module)._conv_forward is nn.Conv2d._conv_forward and type(module).forward in known


def _norm_to_fold(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None and _plain(module)


class _PreparedConv2d(nn.Conv2d):
    """A convolution in eval() with what follows it: batch norm, ReLU. All but its forward is the source's.

    Args:
        source: the convolution.
        norm: the batch norm to fold in.
        relu: whether a ReLU follows.
    """

    def __init__(self, source: nn.Conv2d, norm: nn.BatchNorm2d | None = None, relu: bool = False) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(_parameters=source._parameters, _buffers=source._buffers)
        self.sources = (source, norm)  # in a tuple, so that they are not its submodules
        self.relu = relu
        self.dtype: torch.dtype | None = None
        self.prepared_weight: Tensor | None = None
        self.prepared_bias: Tensor | None = None
        self.transformed: Tensor | None = None
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """What a forward asks of the convolution beside calling it."""
        return getattr(self.__dict__["sources"][0], name)

    def refresh(self, winograd: bool) -> None:
        """Take the weights as they are now; ``winograd``: for Winograd's convolution, where it serves."""
        conv, norm = self.sources
        weight = conv.current_weight() if isinstance(conv, NormalisedConv2d) else conv.weight
        bias = conv.bias
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight
            weight = weight * scale[:, None, None, None]
            bias = (0 if bias is None else bias) - norm.running_mean
            bias = bias * scale if norm.bias is None else torch.addcmul(norm.bias, bias, scale)
        stored = self._stored(self.prepared_weight, weight, torch.channels_last)
        self.prepared_weight = stored
        self.prepared_bias = None if bias is None else self._stored(self.prepared_bias, bias, torch.contiguous_format)
        transformed = transformed_weight(stored) if winograd and _is_conv3x3(conv) else None
        kept = self.transformed
        self.transformed = None if transformed is None else self._stored(kept, transformed, torch.contiguous_format)

    def _stored(self, kept: Tensor | None, value: Tensor, memory_format: torch.memory_format) -> Tensor:
        """The value in this twin's dtype; in the same memory as before, which a compiled twin holds on to."""
        dtype = self.dtype or value.dtype
        if kept is not None and (kept.shape, kept.dtype, kept.device) == (value.shape, dtype, value.device):
            return kept.copy_(value)
        return torch.empty_like(value, dtype=dtype, memory_format=memory_format).copy_(value)

    def forward(self, input: Tensor) -> Tensor:  # by the name that it has in torch
        x, conv, weight, bias = input, self.sources[0], self.prepared_weight, self.prepared_bias
        assert weight is not None
        with torch.autocast(x.device.type, enabled=False):
            if x.dim() != 4:
                out = conv._conv_forward(x.to(weight.dtype), weight, bias)
                return F.relu_(out) if self.relu else out
            x = x.to(weight.dtype, memory_format=torch.channels_last)
            if self.transformed is not None:
                return conv3x3(x, weight, bias, self.relu, self.transformed)
            if self.relu and _fuses_relu(conv, x):
                arguments = (conv.padding, conv.stride, conv.dilation, conv.groups)
                return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *arguments, "relu", [], "")
            out = conv._conv_forward(x, weight, bias)
            return F.relu_(out) if self.relu else out


def _is_conv3x3(conv: nn.Conv2d) -> bool:
    arguments = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return conv.padding_mode == "zeros" and is_conv3x3(*arguments)


def _fuses_relu(conv: nn.Conv2d, x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and (x.dtype == torch.float32 or ONEDNN_HAS_BFLOAT16)
        and bool(torch.backends.mkldnn.enabled)
        and not isinstance(conv.padding, str)
        and conv.padding_mode == "zeros"
        and x.numel() > 0
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def _pointwise_flops(x: Any, weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


_pointwise = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
if _pointwise is not None and _pointwise not in flop_registry:  # torch counts nothing for it
    register_flop_formula(_pointwise)(_pointwise_flops)


def _folded(modules: list[nn.Module]) -> Iterator[nn.Module]:
    """The chain of a Sequential: a convolution takes in the batch norm and the ReLU behind it."""
    while modules:
        module, *modules = modules
        if not _foldable(module):
            yield module
            continue
        assert isinstance(module, nn.Conv2d)
        norm, relu = None, False
        if modules and _norm_to_fold(modules[0]):
            norm, *modules = modules
        if modules and type(modules[0]) is nn.ReLU and _plain(modules[0]):
            relu, modules = True, modules[1:]
        assert norm is None or isinstance(norm, nn.BatchNorm2d)
        yield _PreparedConv2d(module, norm, relu)


class _Chain:
    """The forward of a Sequential's twin, whose members are the Sequential's own for whoever asks for one."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def __call__(self, x: Any) -> Any:
        for module in self.modules:
            x = module(x)
        return x


@cache
def _twin_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a copy: what its forward sets on it is set on the module too."""

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        for module in self.__dict__.get("_source", ()):
            setattr(module, name, value)
        kind.__setattr__(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:
        for module in self.__dict__.get("_source", ()):
            delattr(module, name)
        kind.__delattr__(self, name)

    own = {"__setattr__": __setattr__, "__delattr__": __delattr__, "__class__": property(lambda self: kind)}
    return type(kind.__name__, (kind,), {**own, "__module__": kind.__module__})


class _Twin:
    """The twin of a module tree: containers are copies, convolutions prepared, everything else shared."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self.copies: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
        self.convolutions: list[_PreparedConv2d] = []
        self.seen: dict[nn.Module, nn.Module] = {}
        self.compiled: dict[Callable[..., Any] | None, Layer] = {}
        self.module = self._twin(module)
        operators = [m for m in module.modules() if m is not module and callable(getattr(m, "adjoint", None))]
        measuring = {m for operator in operators for m in operator.modules()}  # whose A and Aᵀ keep their precision
        own = [conv for conv in self.convolutions if conv.sources[0] not in measuring]
        for conv in own[1:-1]:  # the first and the last map from and to the image, and are cheap
            conv.dtype = dtype

    def _twin(self, module: nn.Module) -> nn.Module:
        if module not in self.seen:
            self.seen[module] = self._made(module)
        return self.seen[module]

    def _made(self, module: nn.Module) -> nn.Module:
        if isinstance(module, _PreparedConv2d):
            self.convolutions.append(module)
            return module
        if _foldable(module):
            assert isinstance(module, nn.Conv2d)
            return self._made(_PreparedConv2d(module))
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            return module
        own: dict[str, Any] = {"_source": (module,)}
        if type(module).forward is nn.Sequential.forward and "forward" not in vars(module):
            members = list(module._modules.values())
            chain = [self._twin(m) for m in _folded([m for m in members if m is not None])]
            if chain == members:
                return module
            own["forward"] = _Chain(chain)
        else:
            twins = {name: None if m is None else self._twin(m) for name, m in module._modules.items()}
            if twins == module._modules:
                return module
            own["_modules"] = twins
        try:
            kind = _twin_class(type(module))  # type: ignore[arg-type]  # which is hashable
        except Exception:  # a class that may not be derived from in this way, for its own reasons
            return module
        copy = object.__new__(kind)
        self.copies.append((module, copy, own))
        return copy

    def method(self, function: Callable[..., Any] | None, compiled: bool) -> Layer:
        """That function of the module's as a method of the twin, None the twin itself; a compiled one is kept."""
        method: Layer = self.module.__call__
        if function is getattr(type(self.module), "forward", None):
            method = self.module.forward  # of a Sequential's twin one of its own
        elif function is not None:
            method = MethodType(function, self.module)
        if not compiled:
            return method
        if function not in self.compiled:
            self.compiled[function] = torch.compile(method)
        return self.compiled[function]

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, winograd: bool = False) -> None:
        """Take everything as it is now in the module; ``winograd`` as in `_PreparedConv2d.refresh`."""
        for module, copy, own in self.copies:
            object.__setattr__(copy, "__dict__", {**module.__dict__, "training": False, **own})
        for conv in self.convolutions:
            conv.refresh(winograd)


_Structure = tuple[tuple[str, int, bool], ...]


def _structure(module: nn.Module) -> _Structure:
    return tuple((name, id(m), _plain(m)) for name, m in module.named_modules(remove_duplicate=False))


class _Twins(threading.local):
    """The twins that a module keeps of itself, by dtype, in each thread; they are not copied or saved with it."""

    def __init__(self) -> None:
        self.made: dict[torch.dtype | None, tuple[_Structure, _Twin]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Twins:
        return _Twins()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Twins, ()


def checked_solve_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype, which is one that a layer can be prepared in; raises ValueError for another."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"solve_dtype is {dtype}; it takes None, torch.bfloat16 or torch.float16")
    return dtype


def prepared(layer: Layer, dtype: torch.dtype | None = None, *, tol: float = 0.0, compiled: bool = False) -> Layer:
    """The layer as a solve evaluates it: the same function to rounding, in eval() and without gradients.

    The weights are taken at this call. What cannot be prepared is used as it is: a layer that is
    neither a module nor a module's method, a convolution with hooks or of another class, a compiled
    or scripted module.

    Args:
        layer: a module, a module's method or any callable.
        dtype: torch.bfloat16 or torch.float16 evaluates the layer under autocast, and its convolutions
            in that dtype with weights that are stored in it, all but the first, the last and those of a
            linear operator (a submodule with an ``adjoint``); None evaluates it in the weights' own
            precision, whatever autocast the caller has.
        tol: the relative residual that the solve is to reach. From 1e-4 on, float32 convolutions on the
            CPU are Winograd's, where they are 3 × 3 with stride and padding 1 and enough channels.
        compiled: pass a module, or a module's method, through torch.compile.
    """
    module, function = owner(layer), getattr(layer, "__func__", None)  # by its name it may be another
    if module is not None and (layer is module or function is not None):
        structure, twins = _structure(module), module.__dict__.setdefault("_jfbfast_twins", _Twins()).made
        if dtype not in twins or twins[dtype][0] != structure:
            twins[dtype] = structure, _Twin(module, dtype)
        twin = twins[dtype][1]
        twin.refresh(winograd_allowed(tol))
        layer = twin.method(function, compiled)

    def evaluate(x: Tensor, *inputs: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return layer(x, *inputs)

    return evaluate
