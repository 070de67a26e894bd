"""What follows a convolution, in one pass over its output: bias, addend, ReLU."""

# mypy: ignore-errors
# Triton is another language in Python's syntax.

import triton
import triton.language as tl


@triton.jit
def add_relu_kernel(
    out, bias, addend, vectors,
    CHANNELS: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """out = out + bias + addend and a ReLU, over numbers whose channel is their index modulo CHANNELS."""
    count = vectors.to(tl.int64) * VECTOR  # written as a product, so that the compiler knows that VECTOR divides it
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < count - start
    value = tl.load(out + start + i, mask=mask).to(ACC)
    if bias is not None:
        value += tl.load(bias + ((start % CHANNELS).to(tl.int32) + i) % CHANNELS, mask=mask).to(ACC)
    if addend is not None:
        value += tl.load(addend + start + i, mask=mask).to(ACC)
    if RELU:
        value = tl.where(value < 0, 0, value)  # a NaN stays one
    tl.store(out + start + i, value.to(out.dtype.element_ty), mask=mask)
