"""TIFF of one image: grey or RGB, 8 or 16 bits or float32, with or without alpha.

Pillow reads the tags and decodes 8 bits; it cuts the others, which OpenCV decodes. What either would misread is refused
by its tags.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from itertools import accumulate

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from jfbfast.formats.deep import decode_deep
from jfbfast.formats.eight_bit import from_pillow
from jfbfast.formats.metadata import Decoded, ImageError, Metadata, check_size

_Tag = ExifTags.Base
_UINT, _FLOAT = 1, 3
_DTYPES: dict[tuple[int, int], np.dtype] = {
    (8, _UINT): np.dtype(np.uint8),
    (16, _UINT): np.dtype(np.uint16),
    (32, _FLOAT): np.dtype(np.float32),
}
_GREY, _RGB, _WHITE_IS_ZERO, _PALETTE, _YCBCR = 1, 2, 0, 3, 6
_CHANNELS = {_GREY: 1, _RGB: 3}
_EIGHT_BIT_CHANNELS = {**_CHANNELS, _WHITE_IS_ZERO: 1, _PALETTE: 1, _YCBCR: 3}
_DEFLATE = (8, 32946)
_STRAIGHT_ALPHA = 2
_PER_INCH = {2: 1.0, 3: 2.54}  # of resolutions per inch and per centimetre
_STRIP = 1 << 20  # bytes of a strip that is written, before it is packed


def _as_stored(content: bytes) -> tuple[bytes, int]:
    """The file with its orientation set to 1, since decoders differ in what they do about it; and its pages."""
    order, pages, stored = "<" if content[:2] == b"II" else ">", 0, bytearray(content)
    (start,) = struct.unpack_from(f"{order}L", content, 4)
    while start and pages < 1000:  # the chain of a broken file can be a ring
        (count,) = struct.unpack_from(f"{order}H", content, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            if struct.unpack_from(f"{order}H", content, entry)[0] == _Tag.Orientation:
                struct.pack_into(f"{order}HHLHH", stored, entry, _Tag.Orientation, 3, 1, 1, 0)
        (start,) = struct.unpack_from(f"{order}L", content, start + 2 + 12 * count)
        pages += 1
    return bytes(stored), pages


def _tuple(tags: ImageFileDirectory_v2, tag: int, *default: int) -> tuple[int, ...]:
    found = tags.get(tag, default)
    return found if isinstance(found, tuple) else (found,)


def _sample_type(tags: ImageFileDirectory_v2) -> np.dtype:
    bits, formats = (set(_tuple(tags, tag, 1)) for tag in (_Tag.BitsPerSample, _Tag.SampleFormat))
    found = _DTYPES.get((bits.pop(), formats.pop()))
    if found is None or bits or formats:
        raise ImageError(
            f"its samples are neither 8-bit, 16-bit nor float32: {tags.get(_Tag.BitsPerSample, 1)} bits of format "
            f"{tags.get(_Tag.SampleFormat, _UINT)}"
        )
    return found


def _check_layout(tags: ImageFileDirectory_v2, dtype: np.dtype) -> None:
    """Refuse what a decoder would misread."""
    channels = _EIGHT_BIT_CHANNELS if dtype == np.uint8 else _CHANNELS
    photometric, extra = tags.get(_Tag.PhotometricInterpretation), _tuple(tags, _Tag.ExtraSamples)
    samples = tags.get(_Tag.SamplesPerPixel, 1)
    if photometric not in channels:
        taken = ", ".join(map(str, sorted(channels)))
        raise ImageError(f"its photometric interpretation is {photometric}; for {dtype} it takes {taken}")
    if extra and (extra != (_STRAIGHT_ALPHA,) or photometric not in _CHANNELS):
        raise ImageError(f"its extra samples are of kind {extra}; it takes one of kind 2, alpha not multiplied in")
    if samples != channels[photometric] + len(extra):
        raise ImageError(f"has {samples} samples a pixel, which are not all told of; it takes grey or RGB, and alpha")
    if samples > 1 and tags.get(_Tag.PlanarConfiguration, 1) != 1:
        raise ImageError("stores its channels one after the other; it takes them pixel by pixel")
    if tags.get(_Tag.NewSubfileType, 0) & 1:
        raise ImageError("holds a preview of another image, as raw files of cameras do")


def _check_packed(content: bytes, tags: ImageFileDirectory_v2, most: int) -> None:
    """Verify the checksums of deflate, which libtiff does not."""
    tiled = _Tag.TileOffsets in tags
    starts = _tuple(tags, _Tag.TileOffsets if tiled else _Tag.StripOffsets)
    sizes = _tuple(tags, _Tag.TileByteCounts if tiled else _Tag.StripByteCounts)
    for start, size in zip(starts, sizes, strict=True):
        unpack = zlib.decompressobj()
        unpack.decompress(content[start : start + size], most)
        if not unpack.eof:
            raise ImageError("its pixels are cut off, or more than the file tells of")


def decode(content: bytes) -> Decoded:
    """Decode a TIFF of one page."""
    tags = ImageFileDirectory_v2(content[:8])
    stream = BytesIO(content)
    stream.seek(tags.next)
    tags.load(stream)
    width, height = tags[_Tag.ImageWidth], tags[_Tag.ImageLength]
    check_size(width, height)
    stored, pages = _as_stored(content)
    if pages > 1:
        raise ImageError(f"has {pages} pages; it takes one image a file")
    dtype = _sample_type(tags)
    _check_layout(tags, dtype)
    if tags.get(_Tag.Compression) in _DEFLATE:
        tile = tags.get(_Tag.TileWidth, width) * tags.get(_Tag.TileLength, height)
        _check_packed(content, tags, 1 + max(tile, width * height) * 4 * dtype.itemsize)
    if dtype == np.uint8:
        array = from_pillow(TiffImageFile(BytesIO(stored))).array
    else:
        array = decode_deep(stored, (height, width, tags.get(_Tag.SamplesPerPixel, 1)), dtype)
    exif = Image.Exif()
    exif.load(content)
    scale = _PER_INCH.get(tags.get(_Tag.ResolutionUnit, 2))
    dpi = None
    if scale is not None and _Tag.XResolution in tags and _Tag.YResolution in tags:
        dpi = tuple(float(tags[tag]) * scale for tag in (_Tag.XResolution, _Tag.YResolution))
    white = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    return Decoded(array, white, exif, tags.get(_Tag.InterColorProfile, b""), dpi)


def encode(array: np.ndarray, metadata: Metadata) -> bytes:
    """A TIFF of (H, W, channels), uint8, uint16 or float32: OpenCV writes no metadata, Pillow no deep colours."""
    height, width, channels = array.shape
    exif, tags = Image.Exif(), ImageFileDirectory_v2()
    exif.load(metadata.exif)
    for tag in exif:
        tags[tag] = exif.get_ifd(tag) if tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo) else exif[tag]
    details = tags.get(ExifTags.IFD.Exif, {})
    if ExifTags.IFD.Interop in details:
        details[ExifTags.IFD.Interop] = exif.get_ifd(ExifTags.IFD.Interop)
    rows = max(1, _STRIP // (width * channels * array.itemsize))
    little = array.astype(array.dtype.newbyteorder("<"))
    strips = [zlib.compress(little[at : at + rows].tobytes()) for at in range(0, height, rows)]
    sizes = [len(strip) for strip in strips]
    tags[_Tag.ImageWidth], tags[_Tag.ImageLength] = width, height
    tags[_Tag.BitsPerSample] = (8 * array.itemsize,) * channels
    tags[_Tag.SampleFormat] = (_FLOAT if array.dtype.kind == "f" else _UINT,) * channels
    tags[_Tag.Compression], tags[_Tag.PlanarConfiguration] = _DEFLATE[0], 1
    tags[_Tag.PhotometricInterpretation] = _GREY if channels == 1 else _RGB
    tags[_Tag.SamplesPerPixel], tags[_Tag.RowsPerStrip] = channels, rows
    tags[_Tag.StripOffsets], tags[_Tag.StripByteCounts] = tuple(accumulate([0, *sizes[:-1]])), tuple(sizes)
    if channels == 4:
        tags[_Tag.ExtraSamples] = _STRAIGHT_ALPHA
    if metadata.icc:
        tags[_Tag.InterColorProfile] = metadata.icc
    if metadata.dpi is not None:
        tags[_Tag.XResolution], tags[_Tag.YResolution] = metadata.dpi
        tags[_Tag.ResolutionUnit] = 2
    out = BytesIO()
    tags.save(out)
    return out.getvalue() + b"".join(strips)
