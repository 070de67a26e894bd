"""Warnings that point at the line of whoever called jfbfast."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from jfbfast.solvers import ConvergenceWarning

_INNER = tuple(str(folder) + os.sep for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))


def warn_unconverged(message: str) -> None:
    """A `ConvergenceWarning` attributed to the nearest caller outside jfbfast and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_code.co_filename.startswith(_INNER) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)
