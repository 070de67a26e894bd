"""Benchmarks: `python -m jfbfast.benchmarks`, or `jfbfast bench`.

A benchmark is a module here with a function ``run(out, quick, console)`` that writes its files into
the directory ``out``; it is entered below by its name.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from rich.console import Console

BENCHMARKS = {
    "kernels": "the blur, the data step and Anderson's step against what users write today",
}


def run(name: str, out: Path, quick: bool, console: Console) -> None:
    """Run one benchmark, write its files into ``out`` (made where missing) and print its tables.

    Raises:
        ValueError: a name that is not in `BENCHMARKS`.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    out.mkdir(parents=True, exist_ok=True)
    import_module(f"jfbfast.benchmarks.{name}").run(out, quick, console)
