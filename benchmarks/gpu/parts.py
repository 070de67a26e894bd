"""One part of `jfbfast bench gpu`: `python -m jfbfast.benchmarks.gpu.parts PART`, which that command starts."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

import torch

from . import PARTS


def main() -> None:
    """Run the part that the command line names."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    part = PARTS[sys.argv[1]]
    getattr(import_module(f"jfbfast.benchmarks.gpu.{part.module}"), part.function)()


if __name__ == "__main__":
    main()
