"""The fixed point as a differentiable function: the solve, and the layer at x* that carries the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jfbfast.fixed_map import fixed_map, materialised_weights, owner, step_spectral_norms, updated_statistics
from jfbfast.gradients.convergence import warn_unconverged
from jfbfast.gradients.methods import GradientMethod, Jacobian, Unrolled, gradient_method
from jfbfast.prepared import checked_solve_dtype, prepared
from jfbfast.reference import band_dtype
from jfbfast.solvers import Anderson, FixedPointSolution, FixedPointSolver, Layer, Status
from jfbfast.solvers.loop import DIVERGED_GROWTH
from jfbfast.winograd import winograd_convolutions

_TINY = torch.finfo(torch.float64).tiny


class _Applications:
    """x ↦ T(x; inputs) for a method's trace: a fixed map whose batch norms take note of one application.

    Args:
        noted: the number of the application, from 0, at which running statistics are updated.
        tol: the relative residual for which it is good enough.
    """

    def __init__(
        self, layer: Layer, module: nn.Module | None, inputs: tuple[Tensor, ...], noted: int, tol: float
    ) -> None:
        self.layer, self.module, self.inputs, self.noted, self.tol = layer, module, inputs, noted, tol
        self.count = 0
        self.ends: list[tuple[Tensor, Tensor]] = []  # the first and the last (x, T(x))

    def __call__(self, x: Tensor) -> Tensor:
        noting = self.module if len(x) > 0 and self.count == self.noted else None
        noting_it = nullcontext() if noting is None else updated_statistics(noting)
        with noting_it, fixed_map(self.module), winograd_convolutions(self.tol):
            image = self.layer(x, *self.inputs).to(x.dtype)
        if image.shape != x.shape:
            raise ValueError(
                f"layer maps shape {tuple(x.shape)} to {tuple(image.shape)}; it takes a layer that keeps the shape"
            )
        self.count += 1
        self.ends = [*self.ends[:1], (x.detach(), image.detach())]
        return image


class _Trace(NamedTuple):
    """A method's output, traced from the fixed point and from the leaves that get a gradient."""

    out: Tensor
    jacobian: Jacobian
    leaves: tuple[Tensor, ...]


class _FixedPointFunction(torch.autograd.Function):
    """The output of a trace; backward differentiates that trace once, with the method's cotangent."""

    @staticmethod
    def forward(ctx: Any, method: GradientMethod, trace: _Trace, *tensors: Tensor) -> Tensor:
        ctx.method, ctx.trace = method, trace
        return trace.out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.trace is None:
            raise RuntimeError("the layer at the fixed point is differentiated once; solve again for a second backward")
        (out, jacobian, leaves), ctx.trace = ctx.trace, None
        wanted = [i for i, t in enumerate(leaves) if t.requires_grad]
        found: list[Tensor | None] = [None] * len(leaves)
        if out.requires_grad:
            with torch.autocast(gradient.device.type, enabled=False):
                w = ctx.method.cotangent(gradient, jacobian)
                grads = torch.autograd.grad(out, [leaves[i] for i in wanted], w, allow_unused=True)
            for i, grad in zip(wanted, grads, strict=True):
                found[i] = grad
        return (None, None, *found)


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


class _Network:
    """The layer with its parameters, as the method applies it at the fixed point."""

    def __init__(
        self, layer: Layer, parameters: Iterable[Tensor] | None, method: GradientMethod, solver: FixedPointSolver
    ) -> None:
        if isinstance(parameters, Tensor):
            raise TypeError("parameters is a tensor; it takes an iterable of tensors")
        self.layer, self.module, self.method = layer, owner(layer), method
        self.tol = min(solver.tol, getattr(method, "tol", solver.tol))
        self.named = parameters is not None
        if parameters is None:
            parameters = () if self.module is None else self.module.parameters()
        self.parameters = tuple(p for p in parameters if p.requires_grad)

    def __call__(
        self, x: Tensor, inputs: tuple[Tensor, ...], inverse: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The output, with its gradient where gradients are enabled, and the ends of `_Applications`."""
        method, differentiable = self.method, torch.is_grad_enabled()
        x = x.detach().requires_grad_(differentiable and method.needs == "products")
        leaves = tuple(i.detach().requires_grad_(differentiable and i.requires_grad) for i in inputs)
        noted = method.steps - 1 if isinstance(method, Unrolled) else 0
        applications = _Applications(self.layer, self.module, leaves, noted, self.tol)
        out = method.trace(applications, x)
        if differentiable:
            if not self.named:
                _raise_for_captured(out, {id(t) for t in (x, *leaves, *self.parameters)})
            trace = _Trace(out, Jacobian(x, out, inverse), (*leaves, *self.parameters))
            out = _FixedPointFunction.apply(method, trace, *inputs, *self.parameters)
        return out, applications.ends


def _norms(x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """‖T(x) − x‖ and ‖T(x)‖ of each sample, (B,), float64."""
    residual, image = (v.reshape(len(v), v.shape[1:].numel()) for v in (image - x, image))
    norm = torch.linalg.vector_norm
    return norm(residual, dim=1, dtype=torch.float64), norm(image, dim=1, dtype=torch.float64)


def _unroll(
    network: _Network, method: Unrolled, x0: Tensor, inputs: tuple[Tensor, ...], solver: FixedPointSolver
) -> tuple[Tensor, FixedPointSolution]:
    """The method's applications from x0, and the solution that they amount to; x0 for a diverged sample.

    Where one diverged, the running statistics are as they were before.
    """
    buffers = [] if network.module is None else [(b, b.clone()) for b in network.module.buffers()]
    out, ends = network(x0, inputs)
    first_residual, first_size = _norms(*ends[0])
    bound = DIVERGED_GROWTH * (first_residual + first_size)
    x, image = ends[-1]
    residual, size = _norms(x, image)
    diverged = ~(residual.isfinite() & size.isfinite()) | (residual > bound) | (size > bound)
    converged = ~diverged & (residual <= solver.tol * size + solver.atol)
    count = int(diverged.sum())
    relative = torch.where(diverged, first_residual, residual) / torch.where(diverged, first_size, size).clamp_min(
        _TINY
    )
    if count:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        warn_unconverged(f"{count} of {len(x0)} samples diverged in {method.steps} applications of the layer")
    return out, FixedPointSolution(
        value=torch.where(diverged.view(-1, *[1] * (x.dim() - 1)), x0, x),
        residual=relative.to(band_dtype(x0.dtype)),
        iterations=torch.full_like(diverged, method.steps, dtype=torch.long),
        status=torch.full_like(diverged, Status.MAX_ITER, dtype=torch.long)
        .masked_fill(converged, Status.CONVERGED)
        .masked_fill(diverged, Status.DIVERGED),
    )


def _warn(solution: FixedPointSolution, solver: FixedPointSolver) -> None:
    status = solution.status
    diverged, late = (int((status == s).sum()) for s in (Status.DIVERGED, Status.MAX_ITER))
    if diverged or (late and solver.tol > 0):
        warn_unconverged(
            f"{diverged + late} of {len(status)} samples did not converge to tol={solver.tol:g} in "
            f"{solver.max_iter} evaluations ({diverged} diverged; "
            f"largest residual {float(solution.residual.max()):.1e})"
        )


def _inverse(solution: FixedPointSolution, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """w ↦ (I − ∂T/∂x)⁻ᵀ w by the solver's estimate, for the batch of these rows of the solve's."""
    estimate = solution.inverse
    assert estimate is not None

    def of_rows(w: Tensor) -> Tensor:
        whole = w.new_zeros(solution.value.shape)
        whole[rows] = w
        return estimate.transpose(whole)[rows]

    return estimate.transpose if len(rows) == len(solution.value) else of_rows


def _solve(
    layer: Layer,
    x0: Tensor,
    inputs: tuple[Tensor, ...],
    solver: FixedPointSolver,
    solve_dtype: torch.dtype | None,
    compiled: bool,
    estimate: bool,
) -> FixedPointSolution:
    """The solve, with the layer prepared for it: in low precision first where that is asked for, or autocast is on."""
    device = x0.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    inputs = tuple(i.detach() for i in inputs)
    fine = prepared(layer, tol=solver.tol, compiled=compiled)
    coarse = prepared(layer, solve_dtype or autocast, compiled=compiled) if solve_dtype or autocast else None
    if coarse is not None and solver.tol == 0 and solve_dtype is None:
        return solver.solve(coarse, x0, inputs, estimate=estimate)  # the caller counts evaluations of this very layer
    return solver.solve(fine, x0, inputs, coarse=coarse, verify=solve_dtype is not None, estimate=estimate)


def solve_fixed_point(
    layer: Layer,
    x0: Tensor,
    *,
    inputs: Sequence[Tensor] = (),
    parameters: Iterable[Tensor] | None = None,
    solver: FixedPointSolver | None = None,
    gradient: str | GradientMethod = "jfb",
    solve_dtype: torch.dtype | None = None,
    compile_solve: bool = False,
) -> tuple[Tensor, FixedPointSolution]:
    """`fixed_point` and the `FixedPointSolution` that it rests on."""
    solver = Anderson() if solver is None else solver
    method = gradient_method(gradient)
    checked_solve_dtype(solve_dtype)
    network = _Network(layer, parameters, method, solver)
    inputs = tuple(inputs)
    if network.module is not None:
        step_spectral_norms(network.module)
    out: Tensor | None = None
    estimating = method.needs == "inverse" and torch.is_grad_enabled()
    if isinstance(method, Unrolled):
        out, solution = _unroll(network, method, x0, inputs, solver)
        start = x0
    else:
        with fixed_map(network.module), materialised_weights(network.module):
            solution = _solve(layer, x0, inputs, solver, solve_dtype, compile_solve, estimating)
        _warn(solution, solver)
        start = solution.value

    usable = solution.status != Status.DIVERGED
    rows = torch.arange(len(usable), device=usable.device)
    everything = bool(usable.all())
    if not everything and inputs:
        rows = usable.nonzero().squeeze(1)
        start, inputs = start[rows], tuple(i[rows] for i in inputs)
    elif not everything:  # the layer captured its data, so the whole batch must stay
        start = start.nan_to_num()
    if out is None or not everything:
        inverse = _inverse(solution, rows) if estimating else None
        out, _ = network(start, inputs, inverse)
        if estimating:
            solution = solution._replace(inverse=None)  # the backward alone holds the estimate
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
    solve_dtype: torch.dtype | None = None,
    compile_solve: bool = False,
) -> Tensor:
    """T(x*; inputs) at the fixed point x* = T(x*; inputs), with the gradient of an implicit network.

    Forward solves without gradients and applies the layer once more; backward differentiates that
    one application, so memory does not depend on the number of iterations (but see `Phantom` and
    `Unrolled`, which apply it more often). During all of it the layer is one fixed map, as if its
    module were in eval(); in train(), spectral norms take one power iteration before, and batch
    norms update their running statistics once, at x*.

    A sample whose solve diverged comes back as its best finite iterate (NaN where it had none) and
    takes no part in the gradient.

    Args:
        layer: T(x, *inputs), (B, …) to the same shape, sample by sample: a module, a module's method
            or any callable.
        x0: the start, (B, …); it gets no gradient.
        inputs: tensors (B, …) on which T depends, differentiable.
        parameters: the tensors Θ that get a gradient; None for all of the layer's module's.
        solver: `Anderson()` where None.
        gradient: a gradient method, or one's name for its defaults: "jfb" (`JFB`), "neumann" (`Neumann`),
            "phantom" (`Phantom`), "implicit" (`Implicit`), "shine" (`Shine`) or "unrolled" (`Unrolled`).

    Returns:
        T(x*), of x0's shape and dtype.

    Raises:
        TypeError: ``parameters`` is a tensor; ``gradient`` neither a name nor a method.
        ValueError: another gradient's name or ``solve_dtype``; a diverged sample whose data the layer
            captured and that is not finite; a layer that depends on a tensor that requires a gradient
            and is neither its module's parameter nor in ``inputs``, with ``parameters`` None; a gradient
            from the solver's estimate of the inverse where it made none; what `FixedPointSolver.solve` raises.

    Warns:
        ConvergenceWarning: some samples did not converge (with tol = 0: diverged).
    """
    return solve_fixed_point(
        layer,
        x0,
        inputs=inputs,
        parameters=parameters,
        solver=solver,
        gradient=gradient,
        solve_dtype=solve_dtype,
        compile_solve=compile_solve,
    )[0]
