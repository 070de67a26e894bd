"""The networks of the paper: DnCNN with spectral normalisation, and the regulariser RED."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralNormConv2d(nn.Conv2d):
    """Conv2d with the weight W/σ(W), σ the largest singular value of W as an (out, in·k·k) matrix.

    σ = uᵀWv by power iteration (Miyato et al., 2018): one step a forward in train(), none in eval().
    Unlike torch's parametrisation it can be pickled, and `materialise` fixes the weight for a solve.
    Arguments as in torch.nn.Conv2d.
    """

    u: Tensor
    v: Tensor

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        matrix = self.weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(matrix.shape[1]), dim=0))
        self._materialised: Tensor | None = None
        for _ in range(15):
            self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """One step: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖."""
        matrix = self.weight.flatten(1)
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))

    def normalised_weight(self) -> Tensor:
        """W/σ(W), differentiable in W."""
        with torch.autocast(self.weight.device.type, enabled=False):
            u, v = self.u.clone(), self.v.clone()  # backward needs them unchanged by a later step
            return self.weight / torch.dot(u, self.weight.flatten(1) @ v)

    @torch.no_grad()
    def materialise(self) -> None:
        """Fix the weight as it is now, without gradients, until `release`."""
        self._materialised = self.normalised_weight()

    def release(self) -> None:
        """Undo `materialise`."""
        self._materialised = None

    def forward(self, x: Tensor) -> Tensor:
        if self._materialised is not None:
            return self._conv_forward(x, self._materialised, self.bias)
        if self.training:
            self.power_iteration()
        return self._conv_forward(x, self.normalised_weight(), self.bias)


class DnCNN(nn.Module):
    """The network of Zhang et al. (2017): convolution and ReLU, then (convolution, norm, ReLU), then convolution.

    The defaults are the paper's R: 17 layers of 3 × 3 with 64 features, without biases, each
    convolution spectrally normalised. Images (B, channels, H, W) of any size keep their shape.

    Args:
        channels: of the image, in and out.
        features: channels of the hidden layers.
        depth: convolutions, at least 2.
        norm: "batch" for batch norm after every convolution but the first and last, or None.
        spectral_norm: divide every convolution's weight by its largest singular value.
        bias: give the convolutions biases.
        residual: return x − network(x), a denoiser, in place of network(x).

    Raises:
        ValueError: a size below its least, or another norm.
    """

    def __init__(
        self,
        channels: int = 3,
        features: int = 64,
        depth: int = 17,
        norm: Literal["batch"] | None = "batch",
        spectral_norm: bool = True,
        bias: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("channels", channels, 1), ("features", features, 1), ("depth", depth, 2)):
            if value < least:
                raise ValueError(f"{name} is {value}; it takes an integer of at least {least}")
        if norm not in ("batch", None):
            raise ValueError(f"norm is {norm!r}; it takes 'batch' or None")
        convolution: Callable[..., nn.Conv2d] = SpectralNormConv2d if spectral_norm else nn.Conv2d
        layers: list[nn.Module] = [convolution(channels, features, 3, padding=1, bias=bias), nn.ReLU()]
        for _ in range(depth - 2):
            layers.append(convolution(features, features, 3, padding=1, bias=bias))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(features))
            layers.append(nn.ReLU())
        layers.append(convolution(features, channels, 3, padding=1, bias=bias))
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) to images of the same shape."""
        out: Tensor = self.layers(x)
        return x - out if self.residual else out


class Filter(Protocol):
    """What a filtered `RED` needs of the operator."""

    def filter(self, x: Tensor, damping: Tensor) -> Tensor: ...


class RED(nn.Module):
    """Regularisation by denoising (Romano, Elad, Milanfar, 2017): R(x) = λ(x − D(W x)).

    W is the identity, or, with ``filter_damping``, the Tikhonov filter AᵀA(AᵀA + δI)⁻¹ of the
    operator, so that the denoiser sees only what was measured.

    Args:
        denoiser: D, images (B, C, H, W) to images.
        weight: λ > 0, the start of a learnable parameter.
        filter_damping: δ: None for no filter, a number > 0 for the start of a learnable parameter of
            its own, or "weight" for δ = λ.

    Raises:
        ValueError: λ or δ not positive and finite; another string.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        weight: float = 0.05,
        filter_damping: float | Literal["weight"] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.log_weight = log_parameter("weight", weight)
        self.filtered = filter_damping is not None
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

    def forward(self, x: Tensor, operator: Filter | None = None) -> Tensor:
        """R(x) for images (B, C, H, W).

        Raises:
            ValueError: filtered, and ``operator`` has no ``filter``.
        """
        seen = x
        if (damping := self.filter_damping) is not None:
            if operator is None or not callable(getattr(operator, "filter", None)):
                raise ValueError(
                    f"operator is {type(operator).__name__}; a filtered RED takes one with a method filter(x, damping)"
                )
            seen = operator.filter(x, damping)
        return (self.weight * (x - self.denoiser(seen))).to(x.dtype)


def log_parameter(name: str, value: float) -> nn.Parameter:
    """A learnable log(value), which keeps the value positive; raises ValueError naming ``name``."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it takes a positive number")
    return nn.Parameter(torch.tensor(math.log(value)))
