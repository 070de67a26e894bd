"""The Triton twins of `jfbfast.backends.reference`: the same functions, for tensors on a CUDA device.

Every launch is shaped by the tensors' shapes and dtype alone, nothing is read back, and only outputs
(beyond radius 7 also Ax − d) are allocated, so each twin can be captured into a CUDA graph.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from .stream import blur_kernel, gradient_kernel
from .wide import wide_kernel

if TYPE_CHECKING:
    from ..reference import Bands

FUSED_RADIUS = 7
MAX_RADIUS = 31
ENOUGH_PROGRAMS = 1024  # eight warps for each multiprocessor of the largest devices


class Tile(NamedTuple):
    """What one warp reads of x: columns × rows, halo included, ``unroll`` rows a round."""

    columns: int
    rows: int
    unroll: int


# By largest radius. Within a line the first reads the fewest halo bytes; a later one is taken where
# the image is too small to give an earlier one ENOUGH_PROGRAMS. Wider or more unrolled tiles spill.
GRADIENT_TILES = {
    2: (Tile(128, 128, 2), Tile(128, 64, 2), Tile(64, 64, 4), Tile(64, 32, 4)),
    3: (Tile(64, 128, 4), Tile(64, 64, 4)),
    7: (Tile(64, 128, 2), Tile(64, 64, 2)),
}
BLUR_TILES = {
    2: (Tile(128, 128, 2), Tile(128, 64, 2), Tile(64, 64, 4), Tile(64, 32, 4)),
    7: (Tile(128, 128, 2), Tile(128, 64, 2), Tile(64, 64, 4)),
}
GRADIENT_TILES_64 = {2: (Tile(64, 64, 2),), 7: (Tile(32, 64, 2),)}
BLUR_TILES_64 = {7: (Tile(64, 64, 2),)}
WIDE_COLUMNS = 128
WIDE_UNROLL = {torch.float64: 4, torch.float32: 8}


class Plan(NamedTuple):
    """A launch: its grid, the rows of a strip, the columns of an access, the compile-time arguments."""

    programs: int
    strip: int
    vector: int
    constants: dict[str, int | bool]


def plan(shape: torch.Size, bands: Bands, *, adjoint: bool) -> Plan:
    """How to launch the stream kernels (gradient where ``adjoint``, else blur) over x (…, H, W)."""
    height, width = shape[-2:]
    passes = 2 if adjoint else 1
    ry, rx = bands.y.shape[1] // 2, bands.x.shape[1] // 2
    double = bands.y.dtype == torch.float64
    classes = (
        (GRADIENT_TILES_64 if double else GRADIENT_TILES) if adjoint else (BLUR_TILES_64 if double else BLUR_TILES)
    )
    candidates = next(tiles for radius, tiles in classes.items() if max(ry, rx) <= radius)
    for tile in candidates:
        lane = tile.columns // 32
        if width % lane and tile.columns > 64:
            continue  # no 128-bit access, and the shuffles of four scattered columns a lane cost more
        whole_rows = not bands.circular and width <= tile.columns
        halo = 0 if whole_rows else triton.cdiv(passes * rx, lane) * lane
        tiles = triton.cdiv(width, tile.columns - 2 * halo)
        strip = min(tile.rows - 2 * passes * ry, height)
        programs = math.prod(shape[:-2]) * triton.cdiv(height, strip) * tiles
        vector = math.gcd(width, lane)
        if programs >= ENOUGH_PROGRAMS:
            break
    constants = {"RY": ry, "RX": rx, "CIRCULAR": bands.circular, "TX": tile.columns, "HALO": halo, "U": tile.unroll}
    return Plan(programs, strip, vector, {**constants, "VECTOR": vector})


def wide_plan(shape: torch.Size, bands: Bands) -> Plan:
    """How to launch the wide kernel over x (…, H, W)."""
    height, width = shape[-2:]
    halo = triton.cdiv(bands.x.shape[1] // 2, 4) * 4
    halo = 0 if not bands.circular and width <= WIDE_COLUMNS else halo
    unroll = WIDE_UNROLL[bands.y.dtype]
    tiles = triton.cdiv(width, WIDE_COLUMNS - 2 * halo)
    vector = math.gcd(width, WIDE_COLUMNS // 32)
    programs = math.prod(shape[:-2]) * triton.cdiv(height, unroll) * tiles
    constants = {"CIRCULAR": bands.circular, "TX": WIDE_COLUMNS, "HALO": halo, "U": unroll, "VECTOR": vector}
    return Plan(programs, unroll, vector, constants)


def _radius(bands: Bands) -> int:
    radius = max(bands.y.shape[1], bands.x.shape[1]) // 2
    if radius > MAX_RADIUS:
        raise ValueError(f"bands: radius {radius}, the Triton kernels take at most {MAX_RADIUS}")
    return radius


def _wide(
    x: Tensor,
    d: Tensor | None,
    r: Tensor | None,
    start: Tensor | None,
    step_size: Tensor | None,
    out: Tensor,
    bands: Bands,
) -> None:
    """out = B₁ X B₂ᵀ − d + r, or start − η times that."""
    launch = wide_plan(x.shape, bands)
    height, width = x.shape[-2:]
    wide_kernel[(launch.programs,)](
        x, d, r, start, step_size, out, bands.y, bands.x, height, width // launch.vector,
        bands.y.shape[1] // 2, bands.x.shape[1] // 2, **launch.constants, num_warps=1,
    )  # fmt: skip


def blur(x: Tensor, bands: Bands) -> Tensor:
    """B₁ X B₂ᵀ for x (…, H, W). Raises ValueError for a radius beyond MAX_RADIUS."""
    radius = _radius(bands)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    with torch.cuda.device_of(x):
        if radius > FUSED_RADIUS:
            _wide(x, None, None, None, None, out, bands)
        else:
            launch = plan(x.shape, bands, adjoint=False)
            height, width = x.shape[-2:]
            blur_kernel[(launch.programs,)](
                x, out, bands.y, bands.x, height, width // launch.vector, launch.strip, **launch.constants, num_warps=1
            )
    return out


def gradient(
    x: Tensor, d: Tensor | None, r: Tensor | None, bands: Bands, adjoint: Bands, step_size: Tensor | None = None
) -> Tensor:
    """As `reference.gradient`; the step size is read on the device.

    Raises:
        ValueError: a radius beyond MAX_RADIUS.
    """
    fused = _radius(bands) <= FUSED_RADIUS
    x = x.contiguous()
    d = None if d is None else d.contiguous()
    r = None if r is None else r.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    with torch.cuda.device_of(x):
        if fused:
            launch = plan(x.shape, bands, adjoint=True)
            height, width = x.shape[-2:]
            gradient_kernel[(launch.programs,)](
                x, d, r, step_size, out, bands.y, bands.x, adjoint.y, adjoint.x,
                height, width // launch.vector, launch.strip,
                KEEP=step_size is not None, **launch.constants, num_warps=1,
            )  # fmt: skip
        else:
            residual = torch.empty(x.shape, dtype=bands.y.dtype, device=x.device)
            _wide(x, d, None, None, None, residual, bands)
            _wide(residual, None, r, None if step_size is None else x, step_size, out, adjoint)
    return out
