"""Checks of arguments: an error names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path


def is_integer(value: object) -> bool:
    """An integer, of numpy too, which a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``, and at most ``most``."""
    if not is_integer(value) or value < least or (most is not None and value > most):  # type: ignore[operator]
        takes = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; it takes an integer {takes}")


def number(name: str, value: object, valid: Callable[[float], bool], takes: str) -> None:
    """Raise ValueError, saying what it ``takes``, unless ``value`` is a finite number that is ``valid``."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    try:
        taken = real and math.isfinite(value) and valid(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond every float
        taken = False
    if not taken:
        raise ValueError(f"{name} is {value!r}; it takes {takes}")


def positive(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a finite number above 0."""
    number(name, value, lambda v: v > 0, "a positive number")


def non_negative(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least 0."""
    number(name, value, lambda v: v >= 0, "a finite number of at least 0")


def share(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number in (0, 1]."""
    number(name, value, lambda v: 0 < v <= 1, "a number in (0, 1]")


def images(name: str, shape: Sequence[int], channels: int) -> None:
    """Raise ValueError unless a shape is that of images (B, channels, H, W)."""
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(f"{name} has shape {tuple(shape)}; it takes images (B, {channels}, H, W)")


def read_text(path: Path, most: int) -> str:
    """A text file in UTF-8, its line ends as they are; ValueError for no file, or more than ``most`` characters."""
    if not path.is_file():  # a pipe would keep it waiting
        raise ValueError("it is no file" if path.exists() else "no such file")
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it is longer than {most} characters")
    return text


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of 300 characters at most; its name where it says nothing."""
    told = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    return (told if len(told) <= 300 else f"{told[:299]}…") or type(error).__name__
