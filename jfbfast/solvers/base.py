"""The interface of a fixed-point solver, and the course of a solve: with one layer, or with a coarse one first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.tensors import compute_dtype
from jfbfast.backends.tracing import untraced
from jfbfast.solvers.loop import Iteration, Layer, Phase, iterate
from jfbfast.solvers.solution import FixedPointSolution, Status


@dataclass(frozen=True)
class FixedPointSolver(ABC):
    """Base class of the solvers of x = T(x): `Anderson`, `Broyden`, `Inertial` and `Picard`.

    Every sample of a batch is solved by itself. It stops as CONVERGED when ‖T(x) − x‖ ≤ tol·‖T(x)‖ + atol, and as
    DIVERGED when either norm is not finite or exceeds 10⁴ times the sum of the two at the first evaluation. Its
    values do not change after that. Finished samples leave the batch once half of the batch has finished.

    A subclass implements `start`, which returns the method's `Iteration`.

    Args:
        tol: relative tolerance; with 0 every sample takes ``max_iter`` evaluations.
        max_iter: the most evaluations of T for each sample.
        atol: absolute tolerance, in units of ‖x‖ over a sample.

    Raises:
        ValueError: a negative or non-finite tolerance; ``max_iter`` below 1.

    Example:
        >>> import torch, jfbfast
        >>> solver: jfbfast.FixedPointSolver = jfbfast.Anderson(tol=1e-6)
        >>> solution = solver.solve(torch.cos, torch.zeros(1, 1, dtype=torch.float64))
        >>> round(float(solution.value), 4), jfbfast.Status(int(solution.status)).name
        (0.7391, 'CONVERGED')
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
        """Start an iteration of the method, for flat iterates like ``x`` (B, N)."""

    @untraced
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
        """Solve ``x = layer(x, *inputs)`` for each sample of the batch.

        With ``coarse`` the solve has two phases. It iterates with ``coarse`` until each sample has converged,
        diverged or stalled. Then it iterates with ``layer``, with a new history, from the iterate after each sample's
        best. Residuals and statuses are measured with ``layer``, for which at least one of the ``max_iter``
        evaluations of each sample is reserved.

        A sample has stalled if its lowest ‖T(x) − x‖ has not fallen by 30% in 5 evaluations. That happens at the
        rounding floor of T, or if the solve converges at a rate above 0.93. Half-precision iterates cannot reach a
        ``tol`` below their eps (8e-3 in bfloat16): they end as MAX_ITER once they have stalled below that eps.

        Args:
            layer: T, a map from (B, …) to the same shape that treats each sample by itself.
            x0: the start, (B, …), floating point; the iterates have its dtype.
            inputs: tensors (B, …), one slice for each sample. Finished samples leave the batch only if there are
                inputs, because a layer that captured its data could not follow.
            coarse: a cheaper version of ``layer``, such as the same map in lower precision.
            verify: False accepts the samples that converged with ``coarse``, without an evaluation of ``layer``.
                (Without ``inputs`` the batch stays whole: if one sample needs ``layer``, all are evaluated with it.)
            estimate: give the solution an ``inverse``, the estimate of (I − ∂T/∂x)⁻¹ from the history of the
                evaluations of ``layer`` (Ramzi et al., 2022, "SHINE").

        Raises:
            TypeError: x0, an input or what the layer returns is not a tensor.
            ValueError: x0 without a batch dimension or not floating point; an input of another batch
                size; a layer that changes the shape or writes over its arguments; ``estimate`` with a
                method that keeps no history.
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

        phase = Phase(coarse, x0, inputs, budget - 1, most - 1, most - 1, stop_when_stalled=True, name="coarse")
        found = _shaped(self._run(phase), x0)
        found = found._replace(coarse_iterations=found.iterations)
        accepted = found.status == Status.CONVERGED
        if verify or estimate or not (inputs or accepted.all()):
            accepted = torch.zeros_like(accepted)
        rows = (~accepted).nonzero()[:, 0]
        if len(rows) == 0:
            return found
        assert found.following is not None
        start, spent, *inputs_left = (v[rows] for v in (found.following, found.iterations, *inputs))
        budget = self.max_iter - spent
        shortest, longest = int(budget.min()), int(budget.max())
        phase = Phase(layer, start, tuple(inputs_left), budget, shortest, longest, estimate=estimate, floor=floor)
        fine = _shaped(self._run(phase), start)
        fine = fine._replace(iterations=fine.iterations + spent, coarse_iterations=spent)
        if len(rows) == batch:
            return fine
        names = ("value", "residual", "iterations", "status", "following")
        return found.replaced(rows, **{name: getattr(fine, name) for name in names})

    def _run(self, phase: Phase) -> FixedPointSolution:
        """Run one phase of the solve; value and residual have the form that `iterate` returns."""
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
    """Return a solver, or any object with ``solve``, ``tol``, ``atol`` and ``max_iter``; raise TypeError for others."""
    needed = ("solve", "tol", "atol", "max_iter")
    if solver is not None and (isinstance(solver, type) or not all(hasattr(solver, name) for name in needed)):
        raise TypeError(f"solver is {solver!r}; it takes an instance, such as Anderson()")
    return solver


def _shaped(found: FixedPointSolution, start: Tensor) -> FixedPointSolution:
    """Reshape a phase's solution like its start; a sample that never had a finite iterate becomes NaN."""
    unusable = found.residual.isnan()
    value = found.value
    if unusable.is_cuda or unusable.any():
        unusable = unusable & ~start.reshape(value.shape).isfinite().all(1)
        value = torch.where(unusable[:, None], torch.nan, value)
    return found._replace(
        value=value.view(start.shape),
        following=None if found.following is None else found.following.view(start.shape),
        residual=found.residual.to(compute_dtype(start.dtype)),
    )
