"""B₁ X B₂ᵀ for radii up to 31; the radii are run-time arguments, so one compilation serves them all.

A program is one warp and owns ``U`` rows. The windows of such radii do not fit into registers, so the program
accumulates: it reads each image row once and adds it to all of the U rows that need it.
"""

# mypy: ignore-errors
# Triton is another language in Python's syntax.

import triton
import triton.language as tl

from .rows import load_row, store_row, tile_columns, unflatten, zero_rows


@triton.jit
def column_sums(x, plane, y0, columns, inside, band, height, width, radius, U: tl.constexpr, CIRCULAR: tl.constexpr):
    """The U rows of B₁ X from y0 on."""
    ACC: tl.constexpr = band.dtype.element_ty
    slots = 2 * radius + 1
    total = zero_rows(U, columns.shape[0], ACC)
    for k in range(0, U + 2 * radius, 2):
        pair = ()
        for v in tl.static_range(2):
            pair += (load_row(x, plane, y0 - radius + k + v, columns, inside, height, width, ACC, CIRCULAR),)
        for v in tl.static_range(2):
            sums = ()
            for u in tl.static_range(U):
                slot = k + v - u
                wanted = (slot >= 0) & (slot < slots) & (y0 + u < height)
                weight = tl.load(band + (y0 + u).to(tl.int64) * slots + slot, mask=wanted, other=0.0)
                sums += (total[u] + weight * pair[v],)
            total = sums
    return total


@triton.jit
def row_sums(rows, columns, inside, band, radius, U: tl.constexpr):
    """The U rows times B₂ᵀ. Slots go by fours, the columns of a lane, so the register of each shift is known."""
    TX: tl.constexpr = rows[0].shape[0]
    j = tl.arange(0, TX)
    slots = 2 * radius + 1
    total = zero_rows(U, TX, rows[0].dtype)
    reach = (radius + 3) // 4
    for quad in range(-reach, reach + 1):
        for q in tl.static_range(4):
            slot = 4 * quad + q + radius
            wanted = inside & (slot >= 0) & (slot < slots)
            weight = tl.load(band + columns.to(tl.int64) * slots + slot, mask=wanted, other=0.0)
            sums = ()
            for u in tl.static_range(U):
                sums += (total[u] + weight * tl.gather(rows[u], (j + 4 * quad + q) & (TX - 1), 0),)
            total = sums
    return total


@triton.jit(do_not_specialize=["height", "radius_y", "radius_x"])
def wide_kernel(
    x, d, r, start, step_size, out, band_y, band_x, height, vectors, radius_y, radius_x,
    CIRCULAR: tl.constexpr, TX: tl.constexpr, HALO: tl.constexpr, U: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """g = B₁ X B₂ᵀ − d + r; out = start − ηg, or g if there is no start."""
    ACC: tl.constexpr = band_y.dtype.element_ty
    width = vectors * VECTOR  # written as a product, so that the compiler knows that VECTOR divides it
    plane, y0, x0 = unflatten(tl.program_id(0), height, width, U, TX - 2 * HALO)
    columns, inside, owned = tile_columns(x0, TX, HALO, width, CIRCULAR, VECTOR)
    rows = column_sums(x, plane, y0, columns, inside, band_y, height, width, radius_y, U, CIRCULAR)
    rows = row_sums(rows, columns, inside, band_x, radius_x, U)
    for u in tl.static_range(U):
        y = y0 + u
        mask = owned & (y < height)
        g = rows[u]
        if d is not None:
            g -= load_row(d, plane, y, columns, mask, height, width, ACC, False)
        if r is not None:
            g += load_row(r, plane, y, columns, mask, height, width, ACC, False)
        if start is not None:
            eta = tl.load(step_size).to(ACC)
            g = load_row(start, plane, y, columns, mask, height, width, ACC, False) - eta * g
        store_row(out, plane, y, columns, g, mask, height, width)
