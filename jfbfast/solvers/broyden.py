"""Broyden's method: quasi-Newton steps on T(x) − x with an inverse Jacobian of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.backends import dispatch
from jfbfast.backends.tensors import compute_dtype
from jfbfast.solvers.base import FixedPointSolver
from jfbfast.solvers.estimate import LowRank
from jfbfast.solvers.loop import Iteration

_MAX_MEMORY = 30  # the kernels take 64 pointers: two vectors for each of memory + 1 slots, and the newest image


@dataclass(frozen=True)
class Broyden(FixedPointSolver):
    """Broyden's "good" method (1965) on g(x) = T(x) − x, as in deep equilibrium models (Bai et al., 2019).

    x ← x − H g with H ≈ (∂g/∂x)⁻¹. H starts as −I, so that the first step leads to T(x). The update
    H ← H + (s − H y) sᵀH / (sᵀH y) is applied for each of the last ``memory`` steps s = Δx, y = Δg, oldest first.
    There is no line search. With the pairs as columns of S and Y, and L the strictly lower triangle of SᵀS,

        H = −I + (S + Y) (L + SᵀY)⁻¹ Sᵀ        (Byrd, Nocedal and Schnabel, 1994, theorem 6.2)

    When the memory is full, the oldest pair is dropped, and H is exactly that of the others, as in L-BFGS. An update
    is skipped if abs(sᵀH y) ≤ √ε ‖s‖², ε the machine epsilon of the iterates. Safeguard: if a sample's residual grows
    to four times its lowest, its history is dropped and it takes the damped step x + ½(T(x) − x).

    Args:
        tol, max_iter, atol: as in `FixedPointSolver`.
        memory: number of pairs (s, y) to keep, 1 to 30; each takes the memory of two iterates.

    Raises:
        ValueError: as in `FixedPointSolver`; ``memory`` out of its range.

    Example:
        >>> import torch, jfbfast
        >>> solution = jfbfast.Broyden(tol=1e-6, memory=5).solve(torch.cos, torch.zeros(1, 1, dtype=torch.float64))
        >>> round(float(solution.value), 4)
        0.7391
    """

    estimates_inverse: ClassVar[bool] = True

    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("memory", self.memory, 1, _MAX_MEMORY)

    def start(self, x: Tensor) -> Iteration:
        return _BroydenIteration(x, self.memory)


def _eliminate(system: Tensor, right: Tensor, order: list[int], smallest: float) -> Tensor:
    """system⁻¹ right by Gauss–Jordan elimination without pivoting, in the order of the updates.

    The pivots are −sᵀH y of each update, with H of the updates before it. A pair whose pivot is at most ``smallest``
    is left out of the system and is zero in the result.

    Args:
        system: (B, M, M); right: (B, M, r).
    """
    rows = torch.cat((system, right), dim=2)
    for k in order:
        pivot = rows[:, k, k]
        row = rows[:, k] * torch.where(pivot.abs() > smallest, 1 / pivot, 0)[:, None]
        rows = rows - rows[:, :, k, None] * row[:, None]
        rows[:, k] = row
    return rows[:, :, system.shape[1] :]


class _BroydenIteration(Iteration):
    """The last residuals g and steps s in one ring buffer, g₀ s₀ g₁ s₁ …, with the Gram matrix of all of them.

    Pair k is sₖ and yₖ = gₖ − gₖ₋₁, so that a memory of m pairs takes m + 1 slots.
    """

    def __init__(self, x: Tensor, memory: int) -> None:
        batch, slots = len(x), memory + 1
        self.kernels = dispatch.kernels(x.device, "anderson")
        self.ring = torch.zeros(2 * slots, *x.shape, dtype=x.dtype, device=x.device)
        self.gram = torch.zeros(batch, 2 * slots, 2 * slots, dtype=torch.float64, device=x.device)
        self.valid = torch.zeros(batch, slots, dtype=torch.bool, device=x.device)
        self.smallest = torch.finfo(x.dtype).eps ** 0.5
        self.evaluations = 0
        self.previous = x

    @property
    def slot(self) -> int:
        """The slot of the newest pair."""
        return (self.evaluations - 1) % self.valid.shape[1]

    @property
    def filled(self) -> int:
        return min(2 * self.evaluations, len(self.ring))

    def measure(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        append, slot = self.kernels.anderson_append, self.slot
        if self.evaluations > 1:
            append(self.previous, x, self.ring, self.gram, 2 * slot + 1, self.filled)
            self.valid[:, slot] = True
        norms = append(x, f, self.ring, self.gram, 2 * slot, self.filled)
        self.valid[:, (slot + 1) % self.valid.shape[1]] = (
            False  # the new residual has overwritten the one that this pair's y began from
        )
        residual, image = norms.unbind(1)
        return residual, image

    def advance(self, x: Tensor, f: Tensor, grown: Tensor, out: Tensor) -> Tensor:
        self.valid &= ~grown[:, None]
        products = self.gram[:, 1::2, 2 * self.slot, None]
        c = self._core(self.gram, self.valid, products).squeeze(2)
        # T(x) − Σ cₖ (sₖ + gₖ − gₖ₋₁), by vector of the ring
        weights = torch.stack((c.roll(-1, 1) - c, -c), dim=2).flatten(1)[:, : self.filled]
        alpha = torch.cat((torch.ones_like(c[:, :1]), weights), dim=1)
        following = self.kernels.anderson_mix(alpha, [f, *self.ring[: self.filled]], out=out)
        self.previous = x
        if x.is_cuda or grown.any():
            following = torch.where(grown[:, None], torch.lerp(x, f, 0.5), following)
        return following

    def _core(self, gram: Tensor, valid: Tensor, right: Tensor) -> Tensor:
        """(L + SᵀY)⁻¹ right, solved with every s scaled to norm 1, or to 0 if the pair is not valid."""
        slots = valid.shape[1]
        newest = self.evaluations - 1
        order = [pair % slots for pair in range(max(1, newest - slots + 2), newest + 1)]
        age = torch.tensor([(newest - slot) % slots for slot in range(slots)], device=gram.device)
        steps, residuals = gram[:, 1::2, 1::2], gram[:, 1::2, 0::2]
        system = steps.where(age[:, None] < age, 0) + residuals - residuals.roll(1, 2)
        norm = steps.diagonal(dim1=1, dim2=2).sqrt()
        scale = torch.where(valid & (norm > 0), 1 / norm, 0)[:, :, None]
        return scale * _eliminate(system * scale * scale.mT, scale * right, order, self.smallest)

    def inverse(self, rows: Tensor, f: Tensor) -> LowRank:
        """−H = I − (S + Y) (L + SᵀY)⁻¹ Sᵀ."""
        residuals, steps = (self.ring[start::2, rows].to(compute_dtype(f.dtype)) for start in (0, 1))
        identity = torch.eye(len(steps), dtype=torch.float64, device=f.device).expand(len(rows), -1, -1)
        core = self._core(self.gram[rows], self.valid[rows], identity)
        u = torch.einsum("kbn,bkl->lbn", steps + residuals - residuals.roll(1, 0), core.to(steps.dtype))
        return LowRank(u, steps)

    def select(self, rows: Tensor) -> None:
        self.ring = self.ring[:, rows]
        self.gram, self.valid, self.previous = self.gram[rows], self.valid[rows], self.previous[rows]
