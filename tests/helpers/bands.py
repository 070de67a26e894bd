"""Band tables of asymmetric blurs, for the tests of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from jfbfast.backends import reference
from jfbfast.backends.reference import Bands
from jfbfast.backends.tensors import compute_dtype


def operator(size: tuple[int, ...], radii: tuple[int, int], mode: str) -> tuple[Bands, Bands]:
    """Float64 tables of an asymmetric blur for images of this size, and those of its adjoint."""
    generator = torch.Generator().manual_seed(radii[0] + 10 * radii[1])
    taps = [(torch.rand(2 * r + 1, generator=generator).double() * 1.2 - 0.2) / (r + 1) for r in radii]
    y, x = (reference.band_table(t.tolist(), n, mode) for t, n in zip(taps, size, strict=True))
    bands = Bands(y, x, mode == "circular")
    return bands, reference.transpose(bands)


def cast(bands: Bands, dtype: torch.dtype, device: str = "cpu") -> Bands:
    """The tables for images of ``dtype``."""
    wide = compute_dtype(dtype)
    return Bands(bands.y.to(device, wide).contiguous(), bands.x.to(device, wide).contiguous(), bands.circular)


def error(out: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest value."""
    return float((out.double() - exact).abs().max() / exact.abs().max())
