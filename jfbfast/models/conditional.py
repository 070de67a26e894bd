"""One network for a range of blurs and noise levels: they are an input of its denoiser, and set λ and δ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jfbfast.models.degrad import DEGrad
from jfbfast.models.denoisers import RED
from jfbfast.operators.blur import GaussianBlur

REFERENCE_SIGMA, REFERENCE_NOISE = 1.0, 0.01
NOISE_FLOOR = 1e-4  # λ ends at 1e-4 of its value at 0.01: without noise Tikhonov's best is about 2e-6
CONDITIONS = 2


def condition(sigma: float, noise: float) -> tuple[float, float]:
    """What the network is told of σ in pixels and the noise level ν: (log σ, log (ν + ν₀)/(0.01 + ν₀)), ν₀ = 1e-4.

    It is 0 at σ = 1 and ν = 0.01.
    """
    return (
        math.log(sigma / REFERENCE_SIGMA),
        math.log((noise + NOISE_FLOOR) / (REFERENCE_NOISE + NOISE_FLOOR)),
    )


@dataclass(frozen=True)
class MeasurementRanges:
    """The measurements that a network is for.

    Attributes:
        sigma: the least and the largest σ of the blur, in pixels.
        noise: the least and the largest standard deviation ν of the noise, on [−1, 1].

    Raises:
        ValueError: not two numbers in order; σ not positive, or ν negative.
    """

    sigma: tuple[float, float] = (0.5, 5.0)
    noise: tuple[float, float] = (0.0, 0.1)

    def __post_init__(self) -> None:
        for name, values, valid in (
            ("sigma_range", self.sigma, lambda low: low > 0),
            ("noise_range", self.noise, lambda low: low >= 0),
        ):
            if not isinstance(values, Sequence):
                raise ValueError(f"{name} is {values}; it takes two numbers")
            if len(values) != 2 or not valid(values[0]) or not values[0] <= values[1] < math.inf:
                least = "positive" if name == "sigma_range" else "non-negative"
                raise ValueError(f"{name} is {tuple(values)}; it takes two {least} numbers, the lesser first")

    def __contains__(self, setting: tuple[float, float]) -> bool:
        """Whether (σ, ν) is within both."""
        return all(low <= value <= high for value, (low, high) in zip(setting, (self.sigma, self.noise), strict=True))

    def check(self, sigma: float, noise: float) -> None:
        """Raise ValueError, naming the range, unless both are within theirs."""
        for name, value, (low, high) in (("sigma", sigma, self.sigma), ("noise", noise, self.noise)):
            if not (isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high):
                raise ValueError(f"{name} is {value}; this model takes a number from {low:g} to {high:g}")

    def draw(self, generator: np.random.Generator) -> tuple[float, float]:
        """A random setting (σ, ν): log σ uniform, and √ν, so that weak noise is not rare."""
        sigma, noise = (float(u) for u in generator.random(2))
        return self._at(sigma, noise)

    def grid(self) -> list[tuple[float, float]]:
        """The middle and the four corners."""
        return [self._at(0.5, 0.5), *(self._at(*corner) for corner in product((0.0, 1.0), repeat=2))]

    def _at(self, sigma: float, noise: float) -> tuple[float, float]:
        """The setting at two shares in [0, 1] of the way along the ranges of log σ and √ν."""
        (s, t), (low, high) = map(math.log, self.sigma), map(math.sqrt, self.noise)
        found = math.exp(s + sigma * (t - s)), (low + noise * (high - low)) ** 2
        return min(max(found[0], self.sigma[0]), self.sigma[1]), min(max(found[1], self.noise[0]), self.noise[1])


class ConditionalRED(RED):
    """R(x) = λ(x − D((1 + δ)W x; c)), whose λ and δ depend on the condition c = (c₁, c₂) of σ and the noise level.

    Where D takes an injection it is D((1 + δ)W x, (1 + λ)z; c), z as in `RED`.

        λ = λ₀ exp(a₁c₁ + a₂c₂),  δ = δ₀ exp(b₁c₁ + b₂c₂),  W = AᵀA(AᵀA + δI)⁻¹.

    Where AᵀA ≈ 1, x* keeps a share 1/(1 + λ) of the noise, so λ has to grow with it: a₂ starts at 2, as the
    ratio of noise to signal power that Wiener's filter takes; b₂ at 1. The factors 1 + δ and 1 + λ keep the
    brightness of what D sees: W has the gain 1/(1 + δ) there, and z 1/(1 + λ).

    Args:
        denoiser: D, called with the images (B, C, H, W) and ``condition=c``.
        weight: λ₀ > 0, the start of a learnable parameter, and of δ₀. So are the exponents learnable.

    Attributes:
        condition: c, `condition` of jfbfast.models.conditional.
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

    def denoise(self, seen: Tensor, *injected: Tensor) -> Tensor:
        """D((1 + δ) · seen; c), or D((1 + δ) · seen, (1 + λ) · z; c)."""
        scaled = ((1 + self.filter_damping) * seen, *((1 + self.weight) * z for z in injected))
        denoised: Tensor = self.denoiser(*scaled, condition=self.condition)
        return denoised


class ConditionalDEGrad(DEGrad):
    """A filtered `DEGrad` for every Gaussian blur and noise level within its ranges; one setting at a time.

        model = DEGrad.from_pretrained("gaussian5", sigma=2.0, noise=0.03)
        restored = model(d)
        model.set_measurement(sigma=0.7, noise=0.0)

    Args:
        denoiser: D of `ConditionalRED`, such as ``UNet(conditions=2)``.
        kernel_size, padding_mode: of the `GaussianBlur`.
        ranges: of σ and the noise level.
        sigma, noise: the first setting.
        weight: of `ConditionalRED`.
        options: averaging, solver, gradient, solve_dtype and compile_solve of `DEGrad`.

    Raises:
        ValueError: a value out of its range.
    """

    regularizer: ConditionalRED

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        kernel_size: int = 5,
        padding_mode: str = "zeros",
        ranges: MeasurementRanges = MeasurementRanges(),
        sigma: float = REFERENCE_SIGMA,
        noise: float = REFERENCE_NOISE,
        weight: float = 0.05,
        **options: Any,
    ) -> None:
        ranges.check(sigma, noise)
        blur = GaussianBlur(kernel_size, sigma, padding_mode)
        super().__init__(blur, ConditionalRED(denoiser, weight), preconditioner="exact", **options)
        self.ranges = ranges
        self.set_measurement(sigma, noise)

    @property
    def measurement(self) -> tuple[float, float]:
        """(σ, noise level) that the model is set for."""
        return self._measurement

    def set_measurement(self, sigma: float, noise: float) -> None:
        """Set the model for measurements with a Gaussian blur of this σ and noise of this level.

        Args:
            sigma: in pixels, the same down and across.
            noise: standard deviation on [−1, 1].

        Raises:
            ValueError: either out of the model's range.
        """
        self.ranges.check(sigma, noise)
        self._measurement = float(sigma), float(noise)
        self.blur = GaussianBlur(self.blur.kernel_size, sigma, self.blur.padding_mode)
        self.regularizer.condition = condition(sigma, noise)

    @torch.no_grad()
    def start(self, d: Tensor) -> Tensor:
        """(1 + λ)P Aᵀd: P Aᵀd at d's brightness, which a large λ takes from it."""
        assert self.damping is not None
        return ((1 + self.damping) * super().start(d)).to(d.dtype)

    def _trained_for(self) -> str:
        return f"a GaussianBlur of {self.blur.kernel_size} pixels with padding_mode={self.blur.padding_mode!r}"
