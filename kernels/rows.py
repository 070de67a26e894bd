"""The building blocks of the kernels: image rows held in the registers of one warp.

A row is a vector of ``TX`` columns; each lane holds TX/32 neighbouring ones. Filtering along a row
moves values between lanes by warp shuffles. Filtering along a column moves nothing, since rows
are separate registers. So neither needs shared memory or a barrier.
"""

# mypy: ignore-errors
# Triton is another language in Python's syntax.

import triton
import triton.language as tl


@triton.jit
def unflatten(program, height, width, STRIP, SX: tl.constexpr):
    """The (plane, first row, first column) of a program's part of the output."""
    tiles = tl.cdiv(width, SX)
    strips = tl.cdiv(height, STRIP)
    plane = (program // tiles // strips).to(tl.int64)
    return plane, (program // tiles) % strips * STRIP, program % tiles * SX


@triton.jit
def wrap(index, n, CIRCULAR: tl.constexpr):
    """``index`` modulo n where the operator is circular; the sign of % differs between compilers."""
    if CIRCULAR:
        index = (index % n + n) % n
    return index


@triton.jit
def tile_columns(x0, TX: tl.constexpr, HALO: tl.constexpr, width, CIRCULAR: tl.constexpr, VECTOR: tl.constexpr):
    """The image columns of a tile, and masks of those inside of the image and of those that the program owns."""
    j = tl.arange(0, TX)
    columns = x0 - HALO + j
    inside = (columns >= 0) & (columns < width)
    owned = inside & (j >= HALO) & (j < TX - HALO)
    if CIRCULAR:
        inside = tl.full([TX], True, tl.int1)
        columns = (columns % width + width) % width
        # VECTOR divides the width and x0 - HALO, so a vector of columns stays whole when it wraps.
        columns = tl.max_contiguous(tl.multiple_of(columns, VECTOR), VECTOR)
    return columns, inside, owned


@triton.jit
def row_start(image, plane, y, height, width):
    """The address of a row, in 64 bits, since an image may have more than 2³¹ elements."""
    return image + plane * height * width + y.to(tl.int64) * width


@triton.jit
def load_row(image, plane, y, columns, mask, height, width, ACC: tl.constexpr, CIRCULAR: tl.constexpr):
    """Row y of a plane at ``columns``, in the accumulator's dtype; zero outside of the image or if there is none."""
    if image is None:
        row = tl.zeros(columns.shape, ACC)
    else:
        y = wrap(y, height, CIRCULAR)
        mask = mask & (y >= 0) & (y < height)
        row = tl.load(row_start(image, plane, y, height, width) + columns, mask=mask, other=0.0).to(ACC)
    return row


@triton.jit
def load_weights(band, columns, mask, R: tl.constexpr):
    """The 2R + 1 slots of a table at ``columns``; zero outside of the image."""
    weights = ()
    for slot in tl.static_range(2 * R + 1):
        weights += (tl.load(band + columns.to(tl.int64) * (2 * R + 1) + slot, mask=mask, other=0.0),)
    return weights


@triton.jit
def across(row, weights, R: tl.constexpr):
    """Σₛ w[s] · row[j + s]. Columns closer than R to the border of the tile are wrong; they belong to the halo.

    The index wraps at a power of two, so that the compiler knows which of a lane's registers it refers to.
    """
    column = tl.arange(0, row.shape[0])
    total = weights[R] * row
    for slot in tl.static_range(2 * R + 1):
        if slot != R:
            total += weights[slot] * tl.gather(row, (column + slot - R) & (row.shape[0] - 1), 0)
    return total


@triton.jit
def down(rows, FIRST: tl.constexpr, band, y, height, R: tl.constexpr, CIRCULAR: tl.constexpr):
    """Σₛ band[y, s] · rows[FIRST + s + R], the value at image row y; zero outside of the image."""
    y = wrap(y, height, CIRCULAR)
    inside = (y >= 0) & (y < height)
    band += y.to(tl.int64) * (2 * R + 1)
    total = tl.zeros_like(rows[FIRST])
    for slot in tl.static_range(2 * R + 1):
        total += tl.load(band + slot, mask=inside, other=0.0) * rows[FIRST + slot]
    return total


@triton.jit
def zero_rows(N: tl.constexpr, TX: tl.constexpr, ACC: tl.constexpr):
    rows = ()
    for _ in tl.static_range(N):
        rows += (tl.zeros([TX], ACC),)
    return rows


@triton.jit
def last_rows(rows, N: tl.constexpr):
    kept = ()
    for i in tl.static_range(len(rows) - N, len(rows)):
        kept += (rows[i],)
    return kept


@triton.jit
def store_row(image, plane, y, columns, row, mask, height, width):
    start = row_start(image, plane, y, height, width)
    tl.store(start + columns, row.to(image.dtype.element_ty), mask=mask)
