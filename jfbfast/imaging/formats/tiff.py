"""TIFF of one image: grey or RGB, 8 or 16 bits or float32, with or without alpha.

Pillow decodes 8 bits; it cuts the others, which OpenCV decodes. What either would misread is refused by its tags.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from itertools import accumulate

import numpy as np
from PIL.ExifTags import Base as Tag
from PIL.TiffImagePlugin import TiffImageFile

from jfbfast.imaging.formats.deep import decode_deep
from jfbfast.imaging.formats.eight_bit import from_pillow
from jfbfast.imaging.formats.metadata import Decoded, ImageError, Metadata, check_size, put_dpi, read_exif
from jfbfast.imaging.formats.tags import LONG, SHORT, UNDEFINED, Directory, Value, byte_order, read_directory

_UINT, _FLOAT = 1, 3
_DTYPES: dict[tuple[float, float], np.dtype] = {  # by bits and format
    (8, _UINT): np.dtype(np.uint8),
    (16, _UINT): np.dtype(np.uint16),
    (32, _FLOAT): np.dtype(np.float32),
}
_WHITE_IS_ZERO, _GREY, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6  # photometric interpretations
_CHANNELS = {_GREY: 1, _RGB: 3}
_EIGHT_BIT_CHANNELS = {**_CHANNELS, _WHITE_IS_ZERO: 1, _PALETTE: 1, _YCBCR: 3}
_DEFLATE = (8, 32946)
_STRAIGHT_ALPHA = 2
_IMAGE_DEPTH = 32997  # a tag
_STRIP = 1 << 20  # bytes of a strip that is written, before it is packed


def _as_stored(content: bytes) -> bytes:
    """The file with its orientation set to 1, since decoders differ in what they do about it."""
    order, stored = byte_order(content), bytearray(content)
    (start,) = struct.unpack_from(f"{order}L", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from(f"{order}H", content, entry)[0] == Tag.Orientation:
            struct.pack_into(f"{order}HHLHH", stored, entry, Tag.Orientation, SHORT, 1, 1, 0)
    return bytes(stored)


def _pages(content: bytes, tags: Directory) -> int:
    found = 1
    while tags.following and found < 1000:  # the chain of a broken file can be a ring
        tags = read_directory(content, tags.following)
        found += 1
    return found


def _sample_type(tags: Directory) -> np.dtype:
    bits, formats = tags.numbers(Tag.BitsPerSample, 1), tags.numbers(Tag.SampleFormat, _UINT)
    found = {_DTYPES.get((depth, form)) for depth in bits for form in formats}
    if len(found) != 1 or (dtype := found.pop()) is None:
        raise ImageError(f"its samples are neither 8-bit, 16-bit nor float32: {bits} bits of format {formats}")
    return dtype


def _check_layout(tags: Directory, dtype: np.dtype) -> None:
    """Refuse what a decoder would misread."""
    channels = _EIGHT_BIT_CHANNELS if dtype == np.uint8 else _CHANNELS
    photometric, extra = tags.number(Tag.PhotometricInterpretation), tags.numbers(Tag.ExtraSamples)
    samples = tags.number(Tag.SamplesPerPixel, 1)
    if photometric not in channels:
        taken = ", ".join(map(str, sorted(channels)))
        raise ImageError(f"its photometric interpretation is {photometric}; for {dtype} samples it takes {taken}")
    if extra and (extra != (_STRAIGHT_ALPHA,) or photometric not in _CHANNELS):
        raise ImageError(f"its extra samples are of kind {extra}; it takes one of kind 2, alpha not multiplied in")
    if extra and photometric == _GREY and dtype != np.uint8:
        raise ImageError(f"is grey with alpha, of {dtype} samples; for those it takes alpha beside RGB alone")
    if samples != channels[photometric] + len(extra):
        raise ImageError(f"has {samples} samples a pixel, and no tag says what each is; it takes grey, RGB, and alpha")
    if samples > 1 and tags.number(Tag.PlanarConfiguration, 1) != 1:
        raise ImageError("stores its channels one after the other; it takes them pixel by pixel")
    if tags.number(_IMAGE_DEPTH, 1) != 1:
        raise ImageError(f"is a volume of {tags.number(_IMAGE_DEPTH)} images; it takes one image a file")
    if photometric == _PALETTE and max(tags.numbers(Tag.ColorMap, 0)) < 256:
        raise ImageError("its palette has 8 bits, where TIFF has 16")
    if tags.number(Tag.NewSubfileType, 0) & 1:
        raise ImageError("holds a preview of another image, as raw files of cameras do")


def _check_packed(content: bytes, tags: Directory, most: int) -> None:
    """Verify the checksums of deflate, which libtiff does not."""
    tiled = Tag.TileOffsets in tags
    starts = tags.numbers(Tag.TileOffsets if tiled else Tag.StripOffsets)
    sizes = tags.numbers(Tag.TileByteCounts if tiled else Tag.StripByteCounts)
    for start, size in zip(map(int, starts), map(int, sizes), strict=True):
        unpack = zlib.decompressobj()
        unpack.decompress(content[start : start + size], most)
        if not unpack.eof:
            raise ImageError("its pixels are cut off, or more than the file tells of")


def decode(content: bytes) -> Decoded:
    """Decode a TIFF of one page."""
    tags = read_directory(content)
    width, height = tags.number(Tag.ImageWidth, 0), tags.number(Tag.ImageLength, 0)
    check_size(width, height)
    if (pages := _pages(content, tags)) > 1:
        raise ImageError(f"has {pages} pages; it takes one image a file")
    dtype = _sample_type(tags)
    _check_layout(tags, dtype)
    if tags.number(Tag.Compression, 1) in _DEFLATE:
        largest = max(width * height, tags.number(Tag.TileWidth, 1) * tags.number(Tag.TileLength, 1))
        _check_packed(content, tags, 4 * dtype.itemsize * largest + 1)
    stored = _as_stored(content)
    if dtype == np.uint8:
        array = from_pillow(TiffImageFile(BytesIO(stored))).array
    else:
        array = decode_deep(stored, (height, width, tags.number(Tag.SamplesPerPixel, 1)), dtype)
    profile = tags.get(Tag.InterColorProfile)
    icc = profile.data if isinstance(profile, Value) else b""
    return Decoded(array, 1.0 if dtype == np.float32 else np.iinfo(dtype).max, icc, tags)


def encode(array: np.ndarray, metadata: Metadata) -> bytes:
    """A TIFF of (H, W, channels), uint8, uint16 or float32: OpenCV writes no metadata, Pillow no deep colours."""
    height, width, channels = array.shape
    tags = read_exif(metadata.exif)
    rows = min(height, max(1, _STRIP // (width * channels * array.itemsize)))
    ordered = array.astype(array.dtype.newbyteorder(tags.order))
    strips = [zlib.compress(ordered[at : at + rows].tobytes()) for at in range(0, height, rows)]
    tags.put(Tag.ImageWidth, LONG, width)
    tags.put(Tag.ImageLength, LONG, height)
    tags.put(Tag.BitsPerSample, SHORT, *[8 * array.itemsize] * channels)
    tags.put(Tag.SampleFormat, SHORT, *[_FLOAT if array.dtype.kind == "f" else _UINT] * channels)
    tags.put(Tag.Compression, SHORT, _DEFLATE[0])
    tags.put(Tag.PhotometricInterpretation, SHORT, _GREY if channels == 1 else _RGB)
    tags.put(Tag.SamplesPerPixel, SHORT, channels)
    tags.put(Tag.PlanarConfiguration, SHORT, 1)
    tags.put(Tag.RowsPerStrip, LONG, rows)
    tags.put(Tag.StripByteCounts, LONG, *map(len, strips))
    if channels == 4:
        tags.put(Tag.ExtraSamples, SHORT, _STRAIGHT_ALPHA)
    if metadata.icc:
        tags[Tag.InterColorProfile] = Value(UNDEFINED, metadata.icc)
    if metadata.dpi is not None:
        put_dpi(tags, metadata.dpi)
    tags.put(Tag.StripOffsets, LONG, *[0] * len(strips))
    header = (b"II" if tags.order == "<" else b"MM") + struct.pack(f"{tags.order}HL", 42, 8)
    first = len(header) + len(tags.tobytes(len(header)))
    tags.put(Tag.StripOffsets, LONG, *accumulate([first, *map(len, strips[:-1])]))
    return b"".join([header, tags.tobytes(len(header)), *strips])
