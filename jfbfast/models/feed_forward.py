"""Baselines with a network, to compare implicit networks with: plug-and-play, and a feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.models import registry
from jfbfast.models.config import ModelConfig
from jfbfast.models.red import log_parameter
from jfbfast.models.sharing import Shared
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
    """Plug-and-play half-quadratic splitting (Zhang et al., 2017, with the same denoiser in every iteration).

        x ← D(z),  z = argmin ½‖A z − d‖² + ρ/2‖z − x‖² = (AᵀA + ρI)⁻¹(Aᵀd + ρx)

    Args:
        blur: A.
        d: measurements (B, C, H, W).
        denoiser: D, in eval().
        weight: ρ > 0.
        tol, max_iter: of `Picard`; the iteration need not converge.

    Returns:
        The solution; its ``value`` is x, in the shape of Aᵀd.

    Raises:
        ValueError: ρ not positive and finite.

    Example:
        >>> import torch, jfbfast
        >>> from jfbfast.models.feed_forward import plug_and_play
        >>> blur = jfbfast.GaussianBlur()
        >>> d = blur(torch.rand(1, 1, 8, 8))
        >>> plug_and_play(blur, d, lambda z: 0.5 * z, weight=0.5).value.shape
        torch.Size([1, 1, 8, 8])
    """
    checks.positive("weight", weight)

    def iterate(x: Tensor, d: Tensor) -> Tensor:
        return denoiser(blur.solve(blur.adjoint(d) + weight * x, weight))

    return Picard(tol=tol, max_iter=max_iter).solve(iterate, blur.adjoint(d), (d,))


@registry.model("feed-forward")
class FeedForward(Shared, nn.Module):
    """D((AᵀA + λI)⁻¹Aᵀd): a network applied once, to Tikhonov's restoration.

    Args:
        blur: A.
        denoiser: D, a map of images (B, C, H, W) to images of the same shape.
        weight: λ > 0, the start of a learnable parameter.

    Raises:
        ValueError: λ not positive and finite.

    Example:
        >>> import torch, jfbfast
        >>> from jfbfast.models.feed_forward import FeedForward
        >>> model = FeedForward(jfbfast.GaussianBlur(), torch.nn.Identity(), weight=0.01)
        >>> model(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """

    card_tags = ("deblurring",)

    def __init__(self, blur: SeparableBlur, denoiser: nn.Module, weight: float = 0.05) -> None:
        super().__init__()
        self.blur = blur
        self.denoiser = denoiser
        self.log_weight = log_parameter("weight", weight)

    @classmethod
    def from_config(cls, config: ModelConfig, network: nn.Module) -> FeedForward:
        """Make the untrained model around its network, for `ModelConfig.model`."""
        return cls(config.blur(), network, config.weight)

    def set_measurement(self, blur: SeparableBlur, noise: float) -> None:
        """Restore measurements with this blur from now on, whatever the model was trained for."""
        self.blur = blur

    @property
    def weight(self) -> Tensor:
        """λ, a tensor of shape ()."""
        return self.log_weight.exp()

    def forward(self, d: Tensor) -> Tensor:
        """Restore the measurements d (B, C, H, W); returns images of the shape of Aᵀd."""
        return self.denoiser(self.blur.solve(self.blur.adjoint(d), self.weight)).to(d.dtype)
