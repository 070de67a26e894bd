"""The fixed point as a differentiable function: solve, apply the layer once with its gradient, verify."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from jfbfast.backends.tensors import per_sample
from jfbfast.backends.tracing import untraced
from jfbfast.convergence import warn_unconverged
from jfbfast.implicit.autograd import ImplicitLayer, Pair
from jfbfast.implicit.forward_solve import ForwardSolve, autocast_dtype, check_capturable
from jfbfast.implicit.frozen import step_spectral_norms
from jfbfast.implicit.methods import GradientMethod, Unrolled, gradient_method
from jfbfast.implicit.prepared import checked_solve_dtype
from jfbfast.implicit.states import Callback, Packed, packed
from jfbfast.implicit.unroll import unroll
from jfbfast.solvers import Anderson, FixedPointSolution, FixedPointSolver, Status
from jfbfast.solvers.base import check_batch, checked_solver
from jfbfast.solvers.loop import SAFEGUARD_GROWTH, TINY, norms

State = TypeVar("State")


def _counts(status: Tensor, rejected: Tensor) -> list[int]:
    """How many samples have diverged, have not converged, and are rejected; the host waits for the device once."""
    return torch.stack(
        [each.sum() for each in (status == Status.DIVERGED, status == Status.MAX_ITER, rejected)]
    ).tolist()


def _warn(solution: FixedPointSolution, solver: FixedPointSolver, contradicted: int, diverged: int, late: int) -> None:
    if diverged or (late and solver.tol > 0) or contradicted:
        dtype = solution.value.dtype
        beyond = late and 0 < solver.tol < torch.finfo(dtype).eps
        warn_unconverged(
            f"{diverged + late} of {len(solution.status)} samples did not converge to tol={solver.tol:g} in "
            f"{int(solution.iterations.max())} evaluations ({diverged} diverged; "
            f"largest residual {float(solution.residual.max()):.1e})"
            + (f"; tol is below the rounding of {dtype}" if beyond else "")
            + (
                f"; for {contradicted} of them the layer, applied to the whole batch after the solve, leaves a larger "
                "residual than the solve measured: the layer couples the samples of a batch, or changes between "
                "evaluations"
                if contradicted
                else ""
            )
        )


def _apply(
    implicit: ImplicitLayer, solution: FixedPointSolution, points: Tensor, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Pair]:
    """Apply the layer at ``points``; diverged samples keep their solution value and get no gradient.

    Returns:
        The output (B, …), the rows of the batch that the layer was applied to, and (x, T(x)) of those rows.
    """
    usable = solution.status != Status.DIVERGED
    rows, value = usable.nonzero()[:, 0], solution.value
    if inputs and not len(rows):  # the layer may not take an empty batch
        return value.index_put((rows,), implicit.apply_to_none(value, inputs)), rows, (value[rows], value[rows])
    if len(rows) == len(usable):
        out, trace = implicit.apply(points, inputs, _inverse(solution, rows))
        return out, rows, trace.first
    if inputs and not implicit.stays_whole:
        out, trace = implicit.apply(points[rows], tuple([i[rows] for i in inputs]), _inverse(solution, rows))
        return value.index_put((rows,), out), rows, trace.first
    # The batch stays whole: the diverged samples take part as zeros.
    zeroed = tuple([i.masked_fill(per_sample(~usable, i), 0) for i in inputs])
    everything = torch.arange(len(usable), device=usable.device)
    out, trace = implicit.apply(points.nan_to_num(), zeroed, _inverse(solution, everything))
    if out.requires_grad and not out[~usable].isfinite().all():
        holder = "layer holds data" if inputs else "inputs is empty, and the layer captured data"
        raise ValueError(
            f"{holder}, and {int((~usable).sum())} samples are not finite; "
            "pass the data of each sample in inputs=, so that bad samples stay out of the gradient"
        )
    return value.index_put((rows,), out[rows]), everything, trace.first


def _inverse(solution: FixedPointSolution, rows: Tensor) -> Callable[[Tensor], Tensor] | None:
    """w ↦ (I − ∂T/∂x)⁻ᵀ w for these rows of the batch, by the solver's estimate; None if it made none."""
    estimate = solution.inverse
    if estimate is None or len(rows) == len(solution.value):
        return None if estimate is None else estimate.transpose

    def of_rows(w: Tensor) -> Tensor:
        whole = w.new_zeros(solution.value.shape)
        whole[rows] = w
        return estimate.transpose(whole)[rows]

    return of_rows


def _measured(pair: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """‖f − x‖ and ‖f‖ of a pair (x, f), and their quotient in ``dtype``, (B,) each."""
    residual, size = norms(*pair)
    return residual, size, (residual / size.clamp_min(TINY)).to(dtype)


def _advance(
    solution: FixedPointSolution, rows: Tensor, pair: Pair, solver: FixedPointSolver
) -> tuple[FixedPointSolution, Tensor]:
    """Advance the solution using the traced (x, T(x)) of these rows; also return a mask of the rejected samples, (B,).

    A sample is rejected if the solve called it converged and it is above the tolerance at x, or if its residual has
    grown there.
    """
    residual, size, relative = _measured(pair, solution.residual.dtype)
    value, known, status = solution.of(rows, "value", "residual", "status")
    within = residual <= solver.tol * size + solver.atol
    sound = torch.where(status == Status.CONVERGED, within, relative <= SAFEGUARD_GROWTH * known)
    usable = status != Status.DIVERGED
    moved = usable & sound
    rejected = usable & ~sound
    if len(rows) < len(solution.status):
        rejected = torch.zeros_like(solution.status, dtype=torch.bool).index_put((rows,), rejected)
    return solution.replaced(
        rows,
        value=torch.where(per_sample(moved, value), pair[0], value),
        residual=torch.where(moved, relative, known),
        status=status.masked_fill(moved & within, Status.CONVERGED),
    ), rejected


def _check_claims(
    solution: FixedPointSolution, rows: Tensor, pair: Pair, solver: FixedPointSolver
) -> tuple[FixedPointSolution, int]:
    """Compare the residuals that the solve claims with (x, T(x)) at its values; also return how many samples fail.

    Samples that fail end as MAX_ITER with the residual found here. Twice the claim and some rounding are allowed,
    because the solve evaluates a prepared form of the layer.
    """
    _, size, relative = _measured(pair, solution.residual.dtype)
    claimed, status = solution.of(rows, "residual", "status")
    rounding = 4 * torch.finfo(autocast_dtype(pair[0]) or pair[0].dtype).eps
    allowed = 2 * claimed.clamp_min(solver.tol) + rounding + (2 * solver.atol / size.clamp_min(TINY)).to(relative.dtype)
    contradicted = (status != Status.DIVERGED) & ~(relative <= allowed)
    return solution.replaced(
        rows,
        residual=torch.where(contradicted, relative, claimed),
        status=status.masked_fill(contradicted, Status.MAX_ITER),
    ), int(contradicted.sum())


@untraced
def solve_fixed_point(
    layer: Callable[..., Any],
    x0: State,
    *,
    inputs: Sequence[Any] = (),
    parameters: Iterable[Tensor] | None = None,
    solver: FixedPointSolver | None = None,
    gradient: str | GradientMethod = "jfb",
    solve_dtype: torch.dtype | None = None,
    compile_solve: bool = False,
    cuda_graph: bool = False,
    has_aux: bool = False,
    callback: Callback | None = None,
) -> tuple[State, FixedPointSolution]:
    """Like `fixed_point`, and also return the `FixedPointSolution`.

    The arguments, exceptions and warnings are those of `fixed_point`.

    Returns:
        T(x*), of x0's structure, shape and dtype, with its gradient; and the solution with each sample's residual,
        evaluations and `Status`, with a value of x0's structure, without ``inverse`` and ``following``. With
        ``has_aux`` its ``aux`` has the auxiliary outputs.

    Example:
        >>> import torch, jfbfast
        >>> d = torch.rand(4, 3)
        >>> out, solution = jfbfast.solve_fixed_point(lambda x, d: torch.cos(x) / 2 + d, d, inputs=(d,))
        >>> bool((solution.residual <= 1e-3).all())
        True
    """
    problem = packed(layer, x0, inputs, has_aux=has_aux, callback=callback)
    if (compile_solve or cuda_graph) and problem.states is not None:
        name = "compile_solve" if compile_solve else "cuda_graph"
        raise ValueError(
            f"{name} is True; it takes a state that is one real tensor, inputs that are tensors, and neither has_aux "
            "nor a callback"
        )
    out, solution = _solved(problem, parameters, solver, gradient, solve_dtype, compile_solve, cuda_graph)
    return problem.unpack(out), problem.of_states(solution)


def _solved(
    problem: Packed,
    parameters: Iterable[Tensor] | None,
    solver: FixedPointSolver | None,
    gradient: str | GradientMethod,
    solve_dtype: torch.dtype | None,
    compile_solve: bool,
    cuda_graph: bool,
) -> tuple[Tensor, FixedPointSolution]:
    """`solve_fixed_point` of real tensors."""
    layer, x0, inputs = problem[:3]
    solver = checked_solver(solver) or Anderson()
    method = gradient_method(gradient)
    checked_solve_dtype(solve_dtype)
    estimating = method.needs == "inverse" and torch.is_grad_enabled()
    if estimating and not getattr(solver, "estimates_inverse", True):
        raise ValueError(
            f"gradient is {method}; it takes a solver with a history, Anderson or Broyden, and solver is {solver}"
        )
    check_batch(x0, inputs)
    implicit = ImplicitLayer(layer, parameters, method, solver.tol)
    for tensor in (x0, *inputs, *implicit.parameters):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError("a fixed point is solved within torch.func's grad or vmap, which it does not support")
    if cuda_graph:
        check_capturable(implicit, solver, compile_solve)
    step_spectral_norms(implicit.modules)
    implicit.prepare()
    if isinstance(method, Unrolled):
        out, solution = unroll(implicit, method, x0, inputs, solver)
        if (solution.status == Status.DIVERGED).any():
            out = _apply(implicit, solution, x0, inputs)[0]
        return out, solution

    # 1. Solve, without gradients.
    forward = ForwardSolve(implicit, solver, solve_dtype, compile_solve, cuda_graph)
    solution = forward.find(x0, inputs, estimating)
    if solution.following is None and solve_dtype is not None:
        solution = solution._replace(following=solution.value)
    # 2. Apply the layer once with its gradient, one step after the last iterate.
    ahead = solution.following is not None
    points = solution.value if solution.following is None else solution.following
    out, rows, pair = _apply(implicit, solution, points, inputs)
    # 3. Verify. A sample that the step has led astray goes back to its value.
    contradicted = 0
    if ahead:
        solution, rejected = _advance(solution, rows, pair, solver)
        diverged, late, again = _counts(solution.status, rejected)
        if again:
            implicit.state.restore()
            if autocast_dtype(x0) is None:
                solution = forward.finish(solution, rejected, inputs)
            out, rows, pair = _apply(implicit, solution, solution.value, inputs)
            ahead = False
    if not ahead:
        solution, contradicted = _check_claims(solution, rows, pair, solver)
        diverged, late, _ = _counts(solution.status, solution.status < 0)
    _warn(solution, solver, contradicted, diverged, late)
    return out, solution._replace(inverse=None, following=None)  # only the backward keeps the estimate


@overload
def fixed_point(
    layer: Callable[..., Any], x0: State, *, has_aux: Literal[True], **options: Any
) -> tuple[State, Any]: ...


@overload
def fixed_point(layer: Callable[..., Any], x0: State, *, has_aux: Literal[False] = False, **options: Any) -> State: ...


@untraced  # type: ignore[misc]  # the overloads name only the options that decide the type
def fixed_point(
    layer: Callable[..., Any],
    x0: Any,
    *,
    inputs: Sequence[Any] = (),
    parameters: Iterable[Tensor] | None = None,
    solver: FixedPointSolver | None = None,
    gradient: str | GradientMethod = "jfb",
    solve_dtype: torch.dtype | None = None,
    compile_solve: bool = False,
    cuda_graph: bool = False,
    has_aux: bool = False,
    callback: Callback | None = None,
) -> Any:
    """T(x*; inputs) at the fixed point x* = T(x*; inputs), with the gradient of an implicit network.

    `solve_fixed_point` also returns the residuals and statuses of the solve.

    Forward solves without gradients. Then it applies the layer once more, one step after the solve's last iterate.
    This application is the output; it measures the solution's residual; and backward differentiates it. So memory
    does not depend on the number of iterations (except with `Phantom` and `Unrolled`, which apply the layer more
    often).

    During all of this the layer is one fixed map, as if its module were in eval(). In train(), spectral norms take
    one power iteration before the solve; batch norms, and other norms with running statistics, update these once, at
    x*; an instance norm still normalises by each sample. A batch norm with track_running_stats=False has no running
    statistics and normalises by the batch in every evaluation, so that one sample's solve depends on the others'. The
    last application is made on the whole batch: a sample that it finds unconverged ends as MAX_ITER.

    If the layer's module has a linear operator other than a `SeparableBlur` or a `Blur` (a deepinv physics, or anything
    with an ``adjoint``), which may hold data of each sample, the whole batch is evaluated until its last sample is
    done. Several threads may evaluate a module in eval() at the same time, and one of them may differentiate it; a
    module in train() is for one thread at a time.

    A sample whose solve diverged is returned as its best finite iterate (NaN if it had none) and gets no gradient.

    A state may be a tuple, list, dict or any other pytree of torch, of real and complex tensors of one precision. All
    numbers of a sample are then one vector (`Packing` in solvers/states.py). Residuals are norms over the whole state,
    and ∂T/∂x is that of the real and imaginary parts, so that gradients are PyTorch's own for complex tensors.

    Args:
        layer: ``T(x, *inputs)``, from (B, …) to the same shape, sample by sample, which does not write over its
            arguments: a module, a module's method or any callable. "Its module" is that of the first two; modules
            that a lambda calls stay in the mode they are in.
        x0: the start, (B, …), real or complex, or a structure of such tensors, which the layer takes and returns; it
            gets no gradient.
        inputs: tensors (B, …) on which T depends, differentiable; each may be a structure of tensors.
        parameters: the tensors Θ that get a gradient; None for all parameters of the layer's module.
        solver: None for `Anderson()`.
        gradient: a gradient method, or the name of one with its default arguments: "jfb" (`JFB`), "neumann"
            (`Neumann`), "phantom" (`Phantom`), "implicit" (`Implicit`), "shine" (`Shine`) or "unrolled" (`Unrolled`).
        solve_dtype: torch.bfloat16 or torch.float16: iterate with the layer in that dtype first, and in full
            precision with the samples that this leaves above ``tol``; residuals are measured in full precision. None
            for the dtype of the caller's autocast, or full precision without one.
        compile_solve: compile the layer by torch.compile for the solve, if it is a module or a method of one, with a
            state that is one real tensor.
        cuda_graph: on a CUDA device, replay the solve from CUDA graphs (implicit/graphs.py): for a module, or a method
            of one, that reads nothing but its inputs, its tensors and its own attributes, with `Anderson` and a state
            that is one real tensor. An attribute that is an object must be replaced, not changed. It costs memory, and
            pays where the host is slower than the device. What cannot be captured is evaluated eagerly; `show_config`
            tells why.
        has_aux: the layer returns (state, aux); aux is anything. Samples stay in the batch until the last is done, and
            those that diverged take part in the last application as zeros.
        callback: called as callback(evaluation, x, residual) after each evaluation of the layer, with its number from
            1, the state at which T was evaluated, and ‖T(x) − x‖ / ‖T(x)‖, (B,); the last one is the application that
            carries the gradient. Samples stay in the batch as with ``has_aux``; those that are done stay still.

    Returns:
        T(x*), of x0's structure, shapes and dtypes; with ``has_aux`` also the aux of the last application, without
        gradients.

    Raises:
        TypeError: ``parameters`` or ``inputs`` is a tensor, or contains something else; ``gradient`` is neither a
            name nor a method; ``solver`` is not a solver; a layer that returns another structure than x0's.
        ValueError: an unknown name or ``solve_dtype``; a diverged sample whose data the layer captured and
            that is not finite; a layer that depends on a tensor that requires a gradient and is neither its module's
            parameter nor in ``inputs``, with ``parameters`` None, or on one that was computed before from a tensor
            that ``parameters`` does not name; a layer that detaches x, with a gradient that needs ∂T/∂x; a
            SyncBatchNorm in train() among several processes; a gradient that needs an estimate of the inverse, with
            a solver that makes none; what `FixedPointSolver.solve` raises.
        RuntimeError: inside a transform of torch.func; in a second backward through the same output, unless the
            first has ``retain_graph=True``; in a backward with ``create_graph=True``.

    Warns:
        ConvergenceWarning: some samples did not converge (with tol = 0: diverged), or the last application
            contradicts the solve, which the message explains.

    Example:
        >>> import torch, jfbfast
        >>> cell = torch.nn.Linear(3, 3)
        >>> d = torch.rand(4, 3)
        >>> def layer(x, d):
        ...     return 0.5 * torch.tanh(cell(x)) + d
        >>> out = jfbfast.fixed_point(layer, torch.zeros(4, 3), inputs=(d,), parameters=cell.parameters())
        >>> out.square().mean().backward()
        >>> cell.weight.grad.shape
        torch.Size([3, 3])
    """
    out, solution = solve_fixed_point(
        layer,
        x0,
        inputs=inputs,
        parameters=parameters,
        solver=solver,
        gradient=gradient,
        solve_dtype=solve_dtype,
        compile_solve=compile_solve,
        cuda_graph=cuda_graph,
        has_aux=has_aux,
        callback=callback,
    )
    return (out, solution.aux) if has_aux else out
