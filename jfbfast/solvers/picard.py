"""The plain iteration, and the same with momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.solvers.base import FixedPointSolver
from jfbfast.solvers.loop import Iteration, norms


@dataclass(frozen=True)
class Picard(FixedPointSolver):
    """The plain iteration x ← T(x).

    Args:
        tol, max_iter, atol: as in `FixedPointSolver`.

    Example:
        >>> import torch, jfbfast
        >>> solution = jfbfast.Picard(tol=1e-6).solve(lambda x: 0.5 * x + 1, torch.zeros(1, 2))
        >>> solution.value, solution.iterations
        (tensor([[2.0000, 2.0000]]), tensor([20]))
    """

    def start(self, x: Tensor) -> Iteration:
        return _PicardIteration()


class _PicardIteration(Iteration):
    def measure(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        return norms(x, f)

    def advance(self, x: Tensor, f: Tensor, grown: Tensor, out: Tensor) -> Tensor:
        return out.copy_(f)  # not f itself, which the layer may overwrite with its next output

    def select(self, rows: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Inertial(FixedPointSolver):
    """Momentum: xₖ₊₁ = T(yₖ), yₖ = xₖ + β(xₖ − xₖ₋₁) (Nesterov, 1983; for fixed points Maingé, 2008).

    The layer is evaluated at the y, and the solution reports these. The error along an eigenvalue λ of ∂T/∂x decays
    like the larger root of r² = λ((1 + β)r − β). For λ in [0, ρ] the best β is (1 − √(1 − ρ)) / (1 + √(1 − ρ)) with
    the rate 1 − √(1 − ρ); the plain iteration has the rate ρ. Momentum suits maps with such a spectrum, for example
    a gradient step. It is stable for real λ in (−1 / (1 + 2β), 1). A rising residual is a sign of too much momentum
    (O'Donoghue and Candès, 2015): a sample whose residual does not fall continues by the plain iteration.

    Args:
        tol, max_iter, atol: as in `FixedPointSolver`.
        momentum: β, in [0, 1); ½ is the best for ρ = 8/9 and stable for real λ in (−½, 1).

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> import torch, jfbfast
        >>> solution = jfbfast.Inertial(momentum=0.5).solve(lambda x: 0.8 * x + 1, torch.zeros(1, 2))
        >>> bool((solution.value - 5).abs().max() < 0.05)
        True
    """

    momentum: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("momentum", self.momentum, lambda m: 0 <= m < 1, "a number in [0, 1)")

    def start(self, x: Tensor) -> Iteration:
        return _InertialIteration(x, self.momentum)


class _InertialIteration(_PicardIteration):
    def __init__(self, x: Tensor, momentum: float) -> None:
        self.momentum = torch.full_like(x[:, :1], momentum)
        self.previous = x.clone()
        self.residual = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)

    def measure(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        residual, image = super().measure(x, f)
        self.momentum = self.momentum.masked_fill(~(residual < self.residual)[:, None], 0)
        self.residual = residual
        return residual, image

    def advance(self, x: Tensor, f: Tensor, grown: Tensor, out: Tensor) -> Tensor:
        torch.lerp(self.previous, f, 1 + self.momentum, out=out)
        self.previous.copy_(f)
        return out

    def select(self, rows: Tensor) -> None:
        self.momentum, self.previous, self.residual = (
            field[rows] for field in (self.momentum, self.previous, self.residual)
        )
