"""Apply the layer a fixed number of times instead of solving."""

from __future__ import annotations

import torch
from torch import Tensor

from jfbfast.backends.tensors import compute_dtype, per_sample
from jfbfast.convergence import warn_unconverged
from jfbfast.implicit.autograd import ImplicitLayer
from jfbfast.implicit.methods import Unrolled
from jfbfast.solvers import FixedPointSolution, FixedPointSolver, Status
from jfbfast.solvers.loop import DIVERGED_GROWTH, TINY, norms


def unroll(
    implicit: ImplicitLayer, method: Unrolled, x0: Tensor, inputs: tuple[Tensor, ...], solver: FixedPointSolver
) -> tuple[Tensor, FixedPointSolution]:
    """Apply the layer from x0 as the method does, and report the result like a solve.

    A diverged sample has the value x0. If any sample diverged, the running statistics are restored.
    """
    out, trace = implicit.apply(x0, inputs)
    first_residual, first_size = norms(*trace.first)
    bound = DIVERGED_GROWTH * (first_residual + first_size)
    x, image = trace.last
    residual, size = norms(x, image)
    diverged = ~(residual.isfinite() & size.isfinite()) | (residual > bound) | (size > bound)
    converged = ~diverged & (residual <= solver.tol * size + solver.atol)
    count = int(diverged.sum())
    relative = torch.where(diverged, first_residual, residual) / torch.where(diverged, first_size, size).clamp_min(TINY)
    if count:
        implicit.state.restore()
        warn_unconverged(f"{count} of {len(x0)} samples diverged in {method.steps} applications of the layer")
    return out, FixedPointSolution(
        value=torch.where(per_sample(diverged, x), x0, x),
        residual=relative.to(compute_dtype(x0.dtype)),
        iterations=torch.full_like(diverged, method.steps, dtype=torch.long),
        status=torch.full_like(diverged, Status.MAX_ITER, dtype=torch.long)
        .masked_fill(converged, Status.CONVERGED)
        .masked_fill(diverged, Status.DIVERGED),
    )
