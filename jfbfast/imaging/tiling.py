"""Apply a restoration to an image of any size in bounded memory: in overlapping tiles, which are blended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

TileRestorer = Callable[[Tensor], Tensor]  # (1, C, h, w) on [−1, 1] to the same shape

ALIGNMENT = 16  # pixels; divisible by the coarsest step of a U-Net of four scales
LEAST_TILE = 2 * ALIGNMENT  # pixels; any overlap then leaves room to align the tiles
TILE = 768  # pixels; with 512, wide overlaps are up to half as much again to restore, and 0.4 GB less
_TRIAL_SIDE = 320  # pixels
# Root mean square on [−1, 1], 0.7 of what rounding to 8 bits changes: single pixels then differ by less than 1/255.
VISIBLE = 0.7 * 2 / 255 / math.sqrt(12)


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return the start and the end of evenly spread tiles, which cover ``length`` and overlap by at least ``overlap``.

    They are as few as tiles of side ``tile`` can be, and no longer than they need be. They start at multiples of
    `ALIGNMENT`, so that a U-Net halves the resolution at the same pixels as in the whole image. The last tile can
    therefore be longer than ``tile``, by less than `ALIGNMENT`.
    """
    if length <= tile:
        return [(0, length)]
    stride = (tile - overlap) // ALIGNMENT * ALIGNMENT
    count = 1 + -(-(length - tile) // stride)
    stride = -(-(length - overlap) // (count * ALIGNMENT)) * ALIGNMENT
    side = min(tile, -(-(stride + overlap) // ALIGNMENT) * ALIGNMENT)
    starts = [i * (length - side) // (count - 1) // ALIGNMENT * ALIGNMENT for i in range(count)]
    return [(start, start + side) for start in starts[:-1]] + [(starts[-1], length)]


def _weights(span: tuple[int, int], length: int, overlap: int) -> Tensor:
    """Blending weights: 1 inside a tile; at an inner edge nearly 0 over 3/8 of the overlap, and then a ramp."""
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
    """Yield the rows, the columns and the blending weights of each tile of an image."""
    for y, x in product(_spans(height, tile, overlap), _spans(width, tile, overlap)):
        yield slice(*y), slice(*x), _weights(y, height, overlap)[:, None] * _weights(x, width, overlap)


def restore_tiled(
    restore: TileRestorer,
    d: Tensor,
    *,
    tile: int = TILE,
    overlap: int = 96,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Apply ``restore`` to overlapping tiles of an image and blend them.

    The blend drops what lies within 3/8 of the overlap of an inner edge. No seam is seen if a restored pixel depends
    only on pixels within that distance; `border_reach` measures it.

    Args:
        restore: (1, C, h, w) to the same shape.
        d: (C, H, W), any size.
        tile: the largest side of a tile in pixels, at least `LEAST_TILE`.
        overlap: least number of pixels that neighbouring tiles share; at least 4 and under half of ``tile``.
        progress: called after each tile with the number of tiles done and of all tiles.

    Raises:
        ValueError: ``tile`` or ``overlap`` out of its range.

    Example:
        >>> import torch, jfbfast
        >>> from jfbfast.imaging.tiling import restore_tiled
        >>> blur, d = jfbfast.GaussianBlur(5, 1.0, "reflect"), torch.rand(3, 90, 70)
        >>> tiled = restore_tiled(lambda part: jfbfast.tikhonov(blur, part, 0.1), d, tile=64, overlap=24)
        >>> torch.allclose(tiled, jfbfast.tikhonov(blur, d, 0.1), atol=0.01)
        True
    """
    if tile < LEAST_TILE:
        raise ValueError(f"tile is {tile}; it takes at least {LEAST_TILE}")
    if not 4 <= overlap < tile / 2:
        raise ValueError(f"overlap is {overlap}; it takes at least 4 and less than half of tile={tile}")
    total, weight = torch.zeros_like(d), torch.zeros(d.shape[-2:], device=d.device)
    plan = list(tiles(d.shape[-2], d.shape[-1], tile, overlap))
    for done, (rows, columns, share) in enumerate(plan, 1):
        share = share.to(d.device)
        total[:, rows, columns] += share * restore(d[None, :, rows, columns].contiguous())[0]
        weight[rows, columns] += share
        if progress is not None:
            progress(done, len(plan))
    return total / weight


def border_reach(restore: TileRestorer, d: Tensor, tile: int = TILE, tolerance: float = VISIBLE) -> int:
    """Measure how far from a cut, in pixels, a restoration differs visibly from the uncut one.

    The image's centre, at most a tile, is restored with and without its upper quarter, and with and without its left
    quarter. This accounts for the network's receptive field, the operator's, and how often the solve applies them.
    The quarter on the far side does not count: solves stop with errors in the corners, which differ anyhow.

    Args:
        restore: (1, C, h, w) to the same shape.
        d: (C, H, W).
        tile: side of the centre.
        tolerance: the largest difference on [−1, 1] that does not count, root mean square over a line along the cut.
    """
    top, left = (max(0, (n - tile) // 2) for n in d.shape[-2:])
    part = d[None, :, top : top + tile, left : left + tile].contiguous()
    whole = restore(part)
    reach = 0
    for dim in (-2, -1):
        cut = part.shape[dim] // 4 // ALIGNMENT * ALIGNMENT
        kept = part.shape[dim] - cut
        difference = restore(part.narrow(dim, cut, kept).contiguous()) - whole.narrow(dim, cut, kept)
        lines = difference.movedim(dim, 0).flatten(1)[: kept - cut]
        seen = (lines.square().mean(1).sqrt() > tolerance).nonzero()
        reach = max(reach, int(seen[-1]) + 1 if cut and len(seen) else 0)
    return reach


def seamless_overlap(restore: TileRestorer, d: Tensor, tile: int = TILE) -> int:
    """Return the overlap at which the tiles of d leave no visible seam: 8/3 of the `border_reach`.

    It is measured in the middle, on at most 320 pixels a side. At least 32 pixels, at most what ``tile`` allows.
    """
    wanted = 8 * -(-border_reach(restore, d, min(tile, _TRIAL_SIDE)) // 3)
    return min(max(32, wanted), (tile - 1) // 2)


def tiling_error(restore: TileRestorer, d: Tensor, tiled: Tensor) -> float:
    """Return the largest difference on [−1, 1] between d's restoration in tiles, as given, and in one piece."""
    return float((tiled - restore(d[None].contiguous())[0]).abs().max())
