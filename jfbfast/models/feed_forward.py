"""What an implicit network is compared with beside the classical methods: plug-and-play, a feed-forward network."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jfbfast.models.denoisers import log_parameter
from jfbfast.operators.blur import SeparableBlur
from jfbfast.solvers import FixedPointSolution, Picard


@torch.no_grad()
def plug_and_play(
    blur: SeparableBlur,
    d: Tensor,
    denoiser: Callable[[Tensor], Tensor],
    weight: float,
    *,
    tol: float = 1e-3,
    max_iter: int = 100,
) -> FixedPointSolution:
    """Plug-and-play half-quadratic splitting (Zhang et al., 2017, with one denoiser throughout).

        x ← D(z),  z = argmin ½‖A z − d‖² + ρ/2‖z − x‖² = (AᵀA + ρI)⁻¹(Aᵀd + ρx)

    Args:
        blur: A.
        d: measurements (B, C, H, W).
        denoiser: D, in eval().
        weight: ρ > 0.
        tol, max_iter: of `Picard`; the iteration need not converge.

    Returns:
        The solution, whose ``value`` is x.
    """
    if not 0 < weight < math.inf:
        raise ValueError(f"weight is {weight}; it takes a positive number")

    def iterate(x: Tensor, d: Tensor) -> Tensor:
        return denoiser(blur.solve(blur.adjoint(d) + weight * x, weight))

    return Picard(tol=tol, max_iter=max_iter).solve(iterate, blur.adjoint(d), (d,))


class FeedForward(nn.Module):
    """D((AᵀA + λI)⁻¹Aᵀd): a network applied once, to Tikhonov's restoration.

    Args:
        blur: A.
        denoiser: D.
        weight: λ > 0, the start of a learnable parameter.
    """

    def __init__(self, blur: SeparableBlur, denoiser: nn.Module, weight: float = 0.05) -> None:
        super().__init__()
        self.blur = blur
        self.denoiser = denoiser
        self.log_weight = log_parameter("weight", weight)

    @property
    def weight(self) -> Tensor:
        """λ, a tensor of shape ()."""
        return self.log_weight.exp()

    def forward(self, d: Tensor) -> Tensor:
        """The restored images for the measurements d (B, C, H, W)."""
        restored: Tensor = self.denoiser(self.blur.solve(self.blur.adjoint(d), self.weight))
        return restored.to(d.dtype)
