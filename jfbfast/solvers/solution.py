"""The result of a solve."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jfbfast.solvers.estimate import InverseEstimate


class Status(IntEnum):
    """How the solve of one sample ended.

    Example:
        >>> import jfbfast
        >>> [status.name for status in jfbfast.Status]
        ['CONVERGED', 'MAX_ITER', 'DIVERGED']
    """

    CONVERGED = 0
    MAX_ITER = 1
    DIVERGED = 2


class FixedPointSolution(NamedTuple):
    """What a solve found for each sample, in the order of the batch.

    Attributes:
        value: the iterate x, (B, …). For a sample that did not converge it is the one with the lowest ‖T(x) − x‖, or
            NaN if none was finite. `solve_fixed_point` and `DEGrad` then move on to the iterate after it, where they
            apply the layer, unless the residual has grown there.
        residual: ‖T(x) − x‖ / ‖T(x)‖ at ``value``, (B,), measured in float32 or wider. Under autocast without a
            ``solve_dtype``, residual and status are those of the T that autocast computes.
        iterations: evaluations of T, (B,), including those in low precision.
        status: a `Status` as an int64 tensor, (B,).
        coarse_iterations: the evaluations in low precision, (B,).
        inverse: the estimate of (I − ∂T/∂x)⁻¹ from the solve's history, if it was asked for.
        following: the iterate one step after ``value``, (B, …), at which T has not been evaluated. A sample that
            diverged, or whose last residual was not its lowest, has ``value`` here. None if the solver gives no
            following iterates.
        aux: the auxiliary outputs of the last application, if the layer of `solve_fixed_point` has any.

    With a state of several tensors, or a complex one, ``value`` has its structure.

    Example:
        >>> import torch, jfbfast
        >>> solution = jfbfast.Picard(tol=0.1).solve(lambda x: 0.5 * x + 1, torch.zeros(2, 1))
        >>> solution.iterations, bool((solution.residual <= 0.1).all())
        (tensor([4, 4]), True)
        >>> (solution.status == jfbfast.Status.CONVERGED).all()
        tensor(True)
        >>> solution
        FixedPointSolution(2 of 2 converged, largest residual 0.0667, 4 evaluations)
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    status: Tensor
    coarse_iterations: Tensor = torch.zeros((), dtype=torch.long, device="cpu")
    inverse: InverseEstimate | None = None
    following: Tensor | None = None
    aux: Any = None

    def __repr__(self) -> str:
        """How the samples ended; the images themselves would fill the screen."""
        ended = [Status(int(each)) for each in self.status]
        told = [f"{ended.count(Status.CONVERGED)} of {len(ended)} converged"]
        if diverged := ended.count(Status.DIVERGED):
            told.append(f"{diverged} diverged")
        if ended:
            least, most = (int(end(self.iterations)) for end in (torch.min, torch.max))
            told.append(f"largest residual {float(self.residual.max()):.3g}")
            told.append(f"{most} evaluations" if least == most else f"{least} to {most} evaluations")
        return f"FixedPointSolution({', '.join(told)})"

    def of(self, rows: Tensor, *fields: str) -> tuple[Tensor, ...]:
        """These fields of these samples, ascending (b,) indices."""
        whole = len(rows) == len(self.status)
        return tuple([getattr(self, name) if whole else getattr(self, name)[rows] for name in fields])

    def replaced(self, rows: Tensor, **fields: Tensor) -> FixedPointSolution:
        """A copy of the solution with new values of these fields for these samples, ascending (b,) indices."""
        changed: dict[str, Any] = fields
        if len(rows) < len(self.status):
            changed = {name: getattr(self, name).index_put((rows,), new) for name, new in fields.items()}
        return self._replace(**changed)
