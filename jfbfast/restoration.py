"""Restoring photographs of any size: in overlapping tiles, blended so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor, nn

from jfbfast.classical import discrepancy_damping, tikhonov
from jfbfast.operators import GaussianBlur

Restorer = Callable[[Tensor], Tensor]

LEAST_TILE = 32  # pixels; from here on the overlap that is measured leaves room to align the tiles
ALIGNMENT = 16  # pixels; what the coarsest scale of a U-Net of four scales divides
HALF_A_GREY_LEVEL = 1 / 255  # on [−1, 1]


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Where tiles start and end that cover ``length`` and overlap by at least ``overlap``, evenly spread.

    They start at multiples of `ALIGNMENT`, so that a U-Net halves the resolution of each at the pixels
    at which it would halve that of the whole; so the last one can be that much longer than ``tile``.
    """
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [i * (length - tile) // (count - 1) // ALIGNMENT * ALIGNMENT for i in range(count)]
    return [(start, start + tile) for start in starts[:-1]] + [(starts[-1], length)]


def _weights(span: tuple[int, int], length: int, overlap: int) -> Tensor:
    """One inside a tile; at an edge that another tile covers, nearly nothing over 3/8 of the overlap, then a ramp."""
    start, end = span
    margin, width = 3 * overlap // 8, overlap // 4
    ramp = ((torch.arange(end - start) + 1 - margin) / width).clamp(1e-6, 1)
    weights = torch.ones(end - start)
    if start > 0:
        weights = weights * ramp
    if end < length:
        weights = weights * ramp.flip(0)
    return weights


def tiles(height: int, width: int, tile: int, overlap: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and blending weights of each tile of an image."""
    for y, x in product(_spans(height, tile, overlap), _spans(width, tile, overlap)):
        yield slice(*y), slice(*x), _weights(y, height, overlap)[:, None] * _weights(x, width, overlap)


def restore_tiled(
    restore: Restorer,
    d: Tensor,
    *,
    tile: int = 512,
    overlap: int = 96,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Apply ``restore`` to overlapping tiles of one image and blend them.

    What lies within 3/8 of the overlap of an edge is dropped, so no seam is seen where a restored pixel depends
    on what is no further away; `border_reach` measures that.

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


def border_reach(restore: Restorer, d: Tensor, tile: int = 512, tolerance: float = HALF_A_GREY_LEVEL) -> int:
    """How far from a cut a restoration differs visibly from that of the uncut image, in pixels.

    Measured: the image's centre, a tile at most, is restored with and without its upper quarter, and so
    much for the left one. It counts a network's receptive field, the operator's, and how often the
    solve applies them, as far as they matter.

    Args:
        restore: (1, C, h, w) to the same shape.
        d: (C, H, W).
        tile: side of the part that is restored.
        tolerance: the largest difference that does not count; on [−1, 1], half a grey level of 8 bits is 1/255.
    """
    part = _centre(d, tile)[None].contiguous()
    whole = restore(part)
    reach = 0
    for dim in (-2, -1):
        cut = part.shape[dim] // 4 // ALIGNMENT * ALIGNMENT
        kept = part.shape[dim] - cut
        difference = restore(part.narrow(dim, cut, kept).contiguous()) - whole.narrow(dim, cut, kept)
        seen = (difference.abs().movedim(dim, 0).flatten(1).amax(1) > tolerance).nonzero()
        reach = max(reach, int(seen[-1]) + 1 if cut and len(seen) else 0)
    return reach


def seamless_overlap(restore: Restorer, d: Tensor, tile: int = 512) -> int:
    """The overlap at which the tiles of d leave no visible seam: of which 3/8 are the `border_reach`.

    At least 32 pixels, at most what ``tile`` allows.
    """
    wanted = 8 * -(-border_reach(restore, d, tile) // 3)
    return min(max(32, wanted), (tile - 1) // 2)


def tiling_error(restore: Restorer, d: Tensor, tiled: Tensor) -> float:
    """The largest difference on [−1, 1] between d's restoration in tiles, as given, and in one piece."""
    return float((tiled - restore(d[None].contiguous())[0]).abs().max())


def _centre(d: Tensor, side: int) -> Tensor:
    top, left = (max(0, (n - side) // 2) for n in d.shape[-2:])
    return d[..., top : top + side, left : left + side]


def tikhonov_restorer(blur: GaussianBlur, d: Tensor, noise: float) -> tuple[Restorer, float]:
    """Tikhonov's restoration with its λ by the discrepancy principle, read off the image's centre."""
    damping = discrepancy_damping(blur, _centre(d, 512), noise)
    return (lambda measured: tikhonov(blur, measured, damping)), damping


def network_restorer(model: nn.Module, channels: int) -> Restorer:
    """The model's restoration, for images of one channel too: they pass as ``channels`` equal ones."""

    @torch.inference_mode()
    def restore(measured: Tensor) -> Tensor:
        if measured.shape[1] == channels:
            whole: Tensor = model(measured)
            return whole
        if measured.shape[1] == 1:
            restored: Tensor = model(measured.expand(-1, channels, -1, -1))
            return restored.mean(1, keepdim=True)
        return torch.cat([model(channel) for channel in measured.split(1, dim=1)], dim=1)

    return restore
