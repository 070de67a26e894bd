"""Binary PGM and PPM files with any maximum; other libraries rescale or ignore the maximum."""

from __future__ import annotations

import re

import numpy as np

from jfbfast.imaging.formats.metadata import MOST_PIXELS, Decoded, ImageError, check_size

_HEADER = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")


def decode(content: bytes, most: int = MOST_PIXELS) -> Decoded:
    """Decode a PGM (P5) or PPM (P6) file with samples from 0 to the maximum in its header."""
    header = _HEADER.match(content)
    if header is None:
        raise ImageError("its header is not that of a PGM or PPM")
    kind, width, height, white = map(int, header.groups())
    check_size(width, height, most)
    if not 1 <= white <= 65535:
        raise ImageError(f"its maximum is {white}; it takes 1 to 65535")
    shape, dtype = (height, width, 1 if kind == 5 else 3), np.dtype(np.uint8 if white < 256 else ">u2")
    size = int(np.prod(shape)) * dtype.itemsize
    if len(content) < header.end() + size:
        raise ImageError("the file ends too early")
    if content[header.end() + size :].strip():
        raise ImageError("has more than its pixels; it takes one image a file")
    array = np.frombuffer(content, dtype, offset=header.end(), count=size // dtype.itemsize).reshape(shape)
    if (largest := int(array.max())) > white:
        raise ImageError(f"has a sample of {largest}, above its maximum, {white}")
    return Decoded(array.astype(dtype.newbyteorder("=")), white)
