"""The metadata of an image file: colour profile, EXIF, resolution."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jfbfast.imaging.formats.tags import EXIF, LONG, RATIONAL, SHORT, Directory, read_directory

MOST_PIXELS = 250_000_000  # in an image; each takes 12 bytes or more, several times over
RESOLUTION = X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296  # tags
_ORIENTATION, _WIDTH, _HEIGHT = 274, 40962, 40963  # tags
_PER_INCH: dict[float, float] = {2: 1.0, 3: 2.54}  # scale of a resolution by its unit, an inch or a centimetre
_LARGEST_DPI = 65_000  # about the largest that JPEG can hold
_HEADER = b"Exif\0\0"

# Tags of TIFF that describe the layout of a file's pixels, or hold other metadata than EXIF; encoders set their own.
_LAYOUT = frozenset().union(
    range(254, 267), (273, 274), range(277, 282), (284,), range(288, 294), (297, 317), range(320, 348)
)
_LAYOUT |= frozenset(range(512, 533)).union((700, 33723, 34377, 34675, 37724))


class ImageError(ValueError):
    """An image file that cannot be read, written, or used as it is."""


class Metadata(NamedTuple):
    """What a restored photograph keeps of its file.

    Attributes:
        icc: the colour profile; empty for none.
        exif: for an upright image, a directory of tags with TIFF's header; empty for none.
        dpi: pixels per inch, across and down.
        colour: the chunks of a PNG that define its colour space: gAMA, cHRM, sRGB, cICP.
    """

    icc: bytes = b""
    exif: bytes = b""
    dpi: tuple[float, float] | None = None
    colour: Mapping[bytes, bytes] = {}


class Decoded(NamedTuple):
    """An image as its file stores it, before it is turned upright.

    Attributes:
        array: (H, W, channels): grey or RGB, and alpha if there are 2 or 4; uint8, uint16 or float32.
        white: the sample value of white.
        icc: as in `Metadata`.
        exif: tags of the file.
        dpi: pixels per inch, along the array's rows and columns; None to take those of the tags, if there are any.
        colour: as in `Metadata`.
    """

    array: np.ndarray
    white: float
    icc: bytes = b""
    exif: Directory = Directory()
    dpi: Sequence[float] | None = None
    colour: Mapping[bytes, bytes] = {}


def check_size(width: int, height: int, most: int = MOST_PIXELS) -> None:
    """Raise ImageError for an image of more than ``most`` pixels, before it is decoded."""
    if width < 1 or height < 1 or width * height > most:
        raise ImageError(f"has {width} × {height} pixels; it takes up to {most / 10**6:g} million")


def read_exif(content: bytes) -> Directory:
    """Read the tags of EXIF data, with or without the header that JPEG has."""
    content = content.removeprefix(_HEADER)
    if not content:
        return Directory()
    try:
        return read_directory(content)
    except struct.error as error:
        raise ImageError("its EXIF data is damaged") from error


def orientation(exif: Directory) -> int:
    """Return EXIF's orientation, 1 to 8; 1, upright, if it is missing or invalid."""
    found = exif.number(_ORIENTATION)
    return int(found) if 1 <= found <= 8 else 1


def kept_exif(exif: Directory, width: int, height: int, dpi: tuple[float, float] | None) -> bytes:
    """Return the EXIF data that stays true of an upright image with that size and resolution."""
    kept, details = Directory(exif.order), exif.get(EXIF)
    kept.update({tag: value for tag, value in exif.items() if tag not in _LAYOUT})
    if isinstance(details, Directory):
        for tag, side in ((_WIDTH, width), (_HEIGHT, height)):
            if tag in details:
                details.put(tag, LONG, side)
    if dpi is not None and X_RESOLUTION in kept:
        put_dpi(kept, dpi)
    if not kept:
        return b""
    start = struct.pack(f"{kept.order}HL", 42, 8)
    return (b"II" if kept.order == "<" else b"MM") + start + kept.tobytes(8)


def put_dpi(tags: Directory, dpi: tuple[float, float]) -> None:
    """Set the tags of the resolution."""
    tags.put(X_RESOLUTION, RATIONAL, dpi[0])
    tags.put(Y_RESOLUTION, RATIONAL, dpi[1])
    tags.put(RESOLUTION_UNIT, SHORT, 2)


def kept_dpi(dpi: Sequence[float] | None, exif: Directory) -> tuple[float, float] | None:
    """Return the pixels per inch across and down; None if the file has none, or none that is plausible."""
    if dpi is None:
        scale = _PER_INCH.get(exif.number(RESOLUTION_UNIT) if RESOLUTION_UNIT in exif else 2, math.nan)
        dpi = [scale * exif.number(tag) for tag in (X_RESOLUTION, Y_RESOLUTION)]
    if not all(1 <= number <= _LARGEST_DPI for number in dpi):
        return None
    return float(dpi[0]), float(dpi[1])
