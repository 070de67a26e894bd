"""Directories of tags, which TIFF and EXIF consist of. Values stay the bytes that the file holds.

Pillow's own directories would change the types, and replace letters that are not ASCII.
"""

from __future__ import annotations

import math
import struct
from contextlib import suppress
from fractions import Fraction
from typing import Literal, NamedTuple

EXIF, GPS, INTEROPERABILITY = 0x8769, 0x8825, 0xA005  # tags that hold a directory
BYTE, SHORT, LONG, RATIONAL, UNDEFINED = 1, 3, 4, 5, 7  # types
_SIZES = dict(zip(range(1, 14), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), strict=True))  # bytes of each type's value
_FORMATS = {BYTE: "B", SHORT: "H", LONG: "L", RATIONAL: "2L"}  # the formats of these types in struct

Order = Literal["<", ">"]


class Value(NamedTuple):
    """The type of a tag, and its numbers or letters as the file stores them."""

    kind: int
    data: bytes

    @property
    def length(self) -> int:
        """How many numbers or letters there are."""
        return len(self.data) // _SIZES[self.kind]


class Directory(dict[int, "Value | Directory"]):
    """Tags and their values, in a byte order."""

    def __init__(self, order: Order = "<") -> None:
        super().__init__()
        self.order = order

    def number(self, tag: int) -> float:
        """Return the one number of a tag; NaN if it has none, or several."""
        value = self.get(tag)
        if not isinstance(value, Value) or value.kind not in _FORMATS or value.length != 1:
            return math.nan
        number, *denominator = struct.unpack(self.order + _FORMATS[value.kind], value.data)
        return number / (denominator[0] or math.nan) if denominator else number

    def put(self, tag: int, kind: int, number: float) -> None:
        """Set a tag to a number without a sign."""
        ratio = Fraction(number).limit_denominator(10_000).as_integer_ratio()
        numbers = ratio if kind == RATIONAL else (int(number),)
        self[tag] = Value(kind, struct.pack(self.order + _FORMATS[kind], *numbers))

    def tobytes(self, start: int) -> bytes:
        """Return the bytes of the directory in a file, if it starts at byte ``start``."""
        entries, beyond = b"", b""
        start += 2 + 12 * len(self) + 4
        for tag, value in sorted(self.items()):
            if isinstance(value, Directory):
                kind, count, data = LONG, 1, value.tobytes(start + len(beyond))
            else:
                kind, count, data = value.kind, value.length, value.data
            entries += struct.pack(f"{self.order}HHL", tag, kind, count)
            if isinstance(value, Value) and len(data) <= 4:
                entries += data.ljust(4, b"\0")
            else:
                entries += struct.pack(f"{self.order}L", start + len(beyond))
                beyond += data + bytes(len(data) % 2)
        return struct.pack(f"{self.order}H", len(self)) + entries + bytes(4) + beyond


def read_directory(content: bytes, start: int | None = None, inner: tuple[int, ...] = (EXIF, GPS)) -> Directory:
    """Read the directory at ``start``, by default the first one. Entries with values outside the file are left out.

    Args:
        content: a TIFF file, or EXIF data without its header.
        start: byte at which the directory starts.
        inner: tags with directories that are read too.

    Raises:
        struct.error: the directory is cut off.
    """
    found = Directory("<" if content[:2] == b"II" else ">")
    if start is None:
        (start,) = struct.unpack_from(f"{found.order}L", content, 4)
    (count,) = struct.unpack_from(f"{found.order}H", content, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, values, place = struct.unpack_from(f"{found.order}HHLL", content, entry)
        size = _SIZES.get(kind, 0) * values
        if tag in inner:
            with suppress(struct.error):
                found[tag] = read_directory(content, place, (INTEROPERABILITY,) if tag == EXIF else ())
            continue
        if size <= 4:
            place = entry + 8
        if 0 < size <= len(content) - place:
            found[tag] = Value(kind, content[place : place + size])
    return found


def codes(content: bytes) -> list[int]:
    """The tags of the first directory, whether or not their values can be read."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}L", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    return [struct.unpack_from(f"{order}H", content, start + 2 + 12 * entry)[0] for entry in range(count)]
