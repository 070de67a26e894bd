"""TIFF files of one image: grey or RGB, 8 or 16 bits or float32, with or without alpha.

tifffile reads and writes the samples. It returns them as stored, so layouts that we do not interpret are refused.
"""

from __future__ import annotations

import logging
import struct
from io import BytesIO

import numpy as np
import tifffile
from PIL.ExifTags import Base as Tag

from jfbfast.imaging.formats.metadata import (
    MOST_PIXELS,
    RESOLUTION,
    Decoded,
    ImageError,
    Metadata,
    check_size,
    put_dpi,
    read_exif,
)
from jfbfast.imaging.formats.tags import UNDEFINED, Directory, Value, codes, read_directory

_WHITE_IS_ZERO, _GREY, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6  # photometric interpretations
_CHANNELS: dict[float, int] = {_WHITE_IS_ZERO: 1, _GREY: 1, _RGB: 3, _PALETTE: 1, _YCBCR: 3}
_JPEG = 7  # the compression that turns YCbCr into RGB when it decodes
_UNSPECIFIED, _STRAIGHT_ALPHA = 0, 2  # kinds of extra samples
_MOST_SAMPLES = 4  # for each pixel of the largest image
_PLANES = 2  # the planar configuration of channels that are stored one after the other
# The tags that say how samples are stored: tifffile leaves out one that is damaged, and takes its default.
_STORAGE = frozenset((*range(254, 260), 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347))

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # damaged files raise errors, which need no log


def _check_storage(page: tifffile.TiffPage) -> None:
    """Refuse samples of other types than ours, and files that hold no whole image."""
    dtype = page.dtype
    if dtype not in (np.uint8, np.uint16, np.float32) or page.bitspersample != 8 * dtype.itemsize:
        raise ImageError(f"its samples are neither 8-bit, 16-bit nor float32: {page.bitspersample} bits, {dtype}")
    if page.imagedepth != 1:
        raise ImageError(f"is a volume of {page.imagedepth} images; it takes one image a file")
    if page.is_reduced:
        raise ImageError("holds a preview of another image, as raw files of cameras do")
    if not all(page.databytecounts):  # tifffile would fill these strips with zeros
        raise ImageError("some of its pixels are missing")


def _check_layout(page: tifffile.TiffPage, tags: Directory) -> None:
    """Refuse layouts of samples that `decode` would misinterpret."""
    _check_storage(page)
    dtype, extra = page.dtype, tuple(map(int, page.extrasamples))
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
    if photometric == _PALETTE and (dtype != np.uint8 or page.colormap is None or page.colormap.max() < 256):
        raise ImageError("its palette has 8 bits, where TIFF has 16, or more than 256 colours")


def _only_page(file: tifffile.TiffFile, content: bytes, most: int = MOST_PIXELS) -> tifffile.TiffPage:
    page = file.pages.first
    check_size(page.imagewidth, page.imagelength, most)
    samples = page.imagewidth * page.imagelength * page.samplesperpixel
    if samples > _MOST_SAMPLES * most:  # a small file may say that it has thousands of channels
        told = f"has {samples} samples in its {page.samplesperpixel} channels"
        raise ImageError(f"{told}; it takes {_MOST_SAMPLES * most}")
    if len(file.pages) > 1:
        raise ImageError(f"has {len(file.pages)} pages; it takes one image a file")
    damaged = _STORAGE.intersection(codes(content)).difference(tag.code for tag in page.tags)
    if damaged:
        raise ImageError(f"its tag {min(damaged)} is damaged")
    return page


def decode_channels(content: bytes) -> np.ndarray | None:
    """Decode the samples (H, W, C) of a TIFF whose extra samples are channels of their own; None for any other TIFF.

    Such files have grey or RGB and extra samples of an unspecified kind, pixel by pixel or channel after channel, as
    programs for satellite and microscope images write them.
    """
    if content[:4] not in (b"II*\0", b"MM\0*"):
        return None
    with tifffile.TiffFile(BytesIO(content)) as file:
        page = file.pages.first
        extra, samples = tuple(map(int, page.extrasamples)), page.samplesperpixel
        several = samples > _CHANNELS.get(int(page.photometric), samples) and set(extra) <= {_UNSPECIFIED}
        planes = samples > 1 and page.planarconfig == _PLANES and set(extra) <= {_UNSPECIFIED}
        if page.photometric not in (_GREY, _RGB) or not (several or planes):
            return None
        page = _only_page(file, content)
        _check_storage(page)
        array = page.asarray()
    return array.transpose(1, 2, 0) if page.planarconfig == _PLANES else array


def decode(content: bytes, most: int = MOST_PIXELS) -> Decoded:
    """Decode a TIFF of one page."""
    tags = read_directory(content)
    with tifffile.TiffFile(BytesIO(content)) as file:
        page = _only_page(file, content, most)
        _check_layout(page, tags)
        array = page.asarray()
    white = array.dtype.type(1 if array.dtype == np.float32 else np.iinfo(array.dtype).max)
    if page.photometric == _PALETTE:
        assert page.colormap is not None
        array = (page.colormap[:, array] >> 8).astype(np.uint8).transpose(1, 2, 0)
    elif page.photometric == _WHITE_IS_ZERO:
        array = white - array
    profile = tags.get(Tag.InterColorProfile)
    icc = profile.data if isinstance(profile, Value) else b""
    return Decoded(array.reshape(page.imagelength, page.imagewidth, -1), white, icc, tags)


def encode(array: np.ndarray, metadata: Metadata) -> bytes:
    """Encode (H, W, channels), uint8, uint16 or float32, as a TIFF.

    tifffile does not write EXIF. So a second directory, with its tags and EXIF's, is appended and replaces the first.
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
