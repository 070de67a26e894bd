"""One network for every known blur and noise level: its denoiser is told what the measurement keeps of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.models import registry
from jfbfast.models.config import ModelConfig
from jfbfast.models.degrad import DEGrad
from jfbfast.models.red import RED
from jfbfast.operators.blur import GaussianBlur, SeparableBlur
from jfbfast.operators.convolution import Blur
from jfbfast.operators.eigenbasis import eigenbasis

KnownBlur = SeparableBlur | Blur

CONDITIONS = 3  # numbers that `describe` returns
_FREQUENCIES = 64  # per axis, of the grid that spectra are averaged over
_NYQUIST_POWER = 1e-3  # S at half a cycle per pixel, of images in [−1, 1]
_REFERENCE_NOISE, _NOISE_FLOOR, _REFERENCE_ERROR = 0.01, 5e-4, 1e-3
_SHARES = (1.0, 1 / 16, 1 / 256)  # dampings of the restorations in z, relative to λ


def injected_channels(channels: int) -> int:
    """How many channels the denoiser sees besides those of W x: x, the restorations and the map AᵀA1."""
    return (1 + len(_SHARES)) * channels + 1


def check_measurement(blur: Any, noise: float, noise_range: tuple[float, float]) -> None:
    """Raise TypeError for an operator that is no known blur, ValueError for a noise level out of the range."""
    if not isinstance(blur, KnownBlur):
        raise TypeError(f"blur is {type(blur).__name__}; it takes a SeparableBlur or a Blur")
    low, high = noise_range
    checks.number("noise", noise, lambda n: low <= n <= high, f"a number from {low:g} to {high:g}")


def power_spectrum(blur: KnownBlur) -> Tensor:
    """|a|² of a blur at 64 × 64 frequencies, from 0 in steps of 1/64 cycles per pixel; float64."""
    if isinstance(blur, SeparableBlur):
        psf = torch.outer(*(torch.tensor(taps, dtype=torch.float64) for taps in (blur.taps.y, blur.taps.x)))
    else:
        psf = blur.psf
    wrapped = torch.zeros(_FREQUENCIES, _FREQUENCIES, dtype=torch.float64)
    y, x = (torch.arange(n) % _FREQUENCIES for n in psf.shape)
    wrapped.index_put_((y[:, None], x), psf, accumulate=True)
    return torch.fft.fft2(wrapped).abs().square()


def describe(power: Tensor, noise: float | Tensor) -> Tensor:
    """The numbers that tell a network what a measurement keeps of an image: c₁, c₂ and c₃.

    Wiener's filter keeps the share w = |a|²S / (|a|²S + ν²) of a frequency, where S is the mean power of photographs,
    proportional to 1/f² (Field, 1987). With means over all frequencies,

        c₁ = log ν / 0.01,    c₂ = ½ log mean w,    c₃ = ¼ log (mean S(1 − w) / 10⁻³).

    c₂ tells how much of the spectrum the filter keeps, and c₃ its mean squared error. ν is raised by 5e-4.

    Args:
        power: |a|², (…, n, n), at the frequencies 0, 1/n, … of both axes.
        noise: the standard deviation ν ≥ 0 of the noise on [−1, 1], a number or a tensor (…).

    Returns:
        (…, 3), float32.

    Example:
        >>> import torch
        >>> from jfbfast import GaussianBlur
        >>> from jfbfast.models.universal import describe, power_spectrum
        >>> describe(power_spectrum(GaussianBlur(sigma=1.0)), 0.01)
        tensor([ 0.0000, -0.6566,  0.0221])
    """
    floored = torch.as_tensor(noise, dtype=power.dtype, device=power.device) + _NOISE_FLOOR
    n = power.shape[-1]
    f = torch.fft.fftfreq(n, dtype=power.dtype, device=power.device)
    squared = (f[:, None].square() + f.square()).clamp_min((0.5 / n) ** 2)
    signal = _NYQUIST_POWER * 0.5**2 / squared
    kept = power * signal / (power * signal + floored[..., None, None] ** 2)
    return torch.stack(
        [
            (floored / (_REFERENCE_NOISE + _NOISE_FLOOR)).log().expand(power.shape[:-2]),
            0.5 * kept.mean((-2, -1)).clamp_min(1e-6).log(),
            0.25 * ((signal * (1 - kept)).mean((-2, -1)) / _REFERENCE_ERROR).log(),
        ],
        dim=-1,
    ).float()


class UniversalRED(RED):
    """R(x; d) = λ(x − D((1 + δ)W x, x, z; c)), with λ and δ that depend on what the measurement keeps, c = `describe`.

        λ = λ₀ exp ⟨a, c⟩,  δ = δ₀ exp ⟨b, c⟩,  W = AᵀA(AᵀA + δI)⁻¹.

    Where AᵀA ≈ 1, x* keeps a share 1/(1 + λ) of the noise, so λ has to grow with the noise: a₁ starts at 2, since
    Wiener's filter takes the ratio of noise power to signal power; b₁ starts at 1. z has four parts: Tikhonov's
    restorations (1 + μ)(AᵀA + μI)⁻¹Aᵀd for μ = λ, λ/16 and λ/256, whose differences show what was measured well or
    badly; and AᵀA1, which tells D how much of a pixel was measured (less at an edge with unknown surroundings). The
    factors 1 + δ and 1 + μ keep the brightness of what D sees.

    Args:
        denoiser: D, called with images (B, C, H, W), x and z together (B, 4C + 1, H, W), and
            ``condition=(c₁, c₂, c₃)``, such as ``UNet(conditions=3, injection=13)``.
        weight: λ₀ = δ₀ > 0, the start of two learnable parameters. The exponents a and b are learnable too.

    Attributes:
        condition: c, of shape (3,), or (B, 3) for measurements that differ within a batch.
    """

    condition: Tensor

    def __init__(self, denoiser: nn.Module, weight: float = 0.05) -> None:
        super().__init__(denoiser, weight, weight, injection=getattr(denoiser, "injection", True))
        self.weight_exponents = nn.Parameter(torch.tensor([2.0, 0.0, 0.0]))
        self.filter_damping_exponents = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))
        self.register_buffer("condition", torch.zeros(CONDITIONS), persistent=False)

    def _scale(self, log_start: Tensor, exponents: Tensor) -> Tensor:
        scale = (log_start + self.condition @ exponents).exp()
        return scale.view(-1, 1, 1, 1) if scale.dim() else scale

    @property
    def weight(self) -> Tensor:
        """λ, a tensor of shape (), or (B, 1, 1, 1)."""
        return self._scale(self.log_weight, self.weight_exponents)

    @property
    def filter_damping(self) -> Tensor:
        """δ, a tensor of shape (), or (B, 1, 1, 1)."""
        assert self.log_filter_damping is not None
        return self._scale(self.log_filter_damping, self.filter_damping_exponents)

    def injected(self, operator: Any, d: Tensor | None) -> tuple[Tensor, ...]:
        """(z,)."""
        if d is None:
            raise ValueError("d is None; a RED with injection takes the measurements")
        b, basis = operator.adjoint(d), eigenbasis(operator, d)
        weight = self.weight
        dampings = [share * weight for share in _SHARES]
        if basis is None:
            solved = [operator.solve(b, damping) for damping in dampings]
        else:
            coefficients, squares = basis.coefficients(b), basis.eigenvalues(b)
            solved = [basis.image(coefficients / (squares + damping.to(squares.dtype))) for damping in dampings]
        restored = [(1 + damping) * image for damping, image in zip(dampings, solved, strict=True)]
        measured = operator.normal(torch.ones_like(b[:, :1]))
        return (torch.cat([*restored, measured], 1).to(d.dtype),)

    def restoration(self, z: Tensor, weight: Tensor) -> Tensor:
        """P Aᵀd, the first restoration in z without its factor 1 + λ."""
        return z[:, : z.shape[1] // len(_SHARES)] / (1 + weight)

    def seen(self, x: Tensor, operator: Any) -> Tensor:
        """(1 + δ)W x."""
        return ((1 + self.filter_damping) * super().seen(x, operator)).to(x.dtype)

    def seen_factors(self, eigenvalues: Tensor) -> Tensor:
        """(1 + δ)s/(s + δ)."""
        damping = self.filter_damping
        return (1 + damping) * eigenvalues / (eigenvalues + damping)

    def denoise(self, seen: Tensor, x: Tensor, *injected: Tensor) -> Tensor:
        """D(seen, x, z; c)."""
        return self.denoiser(seen, torch.cat([x, *injected], 1), condition=self.condition.unbind(-1))


@registry.model("universal")
class UniversalDEGrad(DEGrad):
    """A filtered `DEGrad` for every known blur and noise level, set for one of them at a time.

    Args:
        denoiser: D of `UniversalRED`.
        blur, noise: the first measurement, as in `set_measurement`; None for a Gaussian of σ = 1 pixel.
        noise_range: the least and the largest noise level that `set_measurement` takes.
        weight: of `UniversalRED`.
        options: averaging, solver, gradient, solve_dtype, compile_solve and cuda_graph of `DEGrad`.

    Raises:
        ValueError: a value out of its range.
        TypeError: a blur that is neither a `SeparableBlur` nor a `Blur`.

    Example:
        >>> import torch, jfbfast
        >>> denoiser = jfbfast.UNet(3, features=(4, 8), blocks=(1, 1), conditions=3, injection=13)
        >>> model = jfbfast.UniversalDEGrad(denoiser)
        >>> blur = jfbfast.Blur(jfbfast.point_spread.motion(length=5, angle=30), padding_mode="circular")
        >>> model.set_measurement(blur, noise=0.02)
        >>> model(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
    """

    regularizer: UniversalRED

    def __init__(
        self,
        denoiser: nn.Module,
        blur: KnownBlur | None = None,
        noise: float = _REFERENCE_NOISE,
        *,
        noise_range: Sequence[float] = (0.0, 0.1),
        weight: float = 0.05,
        **options: Any,
    ) -> None:
        blur = blur or GaussianBlur(sigma=1.0, padding_mode="valid")
        super().__init__(blur, UniversalRED(denoiser, weight), preconditioner="exact", **options)
        self.noise_range = (float(noise_range[0]), float(noise_range[1]))
        self.set_measurement(blur, noise)

    @classmethod
    def from_config(cls, config: ModelConfig, network: nn.Module) -> UniversalDEGrad:
        channels = injected_channels(config.channels)
        if (getattr(network, "conditions", 0), getattr(network, "injection", 0)) != (CONDITIONS, channels):
            raise ValueError(
                f"denoiser is {dict(config.denoiser)}; the universal form takes a UNet with "
                f"conditions={CONDITIONS} and injection={channels}"
            )
        noise_range = config.noise_range or (0.0, 0.1)
        options = config.degrad_options()
        return cls(network, config.blur(), config.noise, noise_range=noise_range, weight=config.weight, **options)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "denoiser": self.regularizer.denoiser, "noise": self.noise}

    @property
    def noise(self) -> float:
        """The noise level that the model is set for."""
        return self._noise

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
        condition = describe(power_spectrum(blur), noise)
        self.blur, self._noise = blur, float(noise)
        self.regularizer.condition = condition.to(self.regularizer.condition)

    def with_operator(self, operator: Any) -> UniversalDEGrad:
        """This model for another `SeparableBlur` or `Blur` and the same noise level; it shares the weights."""
        model = super().with_operator(operator)
        regularizer = object.__new__(type(self.regularizer))
        regularizer.__dict__ = {**self.regularizer.__dict__, "_buffers": dict(self.regularizer._buffers)}
        model.regularizer = regularizer
        model.set_measurement(operator, self.noise)
        return model

    @torch.no_grad()
    def start(self, d: Tensor, *injected: Tensor) -> Tensor:
        """The first restoration in z, (1 + λ)P Aᵀd; P Aᵀd would be darker for a large λ."""
        z = (injected or self.injected(d))[0]
        return z[:, : d.shape[1]].detach()

    def trained_for(self) -> str:
        return "any known blur"
