"""`python -m jfbfast.benchmarks.gpu [PART…]`: the parts of `bench gpu --quick`, or those named; check.sh runs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from . import run


def main() -> None:
    """Run them; files go to $OUT, or the directory gpu-check."""
    try:
        run(Path(os.environ.get("OUT", "gpu-check")), True, Console(width=120), sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
