"""PNG files of 8 and 16 bits; imagecodecs handles the pixels, and this module the colour space, EXIF and resolution."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import imagecodecs
import numpy as np
from PIL.PngImagePlugin import PngImageFile

from jfbfast.imaging.formats.metadata import MOST_PIXELS, Decoded, ImageError, Metadata, check_size, read_exif

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PALETTE = 3  # a colour type
_LONGEST_PROFILE = 1 << 20  # bytes; Pillow reads no longer profile
_INCHES_PER_METRE = 100 / 2.54
_HEADER_END = 33  # byte offset of the first chunk after the header

logging.getLogger("imagecodecs").addHandler(logging.NullHandler())  # else it writes of interlaced files to stderr


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and the data of each chunk, after verifying its checksum."""
    at, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        if at + 12 > len(content):
            raise ImageError("broken PNG file (it ends too early)")
        length, kind = struct.unpack_from(">I4s", content, at)
        data, end = content[at + 8 : at + 8 + length], at + 12 + length
        if end > len(content) or struct.unpack_from(">I", content, end - 4)[0] != zlib.crc32(kind + data):
            raise ImageError(f"broken PNG file (the chunk at byte {at} is cut off, or has a wrong checksum)")
        yield kind, data
        at = end


def decode(content: bytes, most: int = MOST_PIXELS) -> Decoded:
    """Decode a PNG; palettes become colours, and transparent colours an alpha channel."""
    chunks = dict(_chunks(content))
    width, height, depth, colour_type = struct.unpack_from(">2I2B", chunks.get(b"IHDR", bytes(10)))
    check_size(width, height, most)
    if b"acTL" in chunks:
        raise ImageError("is an animation; it takes one image a file")
    if b"tRNS" in chunks and depth != 8 and colour_type != _PALETTE:
        raise ImageError(f"has a transparent colour and {depth} bits a sample; it takes an alpha channel")
    try:
        array = imagecodecs.png_decode(content)
    except (imagecodecs.PngError, UnicodeDecodeError) as error:  # the latter by the decoder's own message
        raise ImageError("broken PNG file (it has fewer rows than it tells of, or its pixels are damaged)") from error
    info = PngImageFile(BytesIO(content)).info
    # A decoder uses the first of these that is there: cICP, iCCP, sRGB, and last gAMA with cHRM.
    rest = () if b"iCCP" in chunks else (b"sRGB",) if b"sRGB" in chunks else (b"gAMA", b"cHRM")
    colour = {kind: chunks[kind] for kind in (b"cICP", *rest) if kind in chunks}
    exif = read_exif(chunks.get(b"eXIf", b""))
    white = np.iinfo(array.dtype).max
    array = array.reshape(height, width, -1)
    return Decoded(array, white, info.get("icc_profile") or b"", exif, info.get("dpi"), colour)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode(array: np.ndarray, metadata: Metadata) -> bytes:
    """Encode (H, W, channels), uint8 or uint16, as a PNG."""
    parts = list(metadata.colour.items())
    if len(metadata.icc) > _LONGEST_PROFILE:
        raise ImageError(f"its colour profile of {len(metadata.icc)} bytes is too long for .png; .tiff can hold it")
    if metadata.icc:
        parts.append((b"iCCP", b"ICC\0\0" + zlib.compress(metadata.icc)))
    if metadata.dpi is not None:
        parts.append((b"pHYs", struct.pack(">2IB", *(round(value * _INCHES_PER_METRE) for value in metadata.dpi), 1)))
    if metadata.exif:
        parts.append((b"eXIf", metadata.exif))
    content = bytes(imagecodecs.png_encode(array))
    return content[:_HEADER_END] + b"".join(_chunk(*part) for part in parts) + content[_HEADER_END:]
