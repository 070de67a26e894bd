"""A residual U-Net as denoiser: most of its work is done at half resolution and below, where it is cheap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.implicit.prepared import residual
from jfbfast.models import registry
from jfbfast.models.sharing import Shared

Condition = Sequence[float | Tensor]


class ResidualBlock(nn.Module):
    """x + convolution(ReLU(convolution(x))), 3 × 3."""

    def __init__(self, features: int) -> None:
        super().__init__()
        last = nn.Conv2d(features, features, 3, padding=1)
        with torch.no_grad():  # so that a deep stack of them starts close to the identity
            last.weight *= 0.3
        self.layers = nn.Sequential(nn.Conv2d(features, features, 3, padding=1), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return residual(self.layers, x)


def _blocks(features: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(features) for _ in range(count)))


@registry.network
class UNet(Shared, nn.Module):
    """A denoiser x + network(x): residual blocks at 1/2, 1/4, … of the image's resolution, with skip connections.

    The layout is that of DRUNet (Zhang et al., 2021), below a pixel-unshuffle by two as in FFDNet (Zhang
    et al., 2018). Images (B, channels, H, W) of any size keep their shape. A scale with an odd side is padded with
    zeros beyond its edge before it is halved, as its convolutions pad it. For an image with an odd side the network
    runs twice, without the last pixel and without the first, and the results are blended along that side.

    Args:
        channels: of the image, in and out.
        features: channels at each scale, from half resolution down.
        blocks: residual blocks at each scale, on the way down and again on the way up; the coarsest scale has one pass.
        conditions: how many numbers it takes besides the images; each becomes a constant map, as FFDNet's noise level.
        injection: take a second image z, which a `RED` with injection supplies, and return x + network(x, z): True for
            a z like x, or the number of its channels.

    Raises:
        ValueError: a number below 1, no scale, ``blocks`` and ``features`` of different lengths, or an ``injection``
            that is neither a bool nor a positive integer.

    Example:
        >>> import torch, jfbfast
        >>> denoiser = jfbfast.UNet(channels=1, features=(4, 8), blocks=(1, 1), conditions=1)
        >>> denoiser(torch.rand(2, 1, 15, 12), condition=(0.1,)).shape
        torch.Size([2, 1, 15, 12])
    """

    is_denoiser = True

    def __init__(
        self,
        channels: int = 3,
        features: Sequence[int] = (64, 96, 128),
        blocks: Sequence[int] = (2, 2, 2),
        conditions: int = 0,
        injection: bool | int = False,
    ) -> None:
        super().__init__()
        for name, values in (("channels", (channels,)), ("features", features), ("blocks", blocks)):
            listed = isinstance(values, Sequence) and len(values) > 0
            if not listed or not all(checks.is_integer(value) and value >= 1 for value in values):
                raise ValueError(f"{name} is {values}; it takes integers of at least 1")
        if len(blocks) != len(features):
            raise ValueError(f"blocks is {tuple(blocks)}; it takes as many as features, {len(features)}")
        checks.integer("conditions", conditions, 0)
        if not isinstance(injection, bool):
            checks.integer("injection", injection, 1)
        *finer, coarsest = features
        self.channels = channels
        self.conditions = conditions
        self.injection = injection
        self.injected_channels = channels * injection if isinstance(injection, bool) else injection
        self.head = nn.Conv2d(4 * (channels + self.injected_channels) + conditions, features[0], 3, padding=1)
        self.encoders = nn.ModuleList(map(_blocks, finer, blocks))
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairwise(features))
        self.middle = _blocks(coarsest, blocks[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairwise(features))
        self.decoders = nn.ModuleList(map(_blocks, finer, blocks))
        self.tail = nn.Conv2d(features[0], 4 * channels, 3, padding=1)
        with torch.no_grad():  # so that it starts close to the identity
            self.tail.weight *= 0.1

    def forward(self, x: Tensor, z: Tensor | None = None, condition: Condition = ()) -> Tensor:
        """Map images x (B, channels, H, W), with ``injection`` and z of the same size, to images of the shape of x.

        Args:
            x, z: the images.
            condition: the numbers, each the same for all samples, or a tensor (B,).

        Raises:
            ValueError: images of another shape; a ``condition`` of a length other than ``conditions``; z without
                ``injection``, or no z with it.
        """
        checks.images("x", x.shape, self.channels)
        if bool(self.injection) != (z is not None):
            told = "a second image" if self.injection else "None"
            raise ValueError(f"z is {'None' if z is None else 'an image'}; this network takes {told}")
        if z is not None and z.shape != (expected := (x.shape[0], self.injected_channels, *x.shape[-2:])):
            raise ValueError(f"z has shape {tuple(z.shape)}; with x of shape {tuple(x.shape)} it takes {expected}")
        if len(condition) != self.conditions:
            raise ValueError(f"condition is {tuple(condition)}; this network takes {self.conditions} numbers")
        if not x.numel():  # torch's pixel_unshuffle keeps the shape of an empty batch
            return x
        return x + self._network(x if z is None else torch.cat([x, z], 1), condition)

    def _network(self, seen: Tensor, condition: Condition) -> Tensor:
        """network(x, z) for x and z concatenated along the channels."""
        for dim in (-2, -1):
            if seen.shape[dim] % 2:
                return self._blended(seen, dim, condition)
        h = F.pixel_unshuffle(seen, 2)
        h = torch.cat([h, *(_constant_map(value, h) for value in condition)], 1)
        h = self.head(h.contiguous(memory_format=torch.channels_last))
        skips = []
        for encoder, down in zip(self.encoders, self.down, strict=True):
            skips.append(encoder(h))
            h = down(_even(skips[-1]))
        h = self.middle(h)
        for up, decoder, skip in zip(self.up[::-1], self.decoders[::-1], skips[::-1], strict=True):
            h = decoder(up(h)[..., : skip.shape[-2], : skip.shape[-1]] + skip)
        return F.pixel_shuffle(self.tail(h), 2)

    def _blended(self, seen: Tensor, dim: int, condition: Condition) -> Tensor:
        """Blend the network's outputs without the last and without the first pixel of an odd side of n pixels.

        The weights at pixel i are 1 − i/(n − 1) and i/(n − 1). So no cell of 2 × 2 pixels reaches over an edge.
        """
        n = seen.shape[dim]
        if n == 1:
            return self._network(seen.repeat_interleave(2, dim), condition).narrow(dim, 0, 1)
        first, last = self._network(torch.cat([seen.narrow(dim, start, n - 1) for start in (0, 1)]), condition).chunk(2)
        share = torch.linspace(0, 1, n, dtype=seen.dtype, device=seen.device).view(-1, *[1] * (-1 - dim))
        beyond = torch.zeros_like(first.narrow(dim, 0, 1))
        return torch.lerp(torch.cat([first, beyond], dim), torch.cat([beyond, last], dim), share.to(first.dtype))

    def widened_head(self, other: UNet) -> Tensor:
        """The weight of the other's first convolution, with zero weights for this one's extra images and numbers.

        Raises:
            RuntimeError: the other network takes more images or numbers than this one.
        """
        own, images = self.head.in_channels - self.conditions, other.head.in_channels - other.conditions
        if images > own or other.conditions > self.conditions:
            raise RuntimeError(
                f"the network takes {images} channels and {other.conditions} numbers; this one takes "
                f"{own} and {self.conditions} at most"
            )
        given, widened = other.head.weight.detach(), torch.zeros_like(self.head.weight)
        widened[:, :images] = given[:, :images]
        widened[:, own : own + other.conditions] = given[:, images:]
        return widened


def _constant_map(value: float | Tensor, h: Tensor) -> Tensor:
    """A map (B, 1, H, W) like h (B, C, H, W) of one value, or of one for each sample (repeated if B is a multiple)."""
    if not isinstance(value, Tensor):
        return torch.full_like(h[:, :1], value)
    values = value.to(h).reshape(-1)
    return values.repeat(h.shape[0] // len(values)).view(-1, 1, 1, 1).expand_as(h[:, :1])


def _even(h: Tensor) -> Tensor:
    """Pad each odd side of h with one row or column of zeros."""
    padding = (0, h.shape[-1] % 2, 0, h.shape[-2] % 2)
    return F.pad(h, padding) if any(padding) else h
