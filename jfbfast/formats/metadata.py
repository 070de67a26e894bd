"""What an image file holds beside its pixels: the colour profile, EXIF, the resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

MOST_PIXELS = 250_000_000  # of an image; each takes 12 bytes or more, several times over
_LARGEST_DPI = 65_000  # of what JPEG can tell

# Tags of TIFF that describe how a file lays its pixels out, or hold what is not EXIF; whoever writes sets its own.
_LAYOUT = frozenset().union(
    range(254, 267),
    [273, 274],
    range(277, 282),
    [284],
    range(288, 294),
    [297, 317],
    range(320, 348),
    range(512, 533),
    [700, 33723, 34377, 34675, 37724],
)


class ImageError(ValueError):
    """An image file that cannot be read, written, or used as it is."""


class Metadata(NamedTuple):
    """What a restored photograph keeps of its file.

    Attributes:
        icc: the colour profile; empty for none.
        exif: of an upright image, as JPEG holds it, from ``Exif\\0\\0`` on; empty for none.
        dpi: pixels per inch, across and down.
        colour: chunks of PNG that tell the colour space: gAMA, cHRM, sRGB, cICP.
    """

    icc: bytes = b""
    exif: bytes = b""
    dpi: tuple[float, float] | None = None
    colour: Mapping[bytes, bytes] = {}


class Decoded(NamedTuple):
    """An image as its file stores it, before it is turned upright.

    Attributes:
        array: (H, W, channels): grey or RGB, and alpha if there are 2 or 4; uint8, uint16 or float32.
        white: the sample that stands for 1.
        exif: of the file.
        icc, dpi, colour: of `Metadata`; dpi as the file has it.
    """

    array: np.ndarray
    white: float
    exif: Image.Exif
    icc: bytes = b""
    dpi: Any = None
    colour: Mapping[bytes, bytes] = {}


def check_size(width: int, height: int) -> None:
    """Refuse, before it is decoded, an image that would not fit into memory."""
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        raise ImageError(f"has {width} × {height} pixels; it takes 1 to {MOST_PIXELS // 10**6} megapixels")


def orientation(exif: Image.Exif) -> int:
    """EXIF's orientation, 1 to 8; 1, upright, for what is none."""
    found = exif.get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def kept_exif(exif: Image.Exif, width: int, height: int) -> bytes:
    """What stays true of an upright image of that size; empty for nothing."""
    for tag in _LAYOUT.intersection(exif):
        del exif[tag]
    details = exif.get_ifd(ExifTags.IFD.Exif)
    sizes = {ExifTags.Base.ExifImageWidth: width, ExifTags.Base.ExifImageHeight: height}
    details.update({tag: size for tag, size in sizes.items() if tag in details})
    return exif.tobytes() if len(exif) else b""


def kept_dpi(dpi: Any) -> tuple[float, float] | None:
    """Pixels per inch across and down as numbers; None where they are none that a camera or scanner has."""
    try:
        across, down = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not all(math.isfinite(value) and 1 <= value <= _LARGEST_DPI for value in (across, down)):
        return None
    return across, down
