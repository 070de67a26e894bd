"""PNG of 8 and 16 bits: every chunk's checksum is verified, and colours, EXIF and resolution are kept."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL.PngImagePlugin import PngImageFile

from jfbfast.imaging.formats.deep import decode_deep
from jfbfast.imaging.formats.eight_bit import from_pillow
from jfbfast.imaging.formats.metadata import Decoded, ImageError, Metadata, check_size, read_exif

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of so many channels
_PALETTE = 3
_SAMPLES = {0: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}  # a pixel, by colour type
# Where each pass of an interlaced image starts, x and y, and its steps.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_LONGEST_PROFILE = 1 << 20  # bytes, which Pillow reads at most
_METRE = 100 / 2.54  # in inches
_ABOVE = 2  # the filter that stores each row less the one above
_LONGEST = 1 << 30  # bytes of a chunk


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of each chunk."""
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


def _check_rows(content: bytes, size: tuple[int, int], bits: int) -> None:
    """Refuse an image of fewer rows than the file tells of, which Pillow would fill with black."""
    interlaced = content[28] == 1
    width, height = size
    passes = [((width - x + i - 1) // i, (height - y + j - 1) // j) for x, y, i, j in _ADAM7]
    expected = sum(h * (1 + (w * bits + 7) // 8) for w, h in (passes if interlaced else [size]) if w > 0)
    unpack, found = zlib.decompressobj(), 0
    for kind, data in _chunks(content):
        while kind == b"IDAT" and data and found < expected:
            found += len(unpack.decompress(data, 1 << 20))
            data = unpack.unconsumed_tail
    if found < expected:
        raise ImageError("broken PNG file (it has fewer rows than it tells of)")


def decode(content: bytes) -> Decoded:
    """Decode a PNG, palettes and transparent colours too; Pillow cuts 16 bits to 8, so OpenCV decodes those."""
    chunks = dict(_chunks(content))
    width, height, depth, colour_type = struct.unpack_from(">2I2B", chunks.get(b"IHDR", bytes(10)))
    check_size(width, height)
    if b"acTL" in chunks:
        raise ImageError("is an animation; it takes one image a file")
    if b"tRNS" in chunks and depth != 8 and colour_type != _PALETTE:
        raise ImageError(f"has a transparent colour and {depth} bits a sample; it takes an alpha channel")
    _check_rows(content, (width, height), depth * _SAMPLES.get(colour_type, 1))
    image = PngImageFile(BytesIO(content))
    least_exact = (b"sRGB",) if b"sRGB" in chunks else (b"gAMA", b"cHRM")  # of which each overrides the next
    told_by = (b"cICP", *(() if b"iCCP" in chunks else least_exact))
    colour = {kind: chunks[kind] for kind in told_by if kind in chunks}
    exif = read_exif(chunks.get(b"eXIf", b""))
    if depth != 16:
        return from_pillow(image)._replace(exif=exif, colour=colour)
    grey_and_alpha = colour_type == _COLOUR_TYPES[2]
    channels = 4 if grey_and_alpha else len(image.getbands())
    array = decode_deep(content, (height, width, channels), np.dtype(np.uint16))
    if grey_and_alpha:  # which OpenCV turns into colour
        array = array[:, :, [0, 3]]
    info = image.info
    return Decoded(array, 65535, info.get("icc_profile") or b"", exif, info.get("dpi"), colour)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode(array: np.ndarray, metadata: Metadata) -> bytes:
    """A PNG of (H, W, channels), uint8 or uint16: Pillow writes 16 bits of grey alone, OpenCV no metadata."""
    height, width, channels = array.shape
    rows = array.astype(array.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    above = np.pad(rows[:-1], ((1, 0), (0, 0)))
    filtered = np.pad(rows - above, ((0, 0), (1, 0)), constant_values=_ABOVE)
    packed = zlib.compress(filtered.tobytes())
    header = struct.pack(">2I5B", width, height, 8 * array.itemsize, _COLOUR_TYPES[channels], 0, 0, 0)
    parts = [(b"IHDR", header), *metadata.colour.items()]
    if len(metadata.icc) > _LONGEST_PROFILE:
        raise ImageError(f"its colour profile of {len(metadata.icc)} bytes is too long for .png; .tiff can hold it")
    if metadata.icc:
        parts.append((b"iCCP", b"ICC\0\0" + zlib.compress(metadata.icc)))
    if metadata.dpi is not None:
        parts.append((b"pHYs", struct.pack(">2IB", *(round(value * _METRE) for value in metadata.dpi), 1)))
    if metadata.exif:
        parts.append((b"eXIf", metadata.exif))
    parts += [(b"IDAT", packed[at : at + _LONGEST]) for at in range(0, len(packed), _LONGEST)]
    return SIGNATURE + b"".join(_chunk(*part) for part in (*parts, (b"IEND", b"")))
