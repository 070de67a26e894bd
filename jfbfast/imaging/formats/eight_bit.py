"""Formats of 8 bits, which Pillow decodes: JPEG, WebP and BMP; and the encoder of JPEG.

Each is decoded by its own class of Pillow, because `Image.open` would accept many other formats too.
"""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.WebPImagePlugin import WebPImageFile

from jfbfast.imaging.formats.metadata import MOST_PIXELS, Decoded, ImageError, Metadata, check_size, read_exif

if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit is below what some cameras make
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MOST_PIXELS)

_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA"}  # what each mode of Pillow is decoded to
_BMP_COLOUR_SPACE, _BMP_PROFILE = 70, 126  # byte offsets in a header of version 5
_BMP_HEADER = 14


def _from_pillow(image: Image.Image, most: int) -> Decoded:
    """Decode an image that Pillow has opened; palettes become colours."""
    check_size(*image.size, most)
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise ImageError(f"is an animation of {frames} frames; it takes one image a file")
    if image.mode not in _MODES:
        raise ImageError(f"its colours are {image.mode}; it takes grey and RGB")
    array = np.asarray(image.convert(_MODES[image.mode]))
    info = image.info
    exif = read_exif(info.get("exif") or b"")
    return Decoded(array.reshape(*array.shape[:2], -1), 255, info.get("icc_profile") or b"", exif, info.get("dpi"))


def decode_jpeg(content: bytes, most: int = MOST_PIXELS) -> Decoded:
    """Decode a JPEG; of several pictures in one file, as phones write them, the first is taken."""
    decoded = _from_pillow(image := JpegImageFile(BytesIO(content)), most)
    return decoded if image.info.get("jfif_unit") else decoded._replace(dpi=None)  # Pillow makes up a resolution


def decode_webp(content: bytes, most: int = MOST_PIXELS) -> Decoded:
    """Decode a WebP of one frame."""
    return _from_pillow(WebPImageFile(BytesIO(content)), most)


def decode_bmp(content: bytes, most: int = MOST_PIXELS) -> Decoded:
    """Decode a BMP, with the profile that version 5 can hold."""
    decoded = _from_pillow(BmpImageFile(BytesIO(content)), most)
    if content[_BMP_COLOUR_SPACE : _BMP_COLOUR_SPACE + 4] == b"DEBM" and content[_BMP_HEADER] == 124:  # embedded
        start, size = struct.unpack_from("<2I", content, _BMP_PROFILE)
        decoded = decoded._replace(icc=content[_BMP_HEADER + start : _BMP_HEADER + start + size])
    return decoded


def encode_jpeg(array: np.ndarray, metadata: Metadata) -> bytes:
    """Encode (H, W, 1 or 3), uint8, as a JPEG of quality 95 without subsampled colours."""
    out, image = BytesIO(), Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    exif = b"Exif\0\0" + metadata.exif if metadata.exif else b""
    kept = {"icc_profile": metadata.icc, "exif": exif, "dpi": metadata.dpi or (0, 0)}
    image.save(out, "JPEG", quality=95, subsampling=0, **kept)
    return out.getvalue()
