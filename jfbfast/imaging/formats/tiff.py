"""TIFF files of one image: grey or RGB, 8 or 16 bits or float32, with or without alpha.

tifffile reads and writes the samples. It returns them as stored, so the layouts that we do not interpret are refused.
"""

from __future__ import annotations

import logging
import struct
from io import BytesIO

import numpy as np
import tifffile
from PIL.ExifTags import Base as Tag

from jfbfast.imaging.formats.metadata import RESOLUTION, Decoded, ImageError, Metadata, check_size, put_dpi, read_exif
from jfbfast.imaging.formats.tags import UNDEFINED, Directory, Value, read_directory

_WHITE_IS_ZERO, _GREY, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6  # photometric interpretations
_CHANNELS: dict[float, int] = {_WHITE_IS_ZERO: 1, _GREY: 1, _RGB: 3, _PALETTE: 1, _YCBCR: 3}
_JPEG = 7  # the compression that turns YCbCr into RGB when it decodes
_STRAIGHT_ALPHA = 2

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # damage raises, and needs no log


def _check_layout(page: tifffile.TiffPage, tags: Directory) -> None:
    """Refuse layouts of samples that `decode` would misinterpret."""
    dtype, extra = page.dtype, tuple(map(int, page.extrasamples))
    if dtype not in (np.uint8, np.uint16, np.float32) or page.bitspersample != 8 * dtype.itemsize:
        raise ImageError(f"its samples are neither 8-bit, 16-bit nor float32: {page.bitspersample} bits, {dtype}")
    photometric = tags.number(Tag.PhotometricInterpretation)
    if photometric not in _CHANNELS:
        taken = ", ".join(map(str, _CHANNELS))
        raise ImageError(f"its photometric interpretation is {photometric}; it takes {taken}")
    if photometric == _YCBCR and page.compression != _JPEG:
        raise ImageError("its colours are YCbCr without JPEG compression; it takes grey and RGB")
    if extra and (extra != (_STRAIGHT_ALPHA,) or photometric not in (_GREY, _RGB)):
        raise ImageError(f"its extra samples are of kind {extra}; it takes one of kind 2, alpha not multiplied in")
    samples = page.samplesperpixel
    if samples != _CHANNELS[photometric] + len(extra):
        raise ImageError(f"has {samples} samples a pixel, and no tag says what each is; it takes grey, RGB, and alpha")
    if samples > 1 and page.planarconfig != 1:
        raise ImageError("stores its channels one after the other; it takes them pixel by pixel")
    if page.imagedepth != 1:
        raise ImageError(f"is a volume of {page.imagedepth} images; it takes one image a file")
    if photometric == _PALETTE and (dtype != np.uint8 or page.colormap is None or page.colormap.max() < 256):
        raise ImageError("its palette has 8 bits, where TIFF has 16, or more than 256 colours")
    if page.is_reduced:
        raise ImageError("holds a preview of another image, as raw files of cameras do")
    if not all(page.databytecounts):  # tifffile would fill these strips with zeros
        raise ImageError("some of its pixels are missing")


def decode(content: bytes) -> Decoded:
    """Decode a TIFF of one page."""
    tags = read_directory(content)
    with tifffile.TiffFile(BytesIO(content)) as file:
        page = file.pages.first
        check_size(page.imagewidth, page.imagelength)
        if len(file.pages) > 1:
            raise ImageError(f"has {len(file.pages)} pages; it takes one image a file")
        _check_layout(page, tags)
        array = page.asarray()
    white = array.dtype.type(1 if array.dtype == np.float32 else np.iinfo(array.dtype).max)
    if page.photometric == _PALETTE:
        array = (page.colormap[:, array] >> 8).astype(np.uint8).transpose(1, 2, 0)
    elif page.photometric == _WHITE_IS_ZERO:
        array = white - array
    profile = tags.get(Tag.InterColorProfile)
    icc = profile.data if isinstance(profile, Value) else b""
    return Decoded(array.reshape(page.imagelength, page.imagewidth, -1), white, icc, tags)


def encode(array: np.ndarray, metadata: Metadata) -> bytes:
    """Encode (H, W, channels), uint8, uint16 or float32, as a TIFF.

    tifffile does not write EXIF. So a second directory, with tifffile's tags and those of EXIF, is appended, and the
    header is made to point to it.
    """
    exif, out, channels = read_exif(metadata.exif), BytesIO(), array.shape[2]
    tifffile.imwrite(
        out,
        array if channels > 1 else array[:, :, 0],
        bigtiff=False,
        byteorder=exif.order,
        photometric="rgb" if channels > 1 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=["unassalpha"] if channels == 4 else None,
        compression="zlib",
        metadata=None,
        software=False,
    )
    content = out.getvalue()
    tags = read_directory(content)
    for tag in RESOLUTION:  # tifffile writes a resolution of 1
        tags.pop(tag, None)
    tags.update(exif)
    if metadata.icc:
        tags[Tag.InterColorProfile] = Value(UNDEFINED, metadata.icc)
    if metadata.dpi is not None:
        put_dpi(tags, metadata.dpi)
    content += bytes(len(content) % 2)
    return content[:4] + struct.pack(f"{tags.order}L", len(content)) + content[8:] + tags.tobytes(len(content))
