"""Differentiating a fixed point x* = T(x*; inputs, Θ): one autograd function, one class a method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jfbfast.fixed_map import fixed_map, materialised_weights, step_spectral_norms, updated_statistics
from jfbfast.solvers import (
    Anderson,
    ConvergenceWarning,
    FixedPointSolution,
    FixedPointSolver,
    Layer,
    Status,
)


class GradientMethod(Protocol):
    """How the gradient ∂ℓ/∂x at the output becomes w ≈ (I − ∂T/∂x)⁻ᵀ ∂ℓ/∂x, to be multiplied by ∂T/∂Θ."""

    def cotangent(self, gradient: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
        """w, given ∂ℓ/∂x and w ↦ (∂T/∂x)ᵀ w."""
        ...


@dataclass(frozen=True)
class JFB:
    """Jacobian-free backpropagation (Fung et al., 2022): (I − ∂T/∂x)⁻¹ replaced by I, so w = ∂ℓ/∂x."""

    def cotangent(self, gradient: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
        return gradient


GRADIENTS: dict[str, type[JFB]] = {"jfb": JFB}


def gradient_method(gradient: str | GradientMethod) -> GradientMethod:
    """The method of that name, or the method itself; raises ValueError for another name."""
    if not isinstance(gradient, str):
        return gradient
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient is {gradient!r}; it takes one of {', '.join(map(repr, GRADIENTS))}, or a method")
    return GRADIENTS[gradient]()


class _FixedPointFunction(torch.autograd.Function):
    """T(x*), traced in forward; backward differentiates that trace once, with the method's cotangent."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        method: GradientMethod,
        value: Tensor,
        inputs: tuple[Tensor, ...],
        check_capture: bool,
        *tensors: Tensor,
    ) -> Tensor:
        parameters = tensors[len(inputs) :]
        with torch.enable_grad():
            x = value.detach().requires_grad_(not isinstance(method, JFB))
            leaves = tuple(i.detach().requires_grad_(i.requires_grad) for i in inputs)
            out = layer(x, *leaves)
        if check_capture:
            _raise_for_captured(out, {id(t) for t in (x, *leaves, *parameters)})
        ctx.method, ctx.trace = method, (out, x, (*leaves, *parameters))
        return out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.trace is None:
            raise RuntimeError("the layer at the fixed point is differentiated once; solve again for a second backward")
        (out, x, tensors), ctx.trace = ctx.trace, None

        def vjp(w: Tensor) -> Tensor:
            return torch.autograd.grad(out, x, w, retain_graph=True)[0]

        w = ctx.method.cotangent(gradient, vjp)
        wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
        found: list[Tensor | None] = [None] * len(tensors)
        if out.requires_grad:
            grads = torch.autograd.grad(out, [tensors[i] for i in wanted], w, allow_unused=True)
            for i, grad in zip(wanted, grads, strict=True):
                found[i] = grad
        return (None, None, None, None, None, *found)


def _raise_for_captured(out: Tensor, known: set[int]) -> None:
    """Raise where the trace reaches a leaf that asks for a gradient and would get none."""
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"layer uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and would get none; "
                "name such tensors in parameters=, or pass a module or a module's method as layer"
            )
        stack.extend(next_node for next_node, _ in node.next_functions)


def _owner(layer: Layer) -> nn.Module | None:
    """The module that a layer is, or is a method of."""
    owner = getattr(layer, "__self__", layer)
    return owner if isinstance(owner, nn.Module) else None


def _warn(solution: FixedPointSolution, solver: FixedPointSolver) -> None:
    status = solution.status
    diverged, late = (int((status == s).sum()) for s in (Status.DIVERGED, Status.MAX_ITER))
    if diverged or (late and solver.tol > 0):
        warnings.warn(
            f"{diverged + late} of {len(status)} samples did not converge to tol={solver.tol:g} in "
            f"{solver.max_iter} evaluations ({diverged} diverged; "
            f"largest residual {float(solution.residual.max()):.1e})",
            ConvergenceWarning,
            stacklevel=4,
        )


def solve_fixed_point(
    layer: Layer,
    x0: Tensor,
    *,
    inputs: Sequence[Tensor] = (),
    parameters: Iterable[Tensor] | None = None,
    solver: FixedPointSolver | None = None,
    gradient: str | GradientMethod = "jfb",
) -> tuple[Tensor, FixedPointSolution]:
    """`fixed_point` and the `FixedPointSolution` that it rests on."""
    solver = Anderson() if solver is None else solver
    method = gradient_method(gradient)
    module = _owner(layer)
    inputs = tuple(inputs)
    if module is not None:
        step_spectral_norms(module)
    with fixed_map(module), materialised_weights(module):
        solution = solver.solve(layer, x0, tuple(i.detach() for i in inputs))
    _warn(solution, solver)

    usable = solution.status != Status.DIVERGED
    value = solution.value
    everything = bool(usable.all())
    if not everything and inputs:
        value, inputs = value[usable], tuple(i[usable] for i in inputs)
    elif not everything:  # the layer captured its data, so the whole batch must stay
        value = value.nan_to_num()
    if isinstance(parameters, Tensor):
        raise TypeError("parameters is a tensor; it takes an iterable of tensors")
    if parameters is not None:
        known = [p for p in parameters if p.requires_grad]
    else:
        known = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    with ExitStack() as stack:
        if module is not None and len(value):
            stack.enter_context(updated_statistics(module))
        stack.enter_context(fixed_map(module))
        if torch.is_grad_enabled():
            out = _FixedPointFunction.apply(layer, method, value, inputs, parameters is None, *inputs, *known)
        else:
            out = layer(value, *inputs)
    out = out.to(solution.value.dtype)
    if not everything and not inputs:
        if out.requires_grad and not out[~usable].isfinite().all():
            raise ValueError(
                f"inputs is empty, and the layer captured data of which {int((~usable).sum())} samples are not finite; "
                "what each sample owns must be in inputs for it to be kept out of the gradient"
            )
        out = out[usable]
    if not everything:
        out = solution.value.index_put((usable.nonzero().squeeze(1),), out)
    return out, solution


@torch.compiler.disable
def fixed_point(
    layer: Layer,
    x0: Tensor,
    *,
    inputs: Sequence[Tensor] = (),
    parameters: Iterable[Tensor] | None = None,
    solver: FixedPointSolver | None = None,
    gradient: str | GradientMethod = "jfb",
) -> Tensor:
    """T(x*; inputs) at the fixed point x* = T(x*; inputs), with the gradient of an implicit network.

    Forward solves without gradients and applies the layer once more; backward differentiates that
    one application, so memory does not depend on the number of iterations. During all of it the
    layer is one fixed map, as if its module were in eval(); in train(), spectral norms take one
    power iteration before, and batch norms update their running statistics once, at x*.

    A sample whose solve diverged comes back as its best finite iterate (NaN where it had none) and
    takes no part in the gradient.

    Args:
        layer: T(x, *inputs), (B, …) to the same shape, sample by sample: a module, a module's method
            or any callable.
        x0: the start, (B, …); it gets no gradient.
        inputs: tensors (B, …) on which T depends, differentiable.
        parameters: the tensors Θ that get a gradient; None for all of the layer's module's.
        solver: `Anderson()` where None.
        gradient: "jfb", or a gradient method.

    Returns:
        T(x*), of x0's shape and dtype.

    Raises:
        TypeError: ``parameters`` is a tensor.
        ValueError: another gradient's name; a diverged sample whose data the layer captured and that is
            not finite; a layer that depends on a tensor that requires a gradient
            and is neither its module's parameter nor in ``inputs``, with ``parameters`` None; what
            `FixedPointSolver.solve` raises.

    Warns:
        ConvergenceWarning: some samples did not converge (with tol = 0: diverged).
    """
    return solve_fixed_point(layer, x0, inputs=inputs, parameters=parameters, solver=solver, gradient=gradient)[0]
