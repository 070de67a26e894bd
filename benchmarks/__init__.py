"""Benchmarks: `python -m jfbfast.benchmarks`, or `jfbfast bench`.

A benchmark is a module here with a function ``run(out, quick, console)`` that writes its files into
the directory ``out``; it is entered below by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

BENCHMARKS = {
    "kernels": "the blur, the data step and Anderson's step against what users write today",
    "paper": "the two tables and two figures of Liu, Tong and Zhao (2024); it has options of its own",
    "step": "a whole training step against the published loop, TorchDEQ and deepinv, at equal true error",
}


def check(names: Sequence[str]) -> None:
    """Raise ValueError, before any of them runs, for a name that is none, and for paper behind an option or a name."""
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
        if name == "paper":
            raise ValueError("paper has options of its own; it takes the first place, as in `bench paper --quick`")


def run(
    name: str, out: Path, quick: bool, console: Console, checkpoint: str | None = None, batch: int | None = None
) -> None:
    """Run one benchmark, write its files into ``out`` (made where missing) and print its tables.

    Raises:
        ValueError: a name that is not in `BENCHMARKS`; for another than step, a ``checkpoint`` of trained weights or
            a ``batch`` of images; a batch below 1.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    given = {"checkpoint": checkpoint, "batch": batch}
    options = {option: value for option, value in given.items() if value is not None}
    if options and name != "step":
        option, value = next(iter(options.items()))
        raise ValueError(f"{option} is {value}; the benchmark step alone takes one, not {name}")
    out.mkdir(parents=True, exist_ok=True)
    import_module(f"jfbfast.benchmarks.{name}").run(out, quick, console, **options)
