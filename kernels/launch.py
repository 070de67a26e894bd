"""The launchers of the Triton kernels: functions of `jfbfast.backends.reference`, for tensors on a CUDA device.

A launch depends on the shapes and dtypes of the tensors only, the host reads nothing back, and only outputs
(beyond radius 7 also Ax − d) are allocated. So a CUDA graph can capture every function.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jfbfast.backends import reference
from jfbfast.backends.reference import Bands
from jfbfast.backends.tensors import margin, padded

from .elementwise import add_relu_kernel
from .stream import blur_kernel, gradient_kernel
from .wide import wide_kernel

FUSED_RADIUS = 7
MAX_RADIUS = 31
ENOUGH_PROGRAMS = 1024  # eight warps for each multiprocessor of the largest GPUs


class Tile(NamedTuple):
    """The part of x that one warp reads, halo included; ``unroll`` is the number of rows it reads at a time."""

    columns: int
    rows: int
    unroll: int


# By largest radius. In each line the first tile reads the fewest halo bytes; a later one is used if the
# image is too small to give the earlier ones ENOUGH_PROGRAMS. Wider or more unrolled tiles spill registers.
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
ADD_RELU_BLOCK = 1024  # numbers that a program of four warps changes: two 128-bit accesses a lane
WIDE_COLUMNS = 128
WIDE_UNROLL = {torch.float64: 4, torch.float32: 8}


class Plan(NamedTuple):
    """A launch: its grid, the rows of a strip, the columns of one memory access, the compile-time arguments."""

    programs: int
    strip: int
    vector: int
    constants: dict[str, int | bool]


def plan(shape: torch.Size, bands: Bands, *, adjoint: bool) -> Plan:
    """How to launch the stream kernels over x (…, H, W): the gradient if ``adjoint``, else the blur."""
    ry, rx = bands.y.shape[1] // 2, bands.x.shape[1] // 2
    tables = (GRADIENT_TILES, GRADIENT_TILES_64) if adjoint else (BLUR_TILES, BLUR_TILES_64)
    candidates = tables[bands.y.dtype == torch.float64].items()
    tiles = next(tiles for radius, tiles in candidates if max(ry, rx) <= radius)
    return _plan(tuple(shape), ry, rx, bands.circular, 2 if adjoint else 1, tiles)


@lru_cache(maxsize=256)  # an eager solve is bound by the host, and planning took a third of a call
def _plan(shape: tuple[int, ...], ry: int, rx: int, circular: bool, passes: int, candidates: tuple[Tile, ...]) -> Plan:
    """`plan` with the first of the candidate tiles that gives enough programs, or else the last."""
    height, width = shape[-2:]
    for tile in candidates:
        lane = tile.columns // 32
        if width % lane and tile.columns > 64:
            continue  # no 128-bit access, and shuffling four scattered columns a lane costs more
        whole_rows = not circular and width <= tile.columns
        halo = 0 if whole_rows else triton.cdiv(passes * rx, lane) * lane
        strip = min(tile.rows - 2 * passes * ry, height)
        tiles = triton.cdiv(height, strip) * triton.cdiv(width, tile.columns - 2 * halo)
        programs = math.prod(shape[:-2]) * tiles
        if programs >= ENOUGH_PROGRAMS:
            break
    vector = math.gcd(width, lane)
    constants = {"RY": ry, "RX": rx, "CIRCULAR": circular, "TX": tile.columns, "HALO": halo, "U": tile.unroll}
    return Plan(programs, strip, vector, {**constants, "VECTOR": vector})


def wide_plan(shape: torch.Size, bands: Bands) -> Plan:
    """How to launch the wide kernel over x (…, H, W)."""
    height, width = shape[-2:]
    whole_rows = not bands.circular and width <= WIDE_COLUMNS
    halo = 0 if whole_rows else triton.cdiv(bands.x.shape[1] // 2, 4) * 4
    unroll = WIDE_UNROLL[bands.y.dtype]
    tiles = triton.cdiv(height, unroll) * triton.cdiv(width, WIDE_COLUMNS - 2 * halo)
    vector = math.gcd(width, WIDE_COLUMNS // 32)
    constants = {"CIRCULAR": bands.circular, "TX": WIDE_COLUMNS, "HALO": halo, "U": unroll, "VECTOR": vector}
    return Plan(math.prod(shape[:-2]) * tiles, unroll, vector, constants)


def _radius(bands: Bands) -> int:
    radius = max(bands.y.shape[1], bands.x.shape[1]) // 2
    if radius > MAX_RADIUS:
        raise ValueError(f"bands is of radius {radius}; it takes at most {MAX_RADIUS}")
    return radius


def _launch(kernel: Any, plan: Plan, tensors: tuple[Tensor | None, ...], *sizes: int, **constants: bool) -> None:
    """Run a kernel over the image ``tensors[0]``; ``sizes`` follow the height and width in its arguments."""
    x = tensors[0]
    assert x is not None
    height, width = x.shape[-2:]
    kernel[(plan.programs,)](*tensors, height, width // plan.vector, *sizes, **plan.constants, **constants, num_warps=1)


def _wide(
    bands: Bands, x: Tensor, d: Tensor | None, r: Tensor | None, step: tuple[Tensor | None, Tensor | None], out: Tensor
) -> None:
    """out = g with g = B₁ X B₂ᵀ − d + r; or start − ηg with ``step`` = (start, η)."""
    tensors = (x, d, r, *step, out, bands.y, bands.x)
    _launch(wide_kernel, wide_plan(x.shape, bands), tensors, bands.y.shape[1] // 2, bands.x.shape[1] // 2)


def blur(x: Tensor, bands: Bands) -> Tensor:
    """As `reference.blur`.

    Raises:
        ValueError: a radius beyond MAX_RADIUS.
    """
    fused = _radius(bands) <= FUSED_RADIUS
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            if fused:
                launch = plan(x.shape, bands, adjoint=False)
                _launch(blur_kernel, launch, (x, out, bands.y, bands.x), launch.strip)
            else:
                _wide(bands, x, None, None, (None, None), out)
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
    d = None if d is None else padded(d, margin(x, d)).contiguous()
    r = None if r is None else r.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            if fused:
                launch = plan(x.shape, bands, adjoint=True)
                tensors = (x, d, r, step_size, out, bands.y, bands.x, adjoint.y, adjoint.x)
                _launch(gradient_kernel, launch, tensors, launch.strip, KEEP=step_size is not None)
            else:
                residual = torch.empty(x.shape, dtype=bands.y.dtype, device=x.device)
                _wide(bands, x, d, None, (None, None), residual)
                _wide(adjoint, residual, None, r, (None if step_size is None else x, step_size), out)
    return out


def add_relu(out: Tensor, bias: Tensor | None, addend: Tensor | None, relu: bool) -> Tensor:
    """As `reference.add_relu`; in one pass over a channels-last ``out``."""
    if not out.is_contiguous(memory_format=torch.channels_last):
        return reference.add_relu(out, bias, addend, relu)
    if addend is not None:
        addend = addend.contiguous(memory_format=torch.channels_last)
    if out.numel():
        accumulator = tl.float64 if out.dtype == torch.float64 else tl.float32
        count, block, vector = out.numel(), ADD_RELU_BLOCK, math.gcd(out.numel(), 8)
        constants = {"CHANNELS": out.shape[1], "RELU": relu, "ACC": accumulator, "BLOCK": block, "VECTOR": vector}
        with torch.cuda.device_of(out):
            grid = (triton.cdiv(count, block),)
            add_relu_kernel[grid](out, bias, addend, count // vector, **constants, num_warps=4)
    return out
