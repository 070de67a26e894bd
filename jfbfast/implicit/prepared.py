"""How the convolutions of a layer are computed, in a solve and in the application that carries the gradient.

torch's conv2d becomes Winograd's convolution where the tolerance allows it and it is faster. In a Sequential, batch
norms in eval() are folded into the convolutions before them, and ReLUs are fused. A solve also prepares each weight
once: channels-last, in low precision if asked for, transformed for Winograd.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache, partial
from threading import local
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from jfbfast.backends.conv3x3 import convolution, transformed_weight, winograd_allowed, worth_transforming
from jfbfast.backends.fused import Geometry
from jfbfast.implicit.chains import Step, foldable_pairs, folded, hooked, initialised, steps, weight_of
from jfbfast.implicit.frozen import Modules, grouped, owner, submodules
from jfbfast.solvers import Layer

_Arguments = tuple[Tensor, Tensor, Tensor | None, Geometry]  # of conv2d
_NOTHING: AbstractContextManager[None] = nullcontext()
_EVALUATIONS = 5  # that a solve is expected to take, at least


class _Weight:
    """A convolution's weight in a solve, which prepares it when it is first used.

    Args:
        source: the weight that the layer passes to conv2d; held so that no other tensor takes its id.
        dtype: to compute in.
        winograd: whether Winograd's convolution may be used.
    """

    def __init__(self, source: Tensor, dtype: torch.dtype, winograd: bool) -> None:
        self.source, self.dtype = source, dtype
        self.worth: dict[torch.Size, bool] = {}  # transforming the weight, by the images' shape
        self.winograd = winograd and source.shape[2:] == (3, 3) and not source.is_cuda

    def for_images(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight for images x, and the same as Winograd's convolution takes it where that is faster in a solve."""
        worth = self.winograd and self.worth.get(x.shape)
        if worth is None:
            worth = self.worth[x.shape] = worth_transforming(self.source, x, self.dtype, _EVALUATIONS)
        if worth:
            return self.source if self.dtype == self.source.dtype else self.value, self.transformed
        return self.value, None

    @cached_property
    def value(self) -> Tensor:
        """The weight in its dtype, channels-last."""
        return self.source.to(self.dtype, memory_format=torch.channels_last)

    @cached_property
    def transformed(self) -> Tensor | None:
        """The weight as Winograd's convolution takes it; None where that could not use it."""
        return transformed_weight(self.source.detach(), self.dtype)

    def taken(self) -> Tensor | None:
        """The transformed weight that a solve has left, or None, for its last use: what it left is free after that."""
        vars(self).pop("value", None)
        left: Tensor | None = vars(self).pop("transformed", None)
        return left


class Convolutions(TorchFunctionMode):
    """Within the context, torch's conv2d is computed the fastest way that the tolerance allows.

    Gradients reach the module's parameters through the folded weights.

    Args:
        tol: the relative residual that the evaluations are to reach. From 1e-4 on, float32 and bfloat16 convolutions
            on the CPU are Winograd's, where they are 3 × 3 with stride and padding 1 and have enough channels.
        module: whose Sequentials are evaluated with batch norms folded and ReLUs fused, in eval(); its parameters stay
            the same while this object is used. None for no module.
        fold: False leaves the batch norms as they are.

    Attributes:
        folded: whether all batch norms are folded that can be.
    """

    def __init__(self, tol: float, module: Modules = None, fold: bool = True) -> None:
        super().__init__()
        self.winograd = winograd_allowed(tol)
        self.weights: dict[int, _Weight] = {}  # by the id of their source tensor
        # What the next convolution with one of these weights is to do besides: apply a ReLU, or add a tensor. (It is
        # reached through the module's own call, which has no arguments for them.)
        self.relu = False
        self.addend: Tensor | None = None
        self.outer: Convolutions | None = None
        modules = submodules(module)
        # What torch.compile was applied to, as a function or by the method ``compile``, stays as it is.
        compiled = [m for m in modules if "_orig_mod" in m._modules or vars(m).get("_compiled_call_impl")]
        within = {inner for m in compiled for inner in submodules(m)}
        self.modules = [m for m in modules if m not in within]
        chains = [m for m in self.modules if isinstance(m, nn.Sequential) and _is_chain(m)]
        if _has_any_global_hook():  # which is to see every call
            chains = []
        pairs = {m: foldable_pairs(m) for m in chains}
        self.folded = fold or not any(pairs.values())
        # One by one, so that a Sequential that the layer does not call gets no gradient.
        self.chains = {m: steps(m, pairs[m], folded(list(pairs[m].items()) if fold else [])) for m in chains}
        self.members = {m: [*m._modules.values()] for m in chains}
        self.forwards = {m: MethodType(forward, m) for m in chains}
        for _, weight in self._convolutions():
            self.weights[id(weight)] = _Weight(weight, weight.dtype, self.winograd)

    def _convolutions(self) -> list[tuple[nn.Conv2d, Tensor]]:
        """The convolutions of the chains, with the weights that they convolve with."""
        plain = [step for chain in self.chains.values() for step in chain if step.plain]
        pairs = [(s.module, weight_of(s.module) if s.parameters is None else s.parameters[0]) for s in plain]
        return [(conv, weight) for conv, weight in pairs if initialised(weight)]

    def steps_of(self, sequential: nn.Sequential) -> list[Step] | None:
        """The steps of a Sequential; None for one that is called as it is, or whose members the layer has replaced."""
        found = self.chains.get(sequential)
        if found is None or self.members[sequential] != [*sequential._modules.values()]:
            return None
        return found

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
        known, relu, addend = self.weights.get(id(weight)), False, None
        if known:
            relu, self.relu, addend, self.addend = self.relu, False, self.addend, None
        return self._convolve(known, (input, weight, bias, Geometry(stride, padding, dilation, groups)), relu, addend)

    def _convolve(self, known: _Weight | None, given: _Arguments, relu: bool, addend: Tensor | None) -> Tensor:
        transformed = known.taken() if known else None
        return convolution(*given, relu=relu, winograd=self.winograd, transformed=transformed, addend=addend)

    def run(self, steps: list[Step], input: Any, addend: Tensor | None = None) -> Any:
        """Apply the steps of a Sequential, and add the addend to what the last one returns."""
        offered = None
        try:
            for position, step in enumerate(steps, 1):
                self.relu = step.relu
                self.addend = offered = addend if position == len(steps) and step.plain and not step.relu else None
                input = step.apply(input)
                if self.relu:  # something else has computed the convolution: a mode of the layer's, or an inner solve
                    input = torch.relu(input)
            added = offered is not None and self.addend is None
        finally:
            self.relu, self.addend = False, None
        return input if addend is None or added else addend + input

    def __enter__(self) -> Convolutions:
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


class _SolveConvolutions(Convolutions):
    """`Convolutions` of a solve, without gradients.

    Args:
        given: with all batch norms folded, for the same module, in eval(). In its dtype the solve prepares its weights.
        module: the module.
        dtype: of the autocast around the evaluations, to compute in; None for the weights' own.
    """

    def __init__(self, given: Convolutions, module: nn.Module, dtype: torch.dtype | None) -> None:
        TorchFunctionMode.__init__(self)
        self.dtype = dtype
        self.winograd, self.modules = given.winograd, given.modules
        self.chains, self.members = given.chains, given.members
        self.weights = given.weights if dtype is None else {}
        self.relu, self.addend, self.outer = False, None, None
        self.forwards = {m: MethodType(forward, m) for m in self.chains}
        low = self._low_precision(module) if dtype else set()
        pairs = self._convolutions()
        known = {conv for conv, _ in pairs}
        others = [m for m in self.modules if isinstance(m, nn.Conv2d) and m not in known]
        pairs += [(conv, weight) for conv in others if initialised(weight := weight_of(conv))]
        for conv, weight in pairs:
            if id(weight) not in self.weights:
                computed = dtype if dtype and conv in low else weight.dtype
                self.weights[id(weight)] = _Weight(weight, computed, self.winograd)
        self._copy_together()

    def _low_precision(self, module: nn.Module) -> set[nn.Conv2d]:
        """All convolutions except the first and the last, which are cheap, and those of a linear operator."""
        operators = [m for m in self.modules if m is not module and callable(getattr(m, "adjoint", None))]
        measuring = {m for operator in operators for m in operator.modules()}
        return set([m for m in self.modules if isinstance(m, nn.Conv2d) and m not in measuring][1:-1])

    def _copy_together(self) -> None:
        """Prepare the weights that Winograd's convolution does not take; those alike are copied together."""
        left = [weight for weight in self.weights.values() if not weight.winograd]
        for group in grouped(left, lambda w: (w.source.shape, w.source.dtype, w.source.device, w.dtype)):
            sources, dtype = [weight.source for weight in group], group[0].dtype
            if all(s.dtype == dtype and s.is_contiguous(memory_format=torch.channels_last) for s in sources):
                continue
            copies = torch.stack([source.permute(0, 2, 3, 1) for source in sources]).to(dtype)
            for weight, copy in zip(group, copies.permute(0, 1, 4, 2, 3), strict=True):
                weight.value = copy

    def _convolve(self, known: _Weight | None, given: _Arguments, relu: bool, addend: Tensor | None) -> Tensor:
        if known is None:
            return super()._convolve(known, given, relu, addend)
        input, _, bias, geometry = given
        weight, transformed = known.for_images(input)
        layout = torch.channels_last if input.dim() == 4 else torch.preserve_format
        input = input.to(weight.dtype, memory_format=layout)
        bias = None if bias is None else bias.to(weight.dtype)
        changed = self.dtype not in (None, weight.dtype)  # by the autocast
        with torch.autocast(input.device.type, enabled=False) if changed else _NOTHING:
            plan: Any = {"winograd": transformed is not None, "transformed": transformed}
            return convolution(input, weight, bias, geometry, relu=relu, addend=addend, **plan)


class _Thread(local):
    """The `Convolutions` that this thread is in; the innermost ones if a layer contains a solve of its own."""

    innermost: Convolutions | None = None


_thread = _Thread()


def forward(sequential: nn.Sequential, input: Any) -> Any:
    """Evaluate a Sequential as the `Convolutions` that this thread is in do, or by its own forward in another thread.

    It is a module-level function, and holds no solve. So a copy or a pickle of the module that is made during a solve
    works on its own afterwards, and torch.compile does not recompile for every solve.
    """
    within = None if torch.compiler.is_dynamo_compiling() else _thread.innermost
    steps = None if within is None else within.steps_of(sequential)
    return nn.Sequential.forward(sequential, input) if steps is None else within.run(steps, input)  # type: ignore


def residual(sequential: nn.Sequential, x: Tensor) -> Tensor:
    """x + sequential(x); within `Convolutions` the last convolution adds x."""
    within = None if torch.compiler.is_dynamo_compiling() else _thread.innermost
    steps = None if within is None else within.steps_of(sequential)
    if within is None or steps is None or hooked(sequential):
        return x + sequential(x)
    return within.run(steps, x, x)


def _is_chain(sequential: nn.Sequential) -> bool:
    """Whether a Sequential has torch's forward, or the one that a solve gave it."""
    own = vars(sequential).get("forward")
    return type(sequential).forward is nn.Sequential.forward and (
        own is None or getattr(own, "__func__", None) is forward
    )


def checked_solve_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype if a layer can be prepared in it; raise ValueError if not."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"solve_dtype is {dtype}; it takes None, torch.bfloat16 or torch.float16")
    return dtype


def _solve_convolutions(
    module: nn.Module, tol: float, dtype: torch.dtype | None = None, given: Convolutions | None = None
) -> _SolveConvolutions:
    if given is None or not given.folded or given.winograd != winograd_allowed(tol):
        given = Convolutions(tol, module)
    return _SolveConvolutions(given, module, dtype)


@lru_cache(maxsize=32)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def prepared(
    layer: Layer,
    dtype: torch.dtype | None = None,
    *,
    tol: float = 0.0,
    compiled: bool = False,
    given: Convolutions | None = None,
) -> Layer:
    """The layer as a solve evaluates it, the same function to rounding; its module must be `frozen`.

    The weights are taken at the first evaluation.

    Args:
        layer: a module, a module's method or any callable.
        dtype: torch.bfloat16 or torch.float16 evaluates the layer under autocast, and its convolutions in that dtype
            with weights stored in it, except for the first, the last and those of a linear operator (a submodule with
            an ``adjoint``); None evaluates it in the weights' own precision, whatever autocast the caller has.
        tol: the relative residual that the solve is to reach, as in `Convolutions`.
        compiled: pass a module, or a module's method, through torch.compile, which then computes the convolutions.
        given: the `Convolutions` of the application after the solve, to share their weights where that is possible.
    """
    module = owner(layer)
    function = type(layer).__call__ if layer is module else getattr(layer, "__func__", None)
    convolutions: AbstractContextManager[object] | None = None
    if compiled and module is not None and function is not None:
        layer, module = partial(_compiled(function), module), None

    def evaluate(x: Tensor, *inputs: Tensor) -> Tensor:
        nonlocal convolutions
        if convolutions is None:
            convolutions = _NOTHING if module is None else _solve_convolutions(module, tol, dtype, given)
        device = x.device.type
        autocast = dtype is not None or torch.is_autocast_enabled(device)
        precision = torch.autocast(device, dtype, enabled=dtype is not None) if autocast else _NOTHING
        with precision, convolutions:
            return layer(x, *inputs)

    return evaluate
