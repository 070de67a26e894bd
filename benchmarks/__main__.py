"""`python -m jfbfast.benchmarks [NAME…]`; without a name, what there is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from jfbfast import keep_freed_memory

from . import BENCHMARKS, check, run


def main() -> None:
    """The entry point of the module."""
    if sys.argv[1:2] == ["paper"]:
        from .paper.command import app

        app(sys.argv[2:], prog_name="python -m jfbfast.benchmarks paper")
    listing = "\n".join(f"  {name:<10} {text}" for name, text in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m jfbfast.benchmarks",
        description="Measure jfbfast on this machine.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run, of those below")
    parser.add_argument("--out", type=Path, default=Path(), help="directory for the CSV and the picture")
    parser.add_argument("--quick", action="store_true", help="few sizes, a minute or two")
    parser.add_argument("--checkpoint", help="trained weights for step: a shipped model or a file")
    parser.add_argument("--batch", type=int, help="images in a batch of step; by default 8, with --quick 2")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does
    if not arguments.names:
        parser.print_help()
    try:
        check(arguments.names)
        for name in arguments.names:
            run(name, arguments.out, arguments.quick, Console(), arguments.checkpoint, arguments.batch)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
