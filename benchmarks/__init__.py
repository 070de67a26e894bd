"""Benchmarks: `jfbfast bench`, or `python -m jfbfast.benchmarks`.

A benchmark is a module here with a function ``run(out, quick, console)`` that writes its files into the directory
``out``; `BENCHMARKS` lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

BENCHMARKS = {
    "gpu": "is jfbfast right on this GPU, and how fast: checks, kernels, training steps",
    "kernels": "the blur, the data step and Anderson's step against what users write today",
    "paper": "the two tables and two figures of Liu, Tong and Zhao (2024); it has options of its own",
    "step": "a whole training step against the published loop, TorchDEQ and deepinv, at equal true error",
}


def check(names: Sequence[str]) -> None:
    """Raise ValueError for an unknown name, and for paper among other names, before any benchmark runs."""
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
        if name == "paper":
            raise ValueError("paper has options of its own; it takes the first place, as in `bench paper --quick`")


def run(name: str, out: Path, quick: bool, console: Console, **options: Any) -> None:
    """Run one benchmark, write its files into ``out`` (created if missing) and print its tables.

    The benchmark step takes the options ``checkpoint``, ``batch`` and ``size``; None is the same as none given.

    Raises:
        ValueError: an unknown name; an option of step for another benchmark; a batch or size that is too small.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    given = {option: value for option, value in options.items() if value is not None}
    if given and name != "step":
        option, value = next(iter(given.items()))
        raise ValueError(f"{option} is {value}; the benchmark step alone takes one, not {name}")
    out.mkdir(parents=True, exist_ok=True)
    import_module(f"jfbfast.benchmarks.{name}").run(out, quick, console, **given)
