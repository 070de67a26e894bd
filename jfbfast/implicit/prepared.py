"""How the convolutions of a layer are computed, in a solve and in the application that carries the gradient.

torch's conv2d becomes Winograd's convolution where the tolerance allows it and it is faster. A solve also prepares the
layer's weights once: channels-last, in low precision if asked for, transformed for Winograd, and with the batch norm
that follows folded in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from itertools import pairwise
from threading import local
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode

from jfbfast.backends.conv3x3 import convolution, transformed_weight, winograd_allowed
from jfbfast.implicit.frozen import NormalisedConv2d, owner, submodules
from jfbfast.solvers import Layer

_NOTHING: AbstractContextManager[None] = nullcontext()


class _Weight(NamedTuple):
    """A convolution's weight, prepared for a solve.

    Attributes:
        source: the weight that the layer passes to conv2d; held so that no other tensor takes its id.
        value: the same channels-last, in the dtype to compute in.
        transformed: the same transformed for Winograd's convolution; None where that would not be used.
    """

    source: Tensor
    value: Tensor
    transformed: Tensor | None


class Convolutions(TorchFunctionMode):
    """Within the context, torch's conv2d is computed the fastest way that the tolerance allows.

    Args:
        tol: the relative residual that the evaluations are to reach. From 1e-4 on, float32 and bfloat16 convolutions
            on the CPU are Winograd's, where they are 3 × 3 with stride and padding 1 and have enough channels.
    """

    def __init__(self, tol: float) -> None:
        super().__init__()
        self.winograd = winograd_allowed(tol)
        self.weights: dict[int, _Weight] = {}  # by the id of their source tensor
        self.dtype: torch.dtype | None = None  # the dtype of the autocast under which the solve evaluates the layer
        self.relu = False  # whether the next convolution with a prepared weight is to apply a ReLU too

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not torch.compiler.is_dynamo_compiling():  # what a user compiles stays torch's
            return self._conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        winograd, transformed, precision, relu = self.winograd, None, _NOTHING, False
        if prepared := self.weights.get(id(weight)):
            relu, self.relu = self.relu, False
            _, weight, transformed = prepared
            winograd = transformed is not None
            layout = torch.channels_last if input.dim() == 4 else torch.preserve_format
            input = input.to(weight.dtype, memory_format=layout)
            bias = None if bias is None else bias.to(weight.dtype)
            if self.dtype not in (None, weight.dtype):  # autocast would change it
                precision = torch.autocast(input.device.type, enabled=False)
        with precision:
            return convolution(input, weight, bias, stride, padding, dilation, groups, relu, winograd, transformed)


class _SolveConvolutions(Convolutions):
    """`Convolutions` of a module whose weights stay the same while this object is used.

    Args:
        module: the module, in eval().
        tol: as in `Convolutions`.
        dtype: of the autocast around the evaluations, to compute in; None for the weights' own.
    """

    def __init__(self, module: nn.Module, tol: float, dtype: torch.dtype | None) -> None:
        super().__init__(tol)
        self.dtype = dtype
        self.outer: _SolveConvolutions | None = None
        modules = submodules(module)
        # What torch.compile was applied to, as a function or by the method ``compile``, stays as it is.
        compiled = [m for m in modules if "_orig_mod" in m._modules or vars(m).get("_compiled_call_impl")]
        within = {inner for m in compiled for inner in submodules(m)}
        modules = [m for m in modules if m not in within]
        convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
        low = self._low_precision(module, modules, convolutions) if dtype else set()
        self.chains = {m: self._steps(m, low) for m in modules if isinstance(m, nn.Sequential) and _is_chain(m)}
        self.forwards = {m: MethodType(forward, m) for m in self.chains}
        for conv in convolutions:
            weight = _weight_of(conv)
            if isinstance(weight, Tensor) and not isinstance(weight, UninitializedTensorMixin):
                self._prepare(weight, conv in low)

    @staticmethod
    def _low_precision(module: nn.Module, modules: list[nn.Module], convolutions: list[nn.Conv2d]) -> set[nn.Conv2d]:
        """All convolutions except the first and the last, which are cheap, and those of a linear operator."""
        operators = [m for m in modules if m is not module and callable(getattr(m, "adjoint", None))]
        measuring = {m for operator in operators for m in operator.modules()}
        return set([conv for conv in convolutions if conv not in measuring][1:-1])

    def _prepare(self, weight: Tensor, low: bool) -> None:
        """Prepare a weight that the layer will pass to conv2d."""
        value = weight.to(self.dtype if low else weight.dtype, memory_format=torch.channels_last)
        transformed = None
        if self.winograd and weight.shape[2:] == (3, 3):
            transformed = transformed_weight(weight, value.dtype)
        self.weights[id(weight)] = _Weight(weight, value, transformed)

    def _fold(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, low: bool) -> tuple[Tensor, Tensor]:
        """The weight and the bias of the convolution with the batch norm behind it."""
        assert norm.running_mean is not None and norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        weight = _weight_of(conv) * scale[:, None, None, None]
        bias = (0 if conv.bias is None else conv.bias) - norm.running_mean
        bias = bias * scale if norm.bias is None else torch.addcmul(norm.bias, bias, scale)
        self._prepare(weight, low)
        return weight, bias

    def _steps(self, sequential: nn.Sequential, low: set[nn.Conv2d]) -> list[_Step]:
        """The members of a Sequential with batch norms folded, and ReLUs fused, into the convolutions before."""
        pairs = _foldable_pairs(sequential)
        members = [m for m in sequential._modules.values() if m is not None]
        steps = []
        while members:
            module, *members = members
            parameters: tuple[Tensor, Tensor | None] | None = None
            relu = False
            if isinstance(module, nn.Conv2d) and _plain_convolution(module):
                if module in pairs:
                    parameters, members = self._fold(module, pairs[module], module in low), members[1:]
                elif isinstance(module, NormalisedConv2d):  # which another thread may release
                    parameters = _weight_of(module), module.bias
                relu = bool(members) and type(members[0]) is nn.ReLU and _plain(members[0])
                members = members[relu:]
            steps.append(_Step(module, parameters, relu))
        return steps

    def run(self, steps: list[_Step], input: Any) -> Any:
        """Apply the steps of a Sequential."""
        try:
            for module, parameters, self.relu in steps:
                input = module(input) if parameters is None else module._conv_forward(input, *parameters)
                if self.relu:  # something else has computed the convolution: a mode of the layer's, or an inner solve
                    input = torch.relu(input)
        finally:
            self.relu = False
        return input

    def __enter__(self) -> _SolveConvolutions:
        self.outer, _thread.innermost = _thread.innermost, self
        for sequential, method in self.forwards.items():
            vars(sequential).setdefault("forward", method)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for sequential, method in self.forwards.items():
            if vars(sequential).get("forward") is method:
                del vars(sequential)["forward"]
        self.outer, _thread.innermost = None, self.outer


class _Step(NamedTuple):
    """One module of a Sequential in a solve.

    Attributes:
        module: the module.
        parameters: the weight and the bias to convolve with, of a convolution; None to call the module.
        relu: whether a ReLU follows, which the convolution may apply.
    """

    module: Any
    parameters: tuple[Tensor, Tensor | None] | None
    relu: bool


class _Thread(local):
    """The solve whose layer this thread is evaluating; the innermost one if a layer contains a solve of its own."""

    innermost: _SolveConvolutions | None = None


_thread = _Thread()


def forward(sequential: nn.Sequential, input: Any) -> Any:
    """Evaluate a Sequential as this thread's solve has prepared it, or by its own forward in any other thread.

    It is a module-level function, and holds no solve. So a copy or a pickle of the module that is made during a solve
    works on its own afterwards, and torch.compile does not recompile for every solve.
    """
    solve = None if torch.compiler.is_dynamo_compiling() else _thread.innermost
    steps = None if solve is None else solve.chains.get(sequential)
    return nn.Sequential.forward(sequential, input) if steps is None else solve.run(steps, input)  # type: ignore


def _is_chain(sequential: nn.Sequential) -> bool:
    """Whether a Sequential has torch's forward, or the one that a solve gave it."""
    own = vars(sequential).get("forward")
    return type(sequential).forward is nn.Sequential.forward and (
        own is None or getattr(own, "__func__", None) is forward
    )


def _foldable_pairs(sequential: nn.Sequential) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """The convolutions of a Sequential that a batch norm in eval() follows, which can be folded into them.

    A convolution that occurs twice stays as it is.
    """
    members = list(sequential._modules.values())
    return {
        conv: norm
        for conv, norm in pairwise(members)
        if type(norm) is nn.BatchNorm2d
        and isinstance(conv, nn.Conv2d)
        and norm.running_mean is not None
        and _plain(norm)
        and _plain_convolution(conv)
        and members.count(conv) == 1
    }


def _plain_convolution(conv: nn.Conv2d) -> bool:
    """Whether calling a convolution does nothing but convolve with its weight, which may be computed."""
    return (
        _plain(conv)
        and type(conv)._conv_forward is nn.Conv2d._conv_forward
        and type(conv).forward in (nn.Conv2d.forward, NormalisedConv2d.forward)
    )


def _plain(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _weight_of(conv: nn.Conv2d) -> Any:
    """The weight that a convolution uses; None where a class of a user's has none."""
    return conv.current_weight() if isinstance(conv, NormalisedConv2d) else getattr(conv, "weight", None)


def convolutions_for(tol: float) -> AbstractContextManager[object]:
    """The context for an application with gradients: `Convolutions`, or nothing where ``tol`` leaves them to torch."""
    return Convolutions(tol) if winograd_allowed(tol) else _NOTHING


def checked_solve_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype if a layer can be prepared in it; raise ValueError if not."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"solve_dtype is {dtype}; it takes None, torch.bfloat16 or torch.float16")
    return dtype


@lru_cache(maxsize=32)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def prepared(layer: Layer, dtype: torch.dtype | None = None, *, tol: float = 0.0, compiled: bool = False) -> Layer:
    """The layer as a solve evaluates it, the same function to rounding; its module must be `frozen`.

    The weights are taken at the first evaluation.

    Args:
        layer: a module, a module's method or any callable.
        dtype: torch.bfloat16 or torch.float16 evaluates the layer under autocast, and its convolutions in that dtype
            with weights stored in it, except for the first, the last and those of a linear operator (a submodule with
            an ``adjoint``); None evaluates it in the weights' own precision, whatever autocast the caller has.
        tol: the relative residual that the solve is to reach, as in `Convolutions`.
        compiled: pass a module, or a module's method, through torch.compile, which then computes the convolutions.
    """
    module = owner(layer)
    function = type(layer).__call__ if layer is module else getattr(layer, "__func__", None)
    convolutions: AbstractContextManager[object] | None = None
    if compiled and module is not None and function is not None:
        layer, module = partial(_compiled(function), module), None

    def evaluate(x: Tensor, *inputs: Tensor) -> Tensor:
        nonlocal convolutions
        if convolutions is None:
            convolutions = _NOTHING if module is None else _SolveConvolutions(module, tol, dtype)
        device = x.device.type
        autocast = dtype is not None or torch.is_autocast_enabled(device)
        precision = torch.autocast(device, dtype, enabled=dtype is not None) if autocast else _NOTHING
        with precision, convolutions:
            return layer(x, *inputs)

    return evaluate
