"""How times, ratios, the machine and logarithmic axes are shown, in tables and pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter

from .machine import Machine


def digits(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def time(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 0.9995:
            return f"{digits(seconds * scale)} {unit}"
    return f"{digits(seconds * 1e6)} µs"


def ratio(value: float, samples: int) -> str:
    """n×, with a ~ where it was measured once."""
    return f"{'~' if samples == 1 else ''}{digits(value)}×"


def about(machine: Machine) -> str:
    m = machine
    return f"{m.device} ({m.instruction_sets}), {m.threads} threads; {m.kernels}; torch {m.torch}"


def logarithmic(axis: Any, text: Callable[[float], str]) -> None:
    """Mark a logarithmic axis at 1, 2 and 5, or at powers of ten alone where it spans three decades or more."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(lambda value, _: text(value))
    axis.set_minor_formatter(NullFormatter())
