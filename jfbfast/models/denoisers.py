"""Denoisers that keep the image's resolution, and the regulariser RED that is made of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.models.lipschitz import MaxMin, NonexpansiveConv2d, SpectralNormConv2d

_CONVOLUTIONS: dict[bool | str, Callable[..., nn.Conv2d]] = {
    False: nn.Conv2d,
    True: SpectralNormConv2d,
    "conv": NonexpansiveConv2d,
}


class DnCNN(nn.Module):
    """The network of Zhang et al. (2017): convolution and ReLU, then (convolution, norm, ReLU), then convolution.

    The defaults are the paper's R: 17 layers of 3 × 3 with 64 features, without biases, each
    convolution spectrally normalised. Images (B, channels, H, W) of any size keep their shape.

    Args:
        channels: of the image, in and out.
        features: channels of the hidden layers.
        depth: convolutions, at least 2.
        norm: "batch" for batch norm after every convolution but the first and last, or None.
        spectral_norm: True for the paper's, every weight divided by its largest singular value as an
            (out, in·k·k) matrix, up to 3 below the convolution's own norm; "conv" divides by a bound on that
            norm, so that a network with norm=None is 1-Lipschitz, x − network(x) 2-Lipschitz; or False.
        bias: give the convolutions biases.
        residual: return x − network(x), a denoiser, in place of network(x).

    Raises:
        ValueError: a size below its least, another norm or another spectral norm.
    """

    def __init__(
        self,
        channels: int = 3,
        features: int = 64,
        depth: int = 17,
        norm: Literal["batch"] | None = "batch",
        spectral_norm: bool | Literal["conv"] = True,
        bias: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("channels", channels, 1), ("features", features, 1), ("depth", depth, 2)):
            checks.integer(name, value, least)
        if norm not in ("batch", None):
            raise ValueError(f"norm is {norm!r}; it takes 'batch' or None")
        if not isinstance(spectral_norm, (bool, str)) or spectral_norm not in _CONVOLUTIONS:
            raise ValueError(f"spectral_norm is {spectral_norm!r}; it takes True, False or 'conv'")
        convolution = _CONVOLUTIONS[spectral_norm]
        layers: list[nn.Module] = [convolution(channels, features, 3, padding=1, bias=bias), nn.ReLU()]
        for _ in range(depth - 2):
            layers.append(convolution(features, features, 3, padding=1, bias=bias))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(features))
            layers.append(nn.ReLU())
        layers.append(convolution(features, channels, 3, padding=1, bias=bias))
        self.layers = nn.Sequential(*layers)
        self.channels = channels
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) to images of the same shape; raises ValueError for others."""
        checks.images("x", x.shape, self.channels)
        out: Tensor = self.layers(x.contiguous(memory_format=torch.channels_last))
        return x - out if self.residual else out


class NonexpansiveDenoiser(nn.Module):
    """D = (1 − α)x + αN(x) with Lip(N) ≤ 1, so that ‖D(x) − D(y)‖ ≤ ‖x − y‖ for images of every size.

    N is a chain of 3 × 3 `NonexpansiveConv2d` with `MaxMin` between them. D is α-averaged, and firmly
    nonexpansive at α = ½, as a proximal map is (Pesquet et al., 2021). In the filtered layer with δ = λ
    it makes the iteration of y = D(Wx) a contraction by ¼. The bound costs quality: where a contraction
    by ½ will do, the 2-Lipschitz ``DnCNN(norm=None, spectral_norm="conv", residual=True)`` denoises better.

    Args:
        channels: of the image, in and out.
        features: channels of the hidden layers, an even number.
        depth: convolutions, at least 2.
        bias: give the convolutions biases.
        averaging: α in (0, 1].

    Raises:
        ValueError: a size below its least, odd features, or α out of its range.
    """

    def __init__(
        self,
        channels: int = 3,
        features: int = 64,
        depth: int = 8,
        bias: bool = True,
        averaging: float = 0.5,
    ) -> None:
        super().__init__()
        for name, value, least in (("channels", channels, 1), ("features", features, 2), ("depth", depth, 2)):
            checks.integer(name, value, least)
        if features % 2:
            raise ValueError(f"features is {features}; it takes an even number")
        checks.share("averaging", averaging)
        widths = (channels, *[features] * (depth - 1))
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [NonexpansiveConv2d(width, features, 3, padding=1, bias=bias), MaxMin()]
        layers.append(NonexpansiveConv2d(features, channels, 3, padding=1, bias=bias))
        self.layers = nn.Sequential(*layers)
        self.channels = channels
        self.averaging = averaging

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) to images of the same shape; raises ValueError for others."""
        checks.images("x", x.shape, self.channels)
        return torch.lerp(x, self.layers(x).to(x.dtype), self.averaging)


class RED(nn.Module):
    """Regularisation by denoising (Romano, Elad, Milanfar, 2017): R(x) = λ(x − D(W x)), or R(x; d) = λ(x − D(W x, z)).

    W is the identity, or, with ``filter_damping``, the Tikhonov filter AᵀA(AᵀA + δI)⁻¹ of the
    operator, so that the denoiser sees only what was measured. With ``injection`` it sees
    z = (AᵀA + λI)⁻¹Aᵀd too, Tikhonov's restoration of the measurement.

    Args:
        denoiser: D, images (B, C, H, W) to images; with ``injection``, two of them.
        weight: λ > 0, the start of a learnable parameter.
        filter_damping: δ: None for no filter, a number > 0 for the start of a learnable parameter of
            its own, or "weight" for δ = λ.
        injection: give D the measurement, as a deep equilibrium model has its input injected at every evaluation
            (Bai, Kolter, Koltun, 2019); None: where D has an attribute ``injection`` that says so.

    Raises:
        ValueError: λ or δ not positive and finite; another string; another ``injection`` than D's own.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        weight: float = 0.05,
        filter_damping: float | Literal["weight"] | None = None,
        injection: bool | None = None,
    ) -> None:
        super().__init__()
        own = getattr(denoiser, "injection", injection)
        if injection not in (None, own):
            raise ValueError(f"injection is {injection}; it takes that of the {type(denoiser).__name__}, {own}")
        self.denoiser = denoiser
        self.log_weight = log_parameter("weight", weight)
        self.filtered = filter_damping is not None
        self.injection = bool(own)
        self.log_filter_damping: nn.Parameter | None = None
        if isinstance(filter_damping, str):
            if filter_damping != "weight":
                raise ValueError(f"filter_damping is {filter_damping!r}; it takes None, a positive number or 'weight'")
        elif filter_damping is not None:
            self.log_filter_damping = log_parameter("filter_damping", filter_damping)

    @property
    def weight(self) -> Tensor:
        """λ, a tensor of shape ()."""
        return self.log_weight.exp()

    @property
    def filter_damping(self) -> Tensor | None:
        """δ, a tensor of shape (), or None without a filter."""
        if not self.filtered:
            return None
        return self.weight if self.log_filter_damping is None else self.log_filter_damping.exp()

    @property
    def needs(self) -> tuple[str, ...]:
        """The methods of the operator that R calls."""
        return ("filter",) * self.filtered + ("adjoint", "solve") * self.injection

    def forward(self, x: Tensor, operator: Any = None, d: Tensor | None = None) -> Tensor:
        """R(x), or R(x; d), for images (B, C, H, W).

        Args:
            x: the images.
            operator: A, where R has a filter or an injection.
            d: the measurements, where it has an injection.

        Raises:
            ValueError: ``operator`` without a method that it ``needs``; an injection without d; a denoiser that
                changes the shape.
        """
        if not all(callable(getattr(operator, method, None)) for method in self.needs):
            raise ValueError(f"operator is {type(operator).__name__}; this RED takes one with {', '.join(self.needs)}")
        seen = x if self.filter_damping is None else operator.filter(x, self.filter_damping)
        denoised = self.denoise(seen, *self.injected(operator, d))
        if denoised.shape != x.shape:
            raise ValueError(
                f"denoiser maps shape {tuple(x.shape)} to {tuple(denoised.shape)}; it takes one that keeps the shape"
            )
        return (self.weight * (x - denoised)).to(x.dtype)

    def injected(self, operator: Any, d: Tensor | None) -> tuple[Tensor, ...]:
        """(z,), or () without an injection."""
        if not self.injection:
            return ()
        if d is None:
            raise ValueError("d is None; a RED with injection takes the measurements")
        return (operator.solve(operator.adjoint(d), self.weight),)

    def denoise(self, seen: Tensor, *injected: Tensor) -> Tensor:
        """D of what it sees: x or W x, and z where that is injected."""
        denoised: Tensor = self.denoiser(seen, *injected)
        return denoised


def log_parameter(name: str, value: float) -> nn.Parameter:
    """A learnable log(value), which keeps the value positive; raises ValueError naming ``name``."""
    checks.positive(name, value.item() if isinstance(value, Tensor) else value)
    return nn.Parameter(torch.tensor(math.log(value)))
