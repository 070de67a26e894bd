"""What every evaluation of a solve did: residual and quality of each sample against iterations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast.backends.precision import precision_for
from jfbfast.backends.reference import flat
from jfbfast.imaging.quality import psnr
from jfbfast.implicit.frozen import frozen, materialised_weights, owner
from jfbfast.models.degrad import DEGrad
from jfbfast.solvers import Anderson, FixedPointSolution, FixedPointSolver, Layer
from jfbfast.solvers.base import check_batch, checked_solver


class History(NamedTuple):
    """A solve, evaluation by evaluation.

    Attributes:
        residual: ‖T(x) − x‖ / ‖T(x)‖ at every evaluation of T, (E, B).
        psnr: of T(x) against the truth, in dB at the true range 2, (E, B); None without a truth.
        solution: what the solve found.
    """

    residual: Tensor
    psnr: Tensor | None
    solution: FixedPointSolution


class Problem(NamedTuple):
    """The fixed point x = T(x, *inputs), where its solve starts, and what solves it.

    Attributes:
        layer: T.
        start: (B, …).
        inputs: tensors (B, …).
        solver: of the solve.
        solve_dtype: of the solve's first evaluations, as in `fixed_point`.
    """

    layer: Layer
    start: Tensor
    inputs: tuple[Tensor, ...]
    solver: FixedPointSolver
    solve_dtype: torch.dtype | None


def problem(
    model: DEGrad | Callable[..., Tensor],
    d: Tensor | None,
    x0: Tensor | None,
    inputs: Sequence[Tensor],
    solver: FixedPointSolver | None,
) -> Problem:
    """A DE-GRAD's fixed points for d, or those of a layer from x0; the arguments are those of `convergence_history`."""
    if isinstance(model, DEGrad):
        if not isinstance(d, Tensor) or inputs or solver is not None:
            raise TypeError("model is a DEGrad, which takes the measurements d, and has its own inputs and solver")
        if model.averaging_is_due:
            model = copy.deepcopy(model)
            model.update_averaging(d, x0)
        return Problem(model.layer, model.start(d) if x0 is None else x0, (d,), model.solver, model.solve_dtype)
    start = d if x0 is None and len(inputs) else x0
    if not callable(model) or isinstance(model, type) or not isinstance(start, Tensor):
        raise TypeError(
            f"model is {type(model).__name__} and x0 {type(start).__name__}; it takes a DEGrad and the measurements d, "
            "or a layer T(x, *inputs) with a tensor x0=… to start from and the tensors inputs=(…)"
        )
    check_batch(start, inputs)
    return Problem(model, start, tuple(inputs), checked_solver(solver) or Anderson(), None)


@torch.no_grad()
def convergence_history(
    model: DEGrad | Callable[..., Tensor],
    d: Tensor | None = None,
    x: Tensor | None = None,
    iterations: int = 300,
    x0: Tensor | None = None,
    *,
    inputs: Sequence[Tensor] = (),
    solver: FixedPointSolver | None = None,
) -> History:
    """The solver run on with tol = 0: does it converge, and does quality stay once it has?

    The layer is held still, and stays as it is: an averaging that is to be estimated is so for this alone. A sample
    that diverges keeps its last values.

    Args:
        model: a DE-GRAD, or a layer T(x, *inputs) of any implicit network, as in `fixed_point`.
        d: of a DE-GRAD the measurements, (B, C, H, W); of a layer with inputs, x0.
        x: the truth, like the fixed points, in [−1, 1].
        iterations: evaluations of T.
        x0: the start, (B, …); where None a DE-GRAD's own.
        inputs: of a layer, tensors (B, …).
        solver: of a layer; `Anderson()` where None.

    Raises:
        TypeError: neither, or one with the other's arguments.
        ValueError: ``iterations`` below 1; what `FixedPointSolver.solve` raises.
    """
    return history_of(problem(model, d, x0, inputs, solver), x, iterations)


@torch.no_grad()
def history_of(posed: Problem, x: Tensor | None, iterations: int) -> History:
    """The history of a `Problem`'s solve; the arguments are those of `convergence_history`."""
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it takes a tensor, the truth; inputs are named: inputs=(…)")
    residuals: list[Tensor] = []
    qualities: list[Tensor] = []

    def recorded(value: Tensor) -> Tensor:  # has captured the inputs, so that no sample leaves the batch
        image = posed.layer(value, *posed.inputs)
        residuals.append(flat(image - value).norm(dim=1) / flat(image).norm(dim=1))
        if x is not None:
            qualities.append(psnr(image, x))
        return image

    solver = replace(posed.solver, tol=0.0, atol=0.0, max_iter=iterations)
    module = owner(posed.layer)
    with frozen(module), materialised_weights(module), precision_for(0.0, posed.start.device):
        solution = solver.solve(recorded, posed.start)
    empty = [posed.start.new_zeros(0)]  # the solve of an empty batch evaluates nothing
    return History(torch.stack(residuals or empty), None if x is None else torch.stack(qualities or empty), solution)
