"""Apply the layer at its fixed point for a gradient method, as one autograd function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jfbfast.backends.precision import precision_for
from jfbfast.implicit.frozen import (
    NormalisedConv2d,
    TrainingState,
    assigned,
    fixed_weights,
    frozen,
    normalised_weights,
    owner,
    parameters_of,
    submodules,
)
from jfbfast.implicit.methods import GradientMethod, Jacobian, Unrolled
from jfbfast.implicit.prepared import Convolutions
from jfbfast.implicit.states import StateLayer
from jfbfast.operators.iterative import may_hold_sample_data
from jfbfast.solvers import Layer
from jfbfast.solvers.loop import evaluate

Pair = tuple[Tensor, Tensor]


class ImplicitLayer:
    """A layer with the parameters that get a gradient, and the gradient method.

    Args:
        layer: T(x, *inputs), as in `fixed_point`.
        parameters: the tensors that get a gradient; None for all of the layer's module.
        method: how to differentiate.
        tol: the relative residual of the solve.

    Attributes:
        module, modules: what the layer is or is a method of, None for another callable; and all modules in it.
        state, weights, convolutions: of the module during this forward, by `prepare`: its training state before, its
            normalised weights, and how it convolves, with gradients.
        since: the `_sequence_number` before them.
        whole_batch: whether the module may hold data of each sample, so that it takes whole batches only.
        stays_whole: whether no sample may leave the batch, for this or for a user who sees each evaluation.
    """

    since: int
    state: TrainingState
    weights: dict[NormalisedConv2d, Tensor]
    convolutions: Convolutions

    def __init__(self, layer: Layer, parameters: Iterable[Tensor] | None, method: GradientMethod, tol: float) -> None:
        if isinstance(parameters, Tensor):
            raise TypeError("parameters is a tensor; it takes an iterable of tensors")
        self.layer, self.module, self.method = layer, owner(layer), method
        self.modules = submodules(self.module)
        self.tol = min(tol, getattr(method, "tol", tol))  # a method that solves has its own
        self.named = parameters is not None
        if parameters is None:
            parameters = parameters_of(self.modules)
        self.parameters = []
        for parameter in {id(p): p for p in parameters}.values():  # one named twice has one gradient
            if not isinstance(parameter, Tensor):
                raise TypeError(f"parameters has a {type(parameter).__name__}; it takes an iterable of tensors")
            if parameter.requires_grad:
                self.parameters.append(parameter)
        self.whole_batch = may_hold_sample_data(self.module)
        self.stays_whole = self.whole_batch or (isinstance(layer, StateLayer) and layer.watched)

    def prepare(self) -> None:
        """Compute what the solve and the applications share, once the module has taken its power iteration."""
        self.since = _sequence_number() if torch.is_grad_enabled() else 0
        self.state = TrainingState(self.modules)
        self.weights = normalised_weights(self.modules)
        with frozen(self.modules), fixed_weights(self.weights):
            # Norms whose statistics move stay as they are, since an update takes their inputs.
            self.convolutions = Convolutions(self.tol, self.modules, fold=not self.state.moving)

    def apply(
        self, x: Tensor, inputs: tuple[Tensor, ...], inverse: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Trace]:
        """Apply the layer as the method does, from the points x (B, …).

        Args:
            x: the points, which get no gradient.
            inputs: the layer's inputs.
            inverse: w ↦ (I − ∂T/∂x)⁻ᵀ w, for a method that needs it.

        Returns:
            The method's output, (B, …), with its gradient where gradients are enabled; and its `Trace`.
        """
        differentiable = torch.is_grad_enabled()
        x = x.detach().requires_grad_(differentiable and self.method.differentiates_in_x)
        copies = tuple([i.detach().requires_grad_(differentiable and i.requires_grad) for i in inputs])
        steps = self.method.steps if isinstance(self.method, Unrolled) else 1
        trace = Trace(self, x, copies, inverse, updating=steps - 1)
        trace.out = out = self.method.trace(trace.apply, x)
        if differentiable:
            self._check_leaves(out, x, copies)
            out = _FixedPointFunction.apply(trace, *inputs, *self.parameters)
        return out, trace

    def apply_to_none(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """The output for no samples of x, (0, …): its gradient in every input and parameter is zero."""
        ends = [t.flatten()[:0].real.to(x) for t in (*inputs, *self.parameters)]
        return torch.cat(ends).view(0, *x.shape[1:]) if ends else x[:0]

    def _check_leaves(self, out: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """Raise ValueError if a leaf of the output's graph would silently get no gradient.

        These are the tensors that existed before the layer was called. If ``parameters`` was given, those that the
        layer uses directly were left out on purpose, and are allowed. A tensor that the layer itself made by
        ``detach`` is allowed too, unless the method differentiates in x.
        """
        unlisted = _unlisted_leaves(out, (x, *inputs, *self.parameters), self.since)
        for leaf, before in unlisted.items():
            if before:
                raise ValueError(
                    "layer uses a tensor that was computed before the solve, from one of shape "
                    f"{tuple(leaf.shape)} that requires a gradient and would get none; pass it in inputs=, or name the "
                    f"one of shape {tuple(leaf.shape)} in parameters="
                )
        if not unlisted or (self.named and not self.method.differentiates_in_x):
            return
        # Apply the layer again: a leaf that it uses again existed before; all others were made by the layer itself.
        # One sample is enough, unless the layer may hold the data of the whole batch.
        some = slice(None) if self.whole_batch or not inputs else slice(1)
        x, inputs = x[some].detach().requires_grad_(x.requires_grad), tuple(i[some].detach() for i in inputs)
        again = _unlisted_leaves(Trace(self, x, inputs).apply(x), (x, *inputs, *self.parameters), 0)
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


class Trace:
    """The applications of the layer from which a gradient method makes its output; backward differentiates them.

    Args:
        implicit: the layer.
        x: the points that the trace starts from.
        inputs: copies of the layer's inputs, cut off from the caller's graph.
        inverse: w ↦ (I − ∂T/∂x)⁻ᵀ w, for a method that needs it.
        updating: the number of the application, from 0, that updates running statistics; None for none.

    Attributes:
        out: the method's output.
        first, last: (x, T(x)) of the first and of the last application, detached.
    """

    out: Tensor
    first: Pair
    last: Pair

    def __init__(
        self,
        implicit: ImplicitLayer,
        x: Tensor,
        inputs: tuple[Tensor, ...],
        inverse: Callable[[Tensor], Tensor] | None = None,
        updating: int | None = None,
    ) -> None:
        self.implicit, self.x, self.inputs, self.inverse, self.updating = implicit, x, inputs, inverse, updating
        self.count = 0

    @contextmanager
    def held_still(self, device: torch.device, updating: bool = False) -> Iterator[None]:
        """Hold the module still within the context; backward needs it too, because it may evaluate parts again."""
        implicit = self.implicit
        state = implicit.state.updated() if updating else implicit.state.used()
        weights, precision = fixed_weights(implicit.weights), precision_for(implicit.tol, device)
        with state, weights, frozen(implicit.module), precision, implicit.convolutions:
            yield

    def apply(self, x: Tensor) -> Tensor:
        """T(x; inputs), with the module held still."""
        updating = len(x) > 0 and self.count == self.updating
        with self.held_still(x.device, updating):
            image = evaluate(self.implicit.layer, "layer", x, self.inputs)
        self.last = x.detach(), image.detach()
        if self.count == 0:
            self.first = self.last
        self.count += 1
        return image


class _FixedPointFunction(torch.autograd.Function):
    """The output of a trace; backward differentiates that trace, with the method's cotangent."""

    @staticmethod
    def forward(ctx: Any, trace: Trace, *tensors: Tensor) -> Tensor:
        ctx.trace = trace
        return trace.out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph is True; the gradient of a fixed point has no derivative, so it takes False"
            )
        if ctx.trace is None:
            raise RuntimeError("the layer's trace is freed; a second backward takes retain_graph=True in the first")
        trace: Trace = ctx.trace
        out, method, parameters = trace.out, trace.implicit.method, trace.implicit.parameters
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        if not retained:
            ctx.trace = None
        leaves = (*trace.inputs, *parameters)
        found: list[Tensor | None] = [None] * len(leaves)
        if out.requires_grad:
            wanted = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
            hooked = [p for p in parameters if p.is_leaf]  # autograd runs their hooks when the gradient arrives there
            with (
                torch.autocast(gradient.device.type, enabled=False),
                assigned(hooked, "_backward_hooks", None),
                trace.held_still(gradient.device),
            ):
                w = method.cotangent(gradient, Jacobian(trace.x, out, trace.inverse))
                grads = torch.autograd.grad(out, [leaves[i] for i in wanted], w, retained, allow_unused=True)
            for i, grad in zip(wanted, grads, strict=True):
                found[i] = grad
        return (None, *found)


def _unlisted_leaves(out: Tensor, known: Iterable[Tensor], since: int) -> dict[Tensor, bool]:
    """The leaves of the output's graph that are not ``known`` and so get no gradient.

    Args:
        out: the trace's output.
        known: the tensors that get a gradient.
        since: the `_sequence_number` at which the trace began.

    Returns:
        For each leaf, whether it is reached through a graph that is older than the trace.
    """
    leaves, ends = set(), set()
    for tensor in known:
        leaves.add(id(tensor))
        if tensor.grad_fn is not None:
            ends.add((tensor.grad_fn, tensor.output_nr))
    found: dict[Tensor, bool] = {}
    stack: list[tuple[Any, int, bool]] = [(out.grad_fn, out.output_nr, False)]
    seen = set()
    while stack:
        node, output, before = stack.pop()
        if node is None or (node, output) in ends or (node, before) in seen:
            continue
        seen.add((node, before))
        leaf = getattr(node, "variable", None)
        if leaf is None:
            before = before or node._sequence_nr() < since
            for following, number in node.next_functions:
                stack.append((following, number, before))
        elif id(leaf) not in leaves:
            found[leaf] = before or found.get(leaf, False)
    return found


def _sequence_number() -> int:
    """Autograd's count of the graph nodes that this thread has made."""
    node: Any = torch.empty(0, requires_grad=True).clone().grad_fn
    return int(node._sequence_nr())
