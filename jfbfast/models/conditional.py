"""One network for a range of blurs and noise levels: they are inputs of its denoiser, and they set λ and δ."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from jfbfast.models import registry
from jfbfast.models.config import SETTING, MeasurementRanges, ModelConfig
from jfbfast.models.degrad import DEGrad
from jfbfast.models.red import RED
from jfbfast.operators.blur import GaussianBlur

REFERENCE_SIGMA, REFERENCE_NOISE = 1.0, 0.01
NOISE_FLOOR = 1e-4  # so that λ without noise is 1e-4 of λ at 0.01: Tikhonov's best λ without noise is about 2e-6
CONDITIONS = 2  # numbers that `condition` returns


def condition(sigma: float, noise: float) -> tuple[float, float]:
    """The two numbers that tell a network σ and ν: (log σ, log (ν + ν₀)/(0.01 + ν₀)) with ν₀ = 1e-4.

    Both are 0 at σ = 1 and ν = 0.01.

    Args:
        sigma: standard deviation σ > 0 of the blur, in pixels.
        noise: standard deviation ν ≥ 0 of the noise, on [−1, 1].
    """
    return (
        math.log(sigma / REFERENCE_SIGMA),
        math.log((noise + NOISE_FLOOR) / (REFERENCE_NOISE + NOISE_FLOOR)),
    )


class ConditionalRED(RED):
    """R(x) = λ(x − D((1 + δ)W x; c)), with λ and δ that depend on the condition c = (c₁, c₂) of σ and the noise level.

    If D takes an injection, it is D((1 + δ)W x, (1 + λ)z; c), with z as in `RED`.

        λ = λ₀ exp(a₁c₁ + a₂c₂),  δ = δ₀ exp(b₁c₁ + b₂c₂),  W = AᵀA(AᵀA + δI)⁻¹.

    Where AᵀA ≈ 1, x* keeps a share 1/(1 + λ) of the noise, so λ has to grow with the noise: a₂ starts at 2, since
    Wiener's filter takes the ratio of noise power to signal power; b₂ starts at 1. The factors 1 + δ and 1 + λ keep
    the brightness of what D sees: W has the gain 1/(1 + δ) there, and z 1/(1 + λ).

    Args:
        denoiser: D, called with the images (B, C, H, W) and ``condition=c``.
        weight: λ₀ = δ₀ > 0, the start of two learnable parameters. The exponents a and b are learnable too.

    Attributes:
        condition: c, the result of the function `condition`.
    """

    def __init__(self, denoiser: nn.Module, weight: float = 0.05) -> None:
        super().__init__(denoiser, weight, weight)
        self.weight_exponents = nn.Parameter(torch.tensor([0.0, 2.0]))
        self.filter_damping_exponents = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.condition = (0.0, 0.0)

    def _scale(self, log_start: Tensor, exponents: Tensor) -> Tensor:
        return (log_start + exponents[0] * self.condition[0] + exponents[1] * self.condition[1]).exp()

    @property
    def weight(self) -> Tensor:
        """λ, a tensor of shape ()."""
        return self._scale(self.log_weight, self.weight_exponents)

    @property
    def filter_damping(self) -> Tensor:
        """δ, a tensor of shape ()."""
        assert self.log_filter_damping is not None
        return self._scale(self.log_filter_damping, self.filter_damping_exponents)

    def denoise(self, seen: Tensor, x: Tensor, *injected: Tensor) -> Tensor:
        """D((1 + δ) · seen; c), or D((1 + δ) · seen, (1 + λ) · z; c)."""
        scaled = ((1 + self.filter_damping) * seen, *((1 + self.weight) * z for z in injected))
        return self.denoiser(*scaled, condition=self.condition)


@registry.model("conditional")
class ConditionalDEGrad(DEGrad):
    """A filtered `DEGrad` for every Gaussian blur and noise level within its ranges, set for one of them at a time.

    Args:
        denoiser: D of `ConditionalRED`, such as ``UNet(conditions=2)``.
        kernel_size, padding_mode: arguments of the `GaussianBlur`.
        ranges: the blurs and noise levels that `set_measurement` takes; None for `MeasurementRanges()`.
        sigma, noise: the first setting.
        weight: of `ConditionalRED`.
        options: averaging, solver, gradient, solve_dtype and compile_solve of `DEGrad`.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import jfbfast
        >>> model = jfbfast.ConditionalDEGrad(jfbfast.UNet(3, features=(4, 8), blocks=(1, 1), conditions=2))
        >>> model.set_measurement(sigma=2.0, noise=0.03)
        >>> model.measurement, model.blur.sigma
        ((2.0, 0.03), (2.0, 2.0))
    """

    regularizer: ConditionalRED

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        kernel_size: int = 5,
        padding_mode: str = "zeros",
        ranges: MeasurementRanges | None = None,
        sigma: float = REFERENCE_SIGMA,
        noise: float = REFERENCE_NOISE,
        weight: float = 0.05,
        **options: Any,
    ) -> None:
        ranges = ranges or MeasurementRanges()
        ranges.check(sigma, noise)
        blur = GaussianBlur(kernel_size, sigma, padding_mode)
        super().__init__(blur, ConditionalRED(denoiser, weight), preconditioner="exact", **options)
        self.ranges = ranges
        self.set_measurement(sigma, noise)

    @classmethod
    def from_config(cls, config: ModelConfig, network: nn.Module) -> ConditionalDEGrad:
        if config.form != "filtered" or getattr(network, "conditions", 0) != CONDITIONS:
            raise ValueError(
                f"form is {config.form!r} with {dict(config.denoiser)}; sigma_range and noise_range take the filtered "
                f"form with a UNet of {CONDITIONS} conditions"
            )
        fields = {name: getattr(config, name) for name in ("ranges", "weight", *SETTING)}
        return cls(network, **fields, **config.degrad_options())

    @property
    def measurement(self) -> tuple[float, float]:
        """The setting (σ, noise level) that the model restores."""
        return self._measurement

    def set_measurement(self, sigma: float, noise: float) -> None:
        """Set the model for measurements with a Gaussian blur of this σ and noise of this level.

        Args:
            sigma: in pixels, the same down and across.
            noise: standard deviation on [−1, 1].

        Raises:
            ValueError: either out of the model's range; the model stays as it was.
        """
        self.ranges.check(sigma, noise)
        self._measurement = float(sigma), float(noise)
        self.blur = GaussianBlur(self.blur.kernel_size, sigma, self.blur.padding_mode)
        self.regularizer.condition = condition(sigma, noise)

    def adapt_to(self, sigma: float | None, noise: float | None, config: ModelConfig, name: str) -> None:
        if sigma is None or noise is None:
            (s, t), (low, high) = self.ranges.sigma, self.ranges.noise
            raise ValueError(
                f"{name} is for a range of measurements; it takes sigma, from {s:g} to {t:g} pixels, and noise, "
                f"from {low:g} to {high:g}: sigma is {sigma} and noise is {noise}"
            )
        self.set_measurement(sigma, noise)

    def set_blur(self, blur: GaussianBlur, noise: float) -> None:
        self.set_measurement(blur.sigma[0], noise)
        super().set_blur(blur, noise)

    @torch.no_grad()
    def start(self, d: Tensor, *injected: Tensor) -> Tensor:
        """(1 + λ)P Aᵀd, which has the brightness of d; P Aᵀd would be darker for a large λ."""
        assert self.damping is not None
        return ((1 + self.damping) * super().start(d, *injected)).to(d.dtype)

    def trained_for(self) -> str:
        return f"a GaussianBlur of {self.blur.kernel_size} pixels with padding_mode={self.blur.padding_mode!r}"
