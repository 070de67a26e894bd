"""The layer applied at the fixed point: the trace that carries the gradient, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jfbfast.backends.conv3x3 import winograd_convolutions
from jfbfast.backends.precision import precision_for
from jfbfast.implicit.frozen import TrainingState, fixed_map, owner, set_aside
from jfbfast.implicit.methods import GradientMethod, Jacobian, Unrolled
from jfbfast.operators.iterative import holds_samples
from jfbfast.solvers import Layer
from jfbfast.solvers.loop import evaluated


class _Applications:
    """x ↦ T(x; inputs) for a method's trace: a fixed map whose batch norms take note of one application.

    Args:
        noted: the number of the application, from 0, at which running statistics are updated; None for none.
        tol: the relative residual for which it is to be good enough.
        device: of x.
    """

    def __init__(
        self,
        layer: Layer,
        module: nn.Module | None,
        inputs: tuple[Tensor, ...],
        noted: int | None,
        tol: float,
        device: torch.device,
    ) -> None:
        self.layer, self.module, self.inputs, self.noted = layer, module, inputs, noted
        self.tol, self.device = tol, device
        self.state = TrainingState(module)
        self.count = 0
        self.ends: list[tuple[Tensor, Tensor]] = []  # the first and the last (x, T(x))

    @contextmanager
    def still(self, noting: bool = False) -> Iterator[None]:
        """The layer held still as every application sees it, for backward too, which may evaluate parts of it again."""
        state = self.state.updated() if noting else self.state.used()
        with state, fixed_map(self.module), precision_for(self.tol, self.device):
            yield

    def __call__(self, x: Tensor) -> Tensor:
        noting = len(x) > 0 and self.count == self.noted
        with self.still(noting), winograd_convolutions(self.tol):
            image = evaluated(self.layer, "layer", x, self.inputs).to(x.dtype)
        if image.shape != x.shape:
            raise ValueError(
                f"layer maps shape {tuple(x.shape)} to {tuple(image.shape)}; it takes a layer that keeps the shape"
            )
        self.count += 1
        self.ends = [*self.ends[:1], (x.detach(), image.detach())]
        return image


class _Trace(NamedTuple):
    """A method's output, traced from the fixed point, from copies of the inputs and from the parameters."""

    out: Tensor
    jacobian: Jacobian
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    applications: _Applications


class _FixedPointFunction(torch.autograd.Function):
    """The output of a trace; backward differentiates that trace, with the method's cotangent."""

    @staticmethod
    def forward(ctx: Any, method: GradientMethod, trace: _Trace, *tensors: Tensor) -> Tensor:
        ctx.method, ctx.trace = method, trace
        return trace.out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph is True; the gradient of a fixed point has none, so it takes False")
        if ctx.trace is None:
            raise RuntimeError("the layer's trace is freed; a second backward takes retain_graph=True in the first")
        out, jacobian, inputs, parameters, applications = ctx.trace
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        if not retained:
            ctx.trace = None
        leaves = (*inputs, *parameters)
        wanted = [i for i, t in enumerate(leaves) if t.requires_grad]
        found: list[Tensor | None] = [None] * len(leaves)
        if out.requires_grad:
            hooked = [p for p in parameters if p.is_leaf]  # their hooks run where the gradient arrives, and not here
            with (
                torch.autocast(gradient.device.type, enabled=False),
                set_aside(hooked, "_backward_hooks", None),
                applications.still(),
            ):
                w = ctx.method.cotangent(gradient, jacobian)
                grads = torch.autograd.grad(out, [leaves[i] for i in wanted], w, retained, allow_unused=True)
            for i, grad in zip(wanted, grads, strict=True):
                found[i] = grad
        return (None, None, *found)


def _unlisted_leaves(out: Tensor, known: Iterable[Tensor], since: int) -> dict[Tensor, bool]:
    """The leaves that a trace reaches and that get no gradient, as they are not ``known``.

    Args:
        out: the trace's output.
        known: the tensors that get one.
        since: the `_sequence_number` at which the trace began.

    Returns:
        For each whether it is reached through a graph from before the trace.
    """
    known = tuple(known)
    leaves, ends = {id(t) for t in known}, {(t.grad_fn, t.output_nr) for t in known if t.grad_fn is not None}
    found: dict[Tensor, bool] = {}
    stack, seen = [(out.grad_fn, out.output_nr, False)], set()
    while stack:
        node, output, before = stack.pop()
        if node is None or (node, output) in ends or (node, before) in seen:
            continue
        seen.add((node, before))
        leaf = getattr(node, "variable", None)
        if leaf is None:
            before = before or node._sequence_nr() < since
            stack.extend((*following, before) for following in node.next_functions)
        elif id(leaf) not in leaves:
            found[leaf] = before or found.get(leaf, False)
    return found


def _sequence_number() -> int:
    """Autograd's count of the graph nodes that this thread has made."""
    node: Any = torch.empty(0, requires_grad=True).clone().grad_fn
    return int(node._sequence_nr())


class TracedLayer:
    """A layer with its parameters, as the method applies it at the fixed point that was found to ``tol``."""

    def __init__(self, layer: Layer, parameters: Iterable[Tensor] | None, method: GradientMethod, tol: float) -> None:
        if isinstance(parameters, Tensor):
            raise TypeError("parameters is a tensor; it takes an iterable of tensors")
        self.layer, self.module, self.method = layer, owner(layer), method
        self.tol = min(tol, getattr(method, "tol", tol))  # a method that solves has its own
        self.named = parameters is not None
        if parameters is None:
            parameters = () if self.module is None else self.module.parameters()
        parameters = tuple({id(p): p for p in parameters}.values())  # one named twice has one gradient
        for parameter in parameters:
            if not isinstance(parameter, Tensor):
                raise TypeError(f"parameters has a {type(parameter).__name__}; it takes an iterable of tensors")
        self.parameters = tuple(p for p in parameters if p.requires_grad)
        self.whole_batch = holds_samples(self.module)

    def __call__(
        self, x: Tensor, inputs: tuple[Tensor, ...], inverse: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The output, with its gradient where gradients are enabled, and the ends of `_Applications`."""
        method, differentiable = self.method, torch.is_grad_enabled()
        x = x.detach().requires_grad_(differentiable and method.differentiates_in_x)
        copies = tuple(i.detach().requires_grad_(differentiable and i.requires_grad) for i in inputs)
        noted = method.steps - 1 if isinstance(method, Unrolled) else 0
        applications = self._applications(x, copies, noted)
        since = _sequence_number() if differentiable else 0
        out = method.trace(applications, x)
        if differentiable:
            unlisted = _unlisted_leaves(out, (x, *copies, *self.parameters), since)
            if unlisted:
                self._check(unlisted, x, copies)
            trace = _Trace(out, Jacobian(x, out, inverse), copies, self.parameters, applications)
            out = _FixedPointFunction.apply(method, trace, *inputs, *self.parameters)
        return out, applications.ends

    def _applications(self, x: Tensor, inputs: tuple[Tensor, ...], noted: int | None) -> _Applications:
        return _Applications(self.layer, self.module, inputs, noted, self.tol, x.device)

    def _check(self, unlisted: dict[Tensor, bool], x: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """Raise ValueError for a leaf that would silently get no gradient.

        A leaf that was there before the layer was called is one, unless ``parameters`` was given and it is used as it
        is, which leaves it out on purpose. A leaf that the layer made by ``detach`` is none for a method that takes
        no derivative in x.
        """
        for leaf, before in unlisted.items():
            if before:
                raise ValueError(
                    "layer uses a tensor that was computed before the solve, from one of shape "
                    f"{tuple(leaf.shape)} that requires a gradient and would get none; pass it in inputs=, or name the "
                    f"one of shape {tuple(leaf.shape)} in parameters="
                )
        if self.named and not self.method.differentiates_in_x:
            return
        some = slice(None) if self.whole_batch or not inputs else slice(1)  # else the layer may hold the whole batch's
        x, inputs = x[some].detach().requires_grad_(x.requires_grad), tuple(i[some].detach() for i in inputs)
        again = _unlisted_leaves(self._applications(x, inputs, None)(x), (x, *inputs, *self.parameters), 0)
        for leaf in unlisted:
            if leaf in again and not self.named:
                raise ValueError(
                    f"layer uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and would get none; "
                    "name such tensors in parameters=, or pass a module or a module's method as layer"
                )
        if self.method.differentiates_in_x and not all(leaf in again for leaf in unlisted):
            raise ValueError(
                f"layer detaches x, and gradient is {self.method}, which needs ∂T/∂x; it takes 'jfb', or a layer "
                "that does not detach"
            )

    def nothing(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """An output for no samples of x, (0, …): its gradient in every input and parameter is zero."""
        ends = [t.flatten()[:0].real.to(x) for t in (*inputs, *self.parameters)]
        return torch.cat(ends).view(0, *x.shape[1:]) if ends else x[:0]
