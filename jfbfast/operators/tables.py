"""The band tables of a separable operator, computed once for each image size and cached."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast.backends import reference
from jfbfast.backends.graphs import cached_tensors
from jfbfast.backends.reference import Bands
from jfbfast.backends.tensors import compute_dtype


class Taps(NamedTuple):
    """A separable operator for images of any size: its two filters and the padding mode."""

    y: tuple[float, ...]
    x: tuple[float, ...]
    padding_mode: str

    @property
    def margin(self) -> tuple[int, int]:
        """How many pixels x has beyond d on each side, (y, x)."""
        return (len(self.y) // 2, len(self.x) // 2) if self.padding_mode == "valid" else (0, 0)


@lru_cache(maxsize=64)
def axis_table(taps: tuple[float, ...], n: int, padding_mode: str) -> Tensor:
    """The float64 table of one axis of n pixels."""
    radius = len(taps) // 2
    limit = {"reflect": radius + 1, "circular": radius, "valid": len(taps)}.get(padding_mode, 1)
    if n < limit:
        raise ValueError(
            f"x has a side of {n} pixels; {len(taps)} taps with padding_mode={padding_mode!r} take at least {limit}"
        )
    with torch.inference_mode(False):
        return reference.band_table(taps, n, padding_mode)


@cached_tensors(maxsize=256)
def bands(taps: Taps, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, adjoint: bool) -> Bands:
    """The tables of A, or of Aᵀ, for images (…, *shape) of ``dtype`` on ``device``.

    Raises:
        ValueError: the image is too small for the padding mode (reflect takes more than r pixels a
            side, circular at least r, valid more than 2r).
    """
    with torch.inference_mode(False), torch.no_grad():
        y, x = (axis_table(t, n, taps.padding_mode) for t, n in zip((taps.y, taps.x), shape, strict=True))
        tables = Bands(y, x, taps.padding_mode == "circular")
        tables = reference.transpose(tables) if adjoint else tables
        dtype = compute_dtype(dtype)
        y, x = (table.to(device, dtype).contiguous() for table in tables[:2])
        return Bands(y, x, tables.circular)
