"""Restoring photographs of any size: in overlapping tiles, blended so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from jfbfast.classical import discrepancy_damping, tikhonov
from jfbfast.degrad import DEGrad
from jfbfast.operators import GaussianBlur

Restorer = Callable[[Tensor], Tensor]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Evenly spread starts of tiles that cover ``length`` and overlap by at least ``overlap``."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _weights(start: int, tile: int, length: int, overlap: int) -> Tensor:
    """One inside a tile, falling to nearly nothing over half the overlap at an edge that another tile covers."""
    ramp = ((torch.arange(tile) + 1 - overlap // 4) / (overlap // 2)).clamp(1e-6, 1)
    weights = torch.ones(tile)
    if start > 0:
        weights = weights * ramp
    if start + tile < length:
        weights = weights * ramp.flip(0)
    return weights


def tiles(height: int, width: int, tile: int, overlap: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and blending weights of each tile of an image."""
    side_y, side_x = min(tile, height), min(tile, width)
    for y, x in product(_starts(height, side_y, overlap), _starts(width, side_x, overlap)):
        weights = _weights(y, side_y, height, overlap)[:, None] * _weights(x, side_x, width, overlap)
        yield slice(y, y + side_y), slice(x, x + side_x), weights


def restore_tiled(
    restore: Restorer,
    d: Tensor,
    *,
    tile: int = 512,
    overlap: int = 96,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Apply ``restore`` to overlapping tiles of one image and blend them.

    Args:
        restore: (1, C, h, w) to the same shape.
        d: (C, H, W), any size.
        tile: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share at least, under half of ``tile``.
        progress: called after each tile with the tiles done and the tiles in all.

    Raises:
        ValueError: an overlap that is not positive and under half of the tile.
    """
    if not 4 <= overlap < tile / 2:
        raise ValueError(f"overlap is {overlap}; it takes at least 4 and less than half of tile={tile}")
    total, weight = torch.zeros_like(d), torch.zeros(d.shape[-2:])
    plan = list(tiles(d.shape[-2], d.shape[-1], tile, overlap))
    for done, (rows, columns, share) in enumerate(plan, 1):
        total[:, rows, columns] += share * restore(d[None, :, rows, columns].contiguous())[0]
        weight[rows, columns] += share
        if progress is not None:
            progress(done, len(plan))
    return total / weight


def _centre(d: Tensor, side: int) -> Tensor:
    top, left = (max(0, (n - side) // 2) for n in d.shape[-2:])
    return d[..., top : top + side, left : left + side]


def tikhonov_restorer(blur: GaussianBlur, d: Tensor, noise: float) -> tuple[Restorer, float]:
    """Tikhonov's restoration with its λ by the discrepancy principle, read off the image's centre."""
    damping = discrepancy_damping(blur, _centre(d, 512), noise)
    return (lambda measured: tikhonov(blur, measured, damping)), damping


def network_restorer(model: DEGrad, channels: int) -> Restorer:
    """The model's restoration, for images of one channel too: they pass as ``channels`` equal ones."""

    @torch.inference_mode()
    def restore(measured: Tensor) -> Tensor:
        if measured.shape[1] == channels:
            return model(measured)
        if measured.shape[1] == 1:
            restored: Tensor = model(measured.expand(-1, channels, -1, -1))
            return restored.mean(1, keepdim=True)
        return torch.cat([model(channel) for channel in measured.split(1, dim=1)], dim=1)

    return restore
