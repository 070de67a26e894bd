"""The blur and the gradient step for radii up to 7, in one launch each and without temporaries in global memory.

A program is one warp. It owns ``STRIP`` rows of ``SX`` columns of one plane and moves down them,
``U`` rows at a time. It keeps what later rows need in registers: the last 2R rows blurred
across, the last 2R rows of Ax − d adjoint-blurred across, the last 2R rows of x.
"""

# mypy: ignore-errors
# Triton is another language in Python's syntax.

import triton
import triton.language as tl

from .rows import across, down, last_rows, load_row, load_weights, store_row, tile_columns, unflatten, zero_rows


@triton.jit(do_not_specialize=["height", "STRIP"])
def blur_kernel(
    x, out, band_y, band_x, height, vectors, STRIP,
    RY: tl.constexpr, RX: tl.constexpr, CIRCULAR: tl.constexpr,
    TX: tl.constexpr, HALO: tl.constexpr, U: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """out = B₁ X B₂ᵀ."""
    ACC: tl.constexpr = band_y.dtype.element_ty
    width = vectors * VECTOR  # written as a product, so that the compiler knows that VECTOR divides it
    plane, y0, x0 = unflatten(tl.program_id(0), height, width, STRIP, TX - 2 * HALO)
    columns, inside, owned = tile_columns(x0, TX, HALO, width, CIRCULAR, VECTOR)
    weights = load_weights(band_x, columns, inside, RX)

    blurred = zero_rows(2 * RY, TX, ACC)
    for t in range(0, STRIP + 2 * RY, U):
        new = ()
        for u in tl.static_range(U):
            new += (load_row(x, plane, y0 - RY + t + u, columns, inside, height, width, ACC, CIRCULAR),)
        for u in tl.static_range(U):
            blurred += (across(new[u], weights, RX),)
        for u in tl.static_range(U):
            y = y0 - 2 * RY + t + u
            row = down(blurred, u, band_y, y, height, RY, CIRCULAR)
            mask = owned & (y >= y0) & (y < y0 + STRIP) & (y < height)
            store_row(out, plane, y, columns, row, mask, height, width)
        blurred = last_rows(blurred, 2 * RY)


@triton.jit(do_not_specialize=["height", "STRIP"])
def gradient_kernel(
    x, d, r, step_size, out, band_y, band_x, adjoint_y, adjoint_x, height, vectors, STRIP,
    RY: tl.constexpr, RX: tl.constexpr, CIRCULAR: tl.constexpr, KEEP: tl.constexpr,
    TX: tl.constexpr, HALO: tl.constexpr, U: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """g = Aᵀ(Ax − d) + r; out = x − ηg if KEEP, else g."""
    ACC: tl.constexpr = band_y.dtype.element_ty
    width = vectors * VECTOR  # written as a product, so that the compiler knows that VECTOR divides it
    plane, y0, x0 = unflatten(tl.program_id(0), height, width, STRIP, TX - 2 * HALO)
    columns, inside, owned = tile_columns(x0, TX, HALO, width, CIRCULAR, VECTOR)
    weights = load_weights(band_x, columns, inside, RX)
    adjoint_weights = load_weights(adjoint_x, columns, inside, RX)
    if KEEP:
        eta = tl.load(step_size).to(ACC)

    image = zero_rows(2 * RY, TX, ACC)
    blurred = zero_rows(2 * RY, TX, ACC)
    residual = zero_rows(2 * RY, TX, ACC)
    for t in range(0, STRIP + 4 * RY, U):
        # All loads of a round come before its stores: the compiler cannot move them past one.
        data = ()
        added = ()
        for u in tl.static_range(U):
            y = y0 - 2 * RY + t + u
            image += (load_row(x, plane, y, columns, inside, height, width, ACC, CIRCULAR),)
            y -= RY
            data += (load_row(d, plane, y, columns, inside & (y >= y0 - RY), height, width, ACC, CIRCULAR),)
            y -= RY
            added += (load_row(r, plane, y, columns, owned & (y >= y0), height, width, ACC, CIRCULAR),)
        for u in tl.static_range(U):
            blurred += (across(image[2 * RY + u], weights, RX),)
        for u in tl.static_range(U):
            y = y0 - 3 * RY + t + u
            z = down(blurred, u, band_y, y, height, RY, CIRCULAR) - data[u]
            residual += (across(z, adjoint_weights, RX),)
        for u in tl.static_range(U):
            y = y0 - 4 * RY + t + u
            g = down(residual, u, adjoint_y, y, height, RY, CIRCULAR) + added[u]
            mine = (y >= y0) & (y < y0 + STRIP) & (y < height)
            store_row(out, plane, y, columns, image[u] - eta * g if KEEP else g, owned & mine, height, width)
        image = last_rows(image, 2 * RY)
        blurred = last_rows(blurred, 2 * RY)
        residual = last_rows(residual, 2 * RY)
