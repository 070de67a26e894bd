"""The warning of what did not converge, which points at the line of whoever called jfbfast."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_INNER = tuple(str(Path(package).parent) + os.sep for package in (__file__, torch.__file__))


class ConvergenceWarning(UserWarning):
    """Some samples of a batch did not reach the tolerance asked for."""


def warn_unconverged(message: str) -> None:
    """A `ConvergenceWarning` attributed to the nearest caller outside jfbfast and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_code.co_filename.startswith(_INNER) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)
