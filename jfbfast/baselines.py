"""What an implicit network is compared with: total variation, plug-and-play, and a feed-forward network."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jfbfast.denoisers import log_parameter
from jfbfast.operators import SeparableBlur
from jfbfast.solvers import FixedPointSolution, Picard


def differences(x: Tensor) -> Tensor:
    """∇x, the forward differences of images (…, H, W) as (2, …, H, W): down, and to the right; 0 at the far edges."""
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    torch.sub(x[..., 1:, :], x[..., :-1, :], out=down[..., :-1, :])
    torch.sub(x[..., :, 1:], x[..., :, :-1], out=right[..., :, :-1])
    return torch.stack((down, right))


def differences_adjoint(u: Tensor) -> Tensor:
    """∇ᵀu for u (2, …, H, W)."""
    down, right = u
    out = torch.zeros_like(down)
    out[..., :-1, :] -= down[..., :-1, :]
    out[..., 1:, :] += down[..., :-1, :]
    out[..., :, :-1] -= right[..., :, :-1]
    out[..., :, 1:] += right[..., :, :-1]
    return out


def total_variation(x: Tensor) -> Tensor:
    """Σ ‖(∇x)ᵢ‖₂ over the pixels and channels of each image (B, C, H, W): the isotropic total variation, (B,)."""
    return differences(x).norm(dim=0).flatten(1).sum(1)


@torch.no_grad()
def tv(blur: SeparableBlur, d: Tensor, weight: float, *, tol: float = 1e-4, max_iter: int = 500) -> FixedPointSolution:
    """argmin ½‖A x − d‖² + λ TV(x), channel by channel, by the primal-dual method (Condat, 2013; Vũ, 2013).

        x ← x − τ(Aᵀ(A x − d) + ∇ᵀu),  u ← Π(u + σ∇(2x' − x)),

    x' the new x and Π the projection to ‖uᵢ‖ ≤ λ. It converges for 1/τ − σ‖∇‖² ≥ ‖A‖²/2, where
    ‖∇‖² < 8, and ‖A‖² ≤ max AᵀA1 for filters of non-negative weights, which A must have.

    Args:
        blur: A.
        d: measurements (B, C, H, W).
        weight: λ > 0.
        tol: a sample stops where the step in (x, u) is at most tol of their norm.
        max_iter: iterations at most.

    Returns:
        The solution, whose ``value`` is x.
    """
    if not 0 < weight < math.inf:
        raise ValueError(f"weight is {weight}; it takes a positive number")
    dual = 0.02
    norm = float(blur.normal(torch.ones_like(d[:1])).max()) if d.numel() else 1.0
    primal = 1 / (norm / 2 + 8 * dual)

    def iterate(state: Tensor, d: Tensor) -> Tensor:
        x, u = state[:, 0], state[:, 1:].movedim(1, 0)
        following = x - primal * (blur.gradient(x, d) + differences_adjoint(u))
        u = u + dual * differences(2 * following - x)
        u = u * (weight / u.norm(dim=0).clamp_min(weight))
        return torch.cat((following[:, None], u.movedim(0, 1)), dim=1)

    x0 = blur.adjoint(d)
    start = torch.stack((x0, torch.zeros_like(x0), torch.zeros_like(x0)), dim=1)
    solution = Picard(tol=tol, max_iter=max_iter).solve(iterate, start, (d,))
    return solution._replace(value=solution.value[:, 0])


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
