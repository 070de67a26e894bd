"""Checks of arguments: an error names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer, including numpy's but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``, and at most ``most``."""
    if not is_integer(value) or value < least or (most is not None and value > most):  # type: ignore[operator]
        takes = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; it takes an integer {takes}")


def number(name: str, value: object, valid: Callable[[float], bool], takes: str) -> None:
    """Raise ValueError with the text ``takes`` unless ``value`` is a finite number for which ``valid`` is true."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    try:
        taken = real and math.isfinite(value) and valid(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer too large for a float
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
    """Raise ValueError unless ``shape`` is (B, channels, H, W)."""
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(f"{name} has shape {tuple(shape)}; it takes images (B, {channels}, H, W)")


def read_text(path: Path, most: int) -> str:
    """Read a UTF-8 text file, keeping its line ends; ValueError if it is no file or over ``most`` characters long."""
    if not path.is_file():  # reading a pipe would wait
        raise ValueError("it is no file" if path.exists() else "no such file")
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it is longer than {most} characters")
    return text


def one_line(error: BaseException) -> str:
    """An exception's message on one line of at most 300 characters, or its name if it has none."""
    told = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    return (told if len(told) <= 300 else f"{told[:299]}…") or type(error).__name__
