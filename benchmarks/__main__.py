"""`python -m jfbfast.benchmarks`: the same as `jfbfast bench`, but without arguments it prints the help."""

from __future__ import annotations

import sys

from jfbfast.cli import app


def main() -> None:
    """The entry point of the module."""
    app(["bench", *(sys.argv[1:] or ["--help"])], prog_name="jfbfast")


if __name__ == "__main__":
    main()
