"""Plug-and-play restoration with a Gaussian denoiser, for every known blur and noise level. It has no fixed point."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.implicit.fixed_point import fixed_point
from jfbfast.implicit.methods import Unrolled
from jfbfast.models import registry
from jfbfast.models.config import ModelConfig
from jfbfast.models.sharing import Shared
from jfbfast.models.unet import UNet
from jfbfast.models.universal import KnownBlur, check_measurement
from jfbfast.operators.blur import GaussianBlur
from jfbfast.solvers import Picard

_STRONGEST = 2 * 49 / 255  # the first noise level of DPIR, on [−1, 1]
_DATA_WEIGHT = 0.23  # DPIR's, for noise levels relative to that of the measurement
_LEAST_NOISE = 2e-3  # rounding to 8 bits alone
_ONCE = Picard(tol=1e-3, max_iter=1)


@registry.network
class GaussianDenoiser(UNet):
    """A `UNet` D(x, σ) that is told the level σ of the white noise that it removes.

    Args:
        channels, features, blocks: as of `UNet`.

    Example:
        >>> import torch
        >>> from jfbfast.models.plug_and_play import GaussianDenoiser
        >>> GaussianDenoiser(channels=1, features=(4, 8), blocks=(1, 1))(torch.rand(2, 1, 16, 16), 0.1).shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(
        self, channels: int = 3, features: Sequence[int] = (64, 96, 128), blocks: Sequence[int] = (2, 2, 2)
    ) -> None:
        super().__init__(channels, features, blocks, conditions=1)

    def forward(self, x: Tensor, noise: float | Tensor) -> Tensor:  # type: ignore[override]
        """Denoise x.

        Args:
            x: (B, channels, H, W), on [−1, 1] but for the noise.
            noise: σ, a number or a tensor (B,).
        """
        level = torch.as_tensor(noise, dtype=x.dtype, device=x.device)
        return super().forward(x, condition=(((level + 5e-4) / 0.0105).log().expand(len(x)),))


@registry.model("plug-and-play")
class PlugAndPlay(Shared, nn.Module):
    """Half-quadratic splitting with a denoiser for falling noise levels (DPIR; Zhang et al., 2021).

        x ← D((AᵀA + λₖI)⁻¹(Aᵀd + λₖx), σₖ),  λₖ = 0.23 ν²/σₖ²,  k = 1, …, K

    where ν is the noise level of d, and σₖ falls geometrically from 0.38 to ν. It starts from d. K is fixed: D gets
    weaker in each step, and there is no fixed point. ``PlugAndPlay.from_pretrained("plug-and-play")`` has a denoiser
    that ships with the package, for colour images.

    Args:
        denoiser: D(x, σ), for images (B, C, H, W) and a noise level on [−1, 1], such as a `GaussianDenoiser`.
        blur, noise: the first measurement, as in `set_measurement`; None for a Gaussian of σ = 1 pixel.
        steps: K. With FFDNet's weights, 24 steps gain at most 0.3 dB over 8.
        noise_range: the least and the largest noise level that `set_measurement` takes.

    Raises:
        ValueError: a value out of its range.
        TypeError: a denoiser that cannot be called.

    Example:
        >>> import torch, jfbfast
        >>> blur = jfbfast.Blur(jfbfast.point_spread.motion(length=5, angle=30), padding_mode="circular")
        >>> model = jfbfast.PlugAndPlay(lambda x, noise: x / (1 + noise), blur, noise=0.02)
        >>> model(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
    """

    card_tags = ("deblurring", "plug-and-play")

    def __init__(
        self,
        denoiser: Callable[[Tensor, float], Tensor],
        blur: KnownBlur | None = None,
        noise: float = 0.01,
        *,
        steps: int = 8,
        noise_range: Sequence[float] = (0.0, 0.38),
    ) -> None:
        super().__init__()
        if not callable(denoiser) or isinstance(denoiser, type):
            raise TypeError(f"denoiser is {denoiser!r}; it takes a function D(x, σ) or a module")
        checks.integer("steps", steps, 1)
        self.denoiser, self.steps = denoiser, steps
        self.noise_range = (float(noise_range[0]), float(noise_range[1]))
        self.set_measurement(blur or GaussianBlur(sigma=1.0, padding_mode="valid"), noise)

    @classmethod
    def from_config(cls, config: ModelConfig, network: nn.Module) -> PlugAndPlay:
        if not isinstance(network, GaussianDenoiser):
            raise ValueError(f"denoiser is {dict(config.denoiser)}; plug-and-play takes a GaussianDenoiser")
        return cls(network, config.blur(), config.noise, noise_range=config.noise_range or (0.0, 0.38))

    def set_measurement(self, blur: KnownBlur, noise: float) -> None:
        """Set the model for measurements with this blur and white noise of this level.

        Args:
            blur: A, a `SeparableBlur` or a `Blur`.
            noise: standard deviation on [−1, 1].

        Raises:
            ValueError: a noise level out of the model's range; the model stays as it was.
            TypeError: another kind of blur; the model stays as it was.
        """
        check_measurement(blur, noise, self.noise_range)
        self.blur, self.noise = blur, float(noise)

    def levels(self) -> list[float]:
        """σ₁, …, σ_K."""
        last = max(self.noise, _LEAST_NOISE)
        first = max(_STRONGEST, last)
        return [first * (last / first) ** (k / max(1, self.steps - 1)) for k in range(self.steps)]

    def _step(self, start: Tensor, x: Tensor, b: Tensor, level: Tensor) -> Tensor:
        """The next x, for b = Aᵀd and σₖ, repeated to (B,); ``start`` is x without its gradient."""
        noise = float(level[0])
        damping = _DATA_WEIGHT * (max(self.noise, _LEAST_NOISE) / noise) ** 2
        return self.denoiser(self.blur.solve(b + damping * x, damping), noise).clamp(-1, 1)

    def forward(self, d: Tensor, *, callback: Callable[[int, Tensor], object] | None = None) -> Tensor:
        """The restored images, in the shape of Aᵀd, for the measurements d (B, C, H, W).

        ``callback`` is called after each step with its number, from 1, and the image.
        """
        y, x = self.blur.margin
        image, b = F.pad(d, (x, x, y, y), mode="replicate"), self.blur.adjoint(d)
        if not len(d):
            return b
        for step, level in enumerate(self.levels(), 1):
            # Each step runs in the form that is prepared for solves, which is faster.
            inputs = (image, b, image.new_full((len(d),), level))
            image = fixed_point(self._step, image, inputs=inputs, solver=_ONCE, gradient=Unrolled(1))
            if callback is not None:
                callback(step, image)
        return image

    def extra_repr(self) -> str:
        return f"blur={self.blur!r}, noise={self.noise:g}, steps={self.steps}"
