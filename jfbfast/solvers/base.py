"""What every fixed-point solver takes and how a solve goes: on one layer, or down a ladder of two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.reference import band_dtype
from jfbfast.solvers.loop import Iteration, Layer, Phase, iterate
from jfbfast.solvers.solution import FixedPointSolution, Status


@dataclass(frozen=True)
class FixedPointSolver(ABC):
    """What every method shares: stopping, freezing, statuses, compaction.

    A sample stops as CONVERGED when ‖T(x) − x‖ ≤ tol·‖T(x)‖ + atol, and as DIVERGED when either
    norm is not finite or exceeds 10⁴ times the sum of the two at the first evaluation. It is frozen from there
    on, and leaves the batch once half of the batch has. No sample's values touch another's.

    Args:
        tol: relative tolerance; 0 runs to ``max_iter``.
        max_iter: evaluations of T for each sample at most; kept exactly.
        atol: absolute tolerance, in units of ‖x‖ over a sample.

    Raises:
        ValueError: a negative or non-finite tolerance; ``max_iter`` below 1.
    """

    estimates_inverse: ClassVar[bool] = False

    tol: float = 1e-3
    max_iter: int = 50
    atol: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tol", "atol"):
            checks.non_negative(name, getattr(self, name))
        checks.integer("max_iter", self.max_iter, 1)

    @abstractmethod
    def start(self, x: Tensor) -> Iteration:
        """A fresh iteration for flat iterates like ``x`` (B, N)."""

    @torch.compiler.disable
    def solve(
        self,
        layer: Layer,
        x0: Tensor,
        inputs: Sequence[Tensor] = (),
        *,
        coarse: Layer | None = None,
        verify: bool = True,
        estimate: bool = False,
    ) -> FixedPointSolution:
        """Solve x = layer(x, *inputs) for each sample of the batch.

        With ``coarse`` the solve goes down a ladder of two: it iterates with ``coarse`` until each
        sample has converged, diverged or stalled there, and then with ``layer``, with a fresh history,
        from the iterate that follows each sample's best. What is claimed of a sample is measured with
        ``layer``, which keeps at least one of the ``max_iter`` evaluations of each sample.

        A sample has stalled when in 5 evaluations its lowest ‖T(x) − x‖ has not fallen by 30%: at the
        rounding floor of T, or where the solve converges at a rate above 0.93. Half-precision iterates with a
        ``tol`` below their eps (8e-3 in bfloat16) end as MAX_ITER where they have stalled within it: ``tol`` is
        beyond their rounding.

        Args:
            layer: T, a map of (B, …) to the same shape that treats each sample by itself.
            x0: the start, (B, …), floating point; the iterates have its dtype.
            inputs: tensors (B, …) of which each sample owns a slice. Samples leave the batch only
                where there are inputs, since a layer that captured its data could not follow.
            coarse: a cheaper twin of ``layer``, such as the same map in lower precision.
            verify: False takes the word of ``coarse`` for the samples that converged there, which go on no
                further; samples that a ``layer`` without ``inputs`` cannot leave out do.
            estimate: gives the solution an ``inverse``, (I − ∂T/∂x)⁻¹ from the history of the
                evaluations of ``layer`` (Ramzi et al., 2022).

        Raises:
            TypeError: x0, an input or what the layer returns is no tensor.
            ValueError: x0 without a batch dimension or not floating point, an input of another batch
                size, a layer that changes the shape or writes over its arguments, or ``estimate`` of a
                method that has no history.
        """
        check_batch(x0, inputs)
        if estimate and not self.estimates_inverse:
            raise ValueError(
                f"estimate is True; {type(self).__name__} keeps no history for it, Anderson and Broyden do"
            )
        with torch.no_grad():
            return self._solve(layer, x0.detach(), tuple(inputs), coarse, verify, estimate)

    def _solve(
        self,
        layer: Layer,
        x0: Tensor,
        inputs: tuple[Tensor, ...],
        coarse: Layer | None,
        verify: bool,
        estimate: bool,
    ) -> FixedPointSolution:
        batch, most = len(x0), self.max_iter if len(x0) else 0
        precision = torch.finfo(x0.dtype)
        floor = precision.eps if precision.bits < 32 and 0 < self.tol < precision.eps else 0.0
        budget = torch.full((batch,), self.max_iter, dtype=torch.long, device=x0.device)
        if coarse is None or most < 2:
            found = self._run(Phase(layer, x0, inputs, budget, most, most, estimate=estimate, floor=floor))
            return _shaped(found, x0)._replace(coarse_iterations=torch.zeros_like(budget))

        rung = Phase(coarse, x0, inputs, budget - 1, most - 1, most - 1, stop_when_stalled=True, name="coarse")
        found = _shaped(self._run(rung), x0)
        found = found._replace(coarse_iterations=found.iterations)
        accepted = found.status == Status.CONVERGED
        if verify or estimate or not (inputs or accepted.all()):
            accepted = torch.zeros_like(accepted)
        rows = (~accepted).nonzero()[:, 0]
        if len(rows) == 0:
            return found
        coarsely = found.value if found.following is None else found.following
        start, spent, *inputs_left = (v[rows] for v in (coarsely, found.iterations, *inputs))
        budget = self.max_iter - spent
        shortest, longest = int(budget.min()), int(budget.max())
        phase = Phase(layer, start, tuple(inputs_left), budget, shortest, longest, estimate=estimate, floor=floor)
        fine = _shaped(self._run(phase), start)
        fine = fine._replace(iterations=fine.iterations + spent, coarse_iterations=spent)
        if len(rows) == batch:
            return fine
        names = ["value", "residual", "iterations", "status"]
        if found.following is not None:
            names.append("following")
        return found.replaced(rows, **{name: getattr(fine, name) for name in names})

    def _run(self, phase: Phase) -> FixedPointSolution:
        """One phase of the solve; value and residual as `iterate` has them."""
        return iterate(phase, self.start, self.tol, self.atol)


def check_batch(x0: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise TypeError or ValueError unless x0 is (B, …), floating point, and the inputs are tensors (B, …)."""
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 is a {type(x0).__name__}; it takes a tensor")
    if x0.dim() < 1 or not x0.is_floating_point():
        raise ValueError(
            f"x0 is {x0.dtype} of shape {tuple(x0.shape)}; it takes a floating-point tensor of shape (B, …)"
        )
    if isinstance(inputs, Tensor):
        raise TypeError("inputs is a tensor; it takes a sequence of tensors, such as inputs=(d,)")
    for i, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            raise TypeError(f"inputs[{i}] is a {type(value).__name__}; it takes a tensor")
        if value.shape[:1] != x0.shape[:1]:
            raise ValueError(
                f"inputs[{i}] has shape {tuple(value.shape)}; it takes the batch size of x0, ({x0.shape[0]}, …)"
            )


def checked_solver(solver: FixedPointSolver | None) -> FixedPointSolver | None:
    """The solver, or another object with its ``solve``, ``tol``, ``atol`` and ``max_iter``.

    Raises TypeError for what is none, such as its class.
    """
    needed = ("solve", "tol", "atol", "max_iter")
    if solver is not None and (isinstance(solver, type) or not all(hasattr(solver, name) for name in needed)):
        raise TypeError(f"solver is {solver!r}; it takes an instance, such as Anderson()")
    return solver


def _shaped(found: FixedPointSolution, start: Tensor) -> FixedPointSolution:
    """A phase's solution in the shape of its start; a sample without any finite iterate is NaN throughout."""
    unusable = found.residual.isnan() & ~start.reshape(found.value.shape).isfinite().all(1)
    return found._replace(
        value=torch.where(unusable[:, None], torch.nan, found.value).view(start.shape),
        following=None if found.following is None else found.following.view(start.shape),
        residual=found.residual.to(band_dtype(start.dtype)),
    )
