"""Directories of tags, of which TIFF and EXIF consist: values are kept as the bytes that they are.

Pillow would change types and lose letters on the way through its own.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from fractions import Fraction
from typing import Literal, NamedTuple

EXIF, GPS, INTEROPERABILITY = 0x8769, 0x8825, 0xA005  # tags that hold a directory
BYTE, SHORT, LONG, RATIONAL, UNDEFINED = 1, 3, 4, 5, 7
_SIZES = dict(zip(range(1, 14), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), strict=True))  # bytes of each type's value
_LETTERS = {BYTE: "B", SHORT: "H", LONG: "L", UNDEFINED: "B"}  # of struct


Order = Literal["<", ">"]


class Value(NamedTuple):
    """Of one tag: its type, and its numbers or letters as they are stored."""

    kind: int
    data: bytes


class Directory(dict[int, "Value | Directory"]):
    """Tags and their values.

    Args:
        order: of the bytes.
    """

    def __init__(self, order: Order = "<") -> None:
        super().__init__()
        self.order = order
        self.following = 0  # where the next image's directory starts; 0 where there is none

    def numbers(self, tag: int, *default: float) -> tuple[float, ...]:
        """The tag's values, where they are numbers without a sign; else the default."""
        value = self.get(tag)
        if not isinstance(value, Value):
            return default
        if value.kind == RATIONAL:
            pairs = struct.iter_unpack(f"{self.order}2L", value.data)
            return tuple(float(Fraction(*pair)) if pair[1] else float("nan") for pair in pairs)
        if value.kind not in _LETTERS:
            return default
        letter = _LETTERS[value.kind]
        return struct.unpack(f"{self.order}{len(value.data) // _SIZES[value.kind]}{letter}", value.data)

    def number(self, tag: int, default: int = -1) -> int:
        """The tag's one whole number; the default where it has none, or several."""
        found = self.numbers(tag)
        return found[0] if len(found) == 1 and isinstance(found[0], int) else default

    def put(self, tag: int, kind: int, *numbers: int) -> None:
        """Set a tag to whole numbers."""
        self[tag] = Value(kind, struct.pack(f"{self.order}{len(numbers)}{_LETTERS[kind]}", *numbers))

    def put_ratio(self, tag: int, number: float) -> None:
        """Set a tag to a positive fraction."""
        ratio = Fraction(number).limit_denominator(10_000)
        self[tag] = Value(RATIONAL, struct.pack(f"{self.order}2L", ratio.numerator, ratio.denominator))

    def tobytes(self, start: int) -> bytes:
        """The directory, as a file holds it from byte ``start`` on."""
        entries, beyond = b"", b""
        start += 2 + 12 * len(self) + 4
        for tag, value in sorted(self.items()):
            if isinstance(value, Directory):
                kind, count, data = LONG, 1, value.tobytes(start + len(beyond))
            else:
                kind, count, data = value.kind, len(value.data) // _SIZES[value.kind], value.data
            entries += struct.pack(f"{self.order}HHL", tag, kind, count)
            if isinstance(value, Value) and len(data) <= 4:
                entries += data.ljust(4, b"\0")
            else:
                entries += struct.pack(f"{self.order}L", start + len(beyond))
                beyond += data + bytes(len(data) % 2)
        return struct.pack(f"{self.order}H", len(self)) + entries + bytes(4) + beyond


def byte_order(content: bytes) -> Order:
    """Of what begins as a TIFF."""
    return "<" if content[:2] == b"II" else ">"


def read_directory(content: bytes, start: int | None = None, inner: tuple[int, ...] = (EXIF, GPS)) -> Directory:
    """The directory at ``start``, or else the first one; an entry whose value is not in the file is left out.

    Args:
        content: of a TIFF, or of EXIF without its header.
        inner: tags whose directories are read too.
    """
    found = Directory(byte_order(content))
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
    with suppress(struct.error):  # EXIF can end before
        (found.following,) = struct.unpack_from(f"{found.order}L", content, start + 2 + 12 * count)
    return found
