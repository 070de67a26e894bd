"""Networks that keep the image's resolution: DnCNN, and a denoiser that is nonexpansive by construction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jfbfast import checks
from jfbfast.models import registry
from jfbfast.models.lipschitz import MaxMin, NonexpansiveConv2d, SpectralNormConv2d
from jfbfast.models.sharing import Shared

_CONVOLUTIONS: dict[bool | str, Callable[..., nn.Conv2d]] = {
    False: nn.Conv2d,
    True: SpectralNormConv2d,
    "conv": NonexpansiveConv2d,
}
_FIRST_SCALE = 0.1  # of the last batch norm, with identity_start


def freeze_statistics(module: nn.Module) -> None:
    """Keep the running statistics of every batch norm in ``module`` as they are from now on, also in train().

    Call it on a pretrained network before it is trained as a layer of a solve, which normalises by these statistics.
    If they were updated at the fixed points, the layer would change with the points that it determines: where R
    removes noise, the variances fall, so that its gain rises, until the iteration diverges (docs/paper.md). Scale and
    shift are trained on. It sets ``momentum`` to 0; a plain forward in train() normalises by the batch as before.

    Raises:
        ValueError: no batch norm with running statistics.

    Example:
        >>> import torch, jfbfast
        >>> network = jfbfast.DnCNN(channels=1, features=4, depth=3)
        >>> jfbfast.freeze_statistics(network)
        >>> _ = network.train()(torch.rand(2, 1, 8, 8))
        >>> network.layers[3].running_var
        tensor([1., 1., 1., 1.])
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError(f"module is a {type(module).__name__} without running statistics; it takes batch norms")
    for norm in norms:
        norm.momentum = 0.0


@registry.network
class DnCNN(Shared, nn.Module):
    """The network of Zhang et al. (2017): convolution and ReLU, then (convolution, norm, ReLU), then convolution.

    The defaults give R of Liu, Tong and Zhao (2024): 17 layers of 3 × 3 with 64 features, without biases, each
    convolution spectrally normalised. Images (B, channels, H, W) of any size keep their shape.

    Args:
        channels: of the image, in and out.
        features: channels of the hidden layers.
        depth: number of convolutions, at least 2.
        norm: "batch" for batch norm after every convolution but the first and last, or None.
        spectral_norm: True as in the paper: every weight is divided by its largest singular value as an
            (out, in·k·k) matrix, which can be a third of the convolution's own norm. "conv": it is divided by a
            bound on that norm, so that with norm=None the network is 1-Lipschitz and x − network(x) 2-Lipschitz.
            False: it is not divided.
        bias: give the convolutions biases.
        residual: return x − network(x) instead of network(x); this makes the module a denoiser.
        identity_start: start the hidden convolutions near the identity (the usual random weights plus a Dirac
            kernel; Zagoruyko and Komodakis, 2017), and the last batch norm at the scale 0.1, so that the output is
            small. The 17 layers with batch norm then learn to denoise in a few hundred steps; otherwise they return
            almost 0 for as long.

    Raises:
        ValueError: a size below its least, another norm or another spectral norm.

    Example:
        >>> import torch, jfbfast
        >>> denoiser = jfbfast.DnCNN(channels=1, features=8, depth=4, norm=None, residual=True)
        >>> denoiser(torch.rand(2, 1, 12, 10)).shape
        torch.Size([2, 1, 12, 10])
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
        identity_start: bool = False,
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
        if identity_start:
            self._start_near_the_identity()

    @torch.no_grad()
    def _start_near_the_identity(self) -> None:
        for module in self.layers[2:-1]:
            if isinstance(module, nn.Conv2d):
                module.weight += nn.init.dirac_(torch.empty_like(module.weight))
            if isinstance(module, SpectralNormConv2d):
                module.converge()
        norms = [module for module in self.layers if isinstance(module, nn.BatchNorm2d)]
        for norm in norms[-1:]:
            nn.init.constant_(norm.weight, _FIRST_SCALE)

    @property
    def is_denoiser(self) -> bool:
        """Whether it is a denoiser D, to be wrapped in a `RED`, and not a regulariser R."""
        return self.residual

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, channels, H, W) to images of the same shape; raises ValueError for another shape."""
        checks.images("x", x.shape, self.channels)
        out: Tensor = self.layers(x.contiguous(memory_format=torch.channels_last))
        return x - out if self.residual else out


@registry.network
class NonexpansiveDenoiser(Shared, nn.Module):
    """D = (1 − α)x + αN(x) with Lip(N) ≤ 1, so that ‖D(x) − D(y)‖ ≤ ‖x − y‖ for images of every size.

    N is a chain of 3 × 3 `NonexpansiveConv2d` with `MaxMin` between them. D is α-averaged, and at α = ½ firmly
    nonexpansive, as a proximal map is (Pesquet et al., 2021). In the filtered layer with δ = λ the iteration of
    y = D(Wx) then contracts by ¼. The bound costs quality: if a contraction by ½ is enough, the 2-Lipschitz
    ``DnCNN(norm=None, spectral_norm="conv", residual=True)`` denoises better.

    Args:
        channels: of the image, in and out.
        features: channels of the hidden layers, an even number.
        depth: number of convolutions, at least 2.
        bias: give the convolutions biases.
        averaging: α in (0, 1].

    Raises:
        ValueError: a size below its least, odd features, or α out of its range.

    Example:
        >>> import torch, jfbfast
        >>> denoiser = jfbfast.NonexpansiveDenoiser(channels=1, features=4, depth=3)
        >>> x, y = torch.rand(2, 1, 1, 9, 9)
        >>> bool((denoiser(x) - denoiser(y)).norm() <= (x - y).norm())
        True
    """

    is_denoiser = True

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
        layers: list[nn.Module] = []
        for width in (channels, *[features] * (depth - 2)):
            layers += [NonexpansiveConv2d(width, features, 3, padding=1, bias=bias), MaxMin()]
        layers.append(NonexpansiveConv2d(features, channels, 3, padding=1, bias=bias))
        self.layers = nn.Sequential(*layers)
        self.channels = channels
        self.averaging = averaging

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, channels, H, W) to images of the same shape; raises ValueError for another shape."""
        checks.images("x", x.shape, self.channels)
        return torch.lerp(x, self.layers(x).to(x.dtype), self.averaging)
