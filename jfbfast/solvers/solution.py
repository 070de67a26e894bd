"""What a solve reports of each sample."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast.solvers.estimate import InverseEstimate


class Status(IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    MAX_ITER = 1
    DIVERGED = 2


class FixedPointSolution(NamedTuple):
    """What a solve found, in the order of the batch.

    Attributes:
        value: the iterate x, (B, …); for a sample that did not converge, the one of the lowest
            ‖T(x) − x‖ (after `fixed_point` or a `DEGrad`'s forward, the one that follows it);
            NaN for a sample that never had a finite one.
        residual: ‖T(x) − x‖ / ‖T(x)‖ at ``value``, (B,), measured in float32 or wider; under autocast alone,
            without a ``solve_dtype``, of the T that autocast computes, and so is what ``status`` claims.
        iterations: evaluations of T, those of its coarse twin among them, (B,).
        status: a `Status` as an int64 tensor, (B,).
        coarse_iterations: those of ``iterations`` that the coarse twin served, (B,).
        inverse: (I − ∂T/∂x)⁻¹ as the solve's history has it, where it was asked for.
        following: the iterate one step beyond ``value``, which has not been evaluated, (B, …); ``value`` itself
            of a sample that diverged or whose last residual was not its lowest; None where the solve made none.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    status: Tensor
    coarse_iterations: Tensor = torch.zeros((), dtype=torch.long, device="cpu")
    inverse: InverseEstimate | None = None
    following: Tensor | None = None

    def replaced(self, rows: Tensor, **fields: Tensor) -> FixedPointSolution:
        """The solution with these fields' values for these samples, (b,) indices."""
        return self._replace(**{name: getattr(self, name).index_put((rows,), new) for name, new in fields.items()})
