"""The warning about samples that did not converge; it points at the user's line that called jfbfast."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_INNER = tuple(str(Path(package).parent) + os.sep for package in (__file__, torch.__file__))


class ConvergenceWarning(UserWarning):
    """Some samples of a batch did not reach the requested tolerance.

    Example:
        >>> import warnings, torch, jfbfast
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     x = jfbfast.fixed_point(lambda x: 0.9 * x + 1, torch.zeros(1, 2), solver=jfbfast.Picard(max_iter=3))
        >>> caught[0].category.__name__
        'ConvergenceWarning'
    """


def warn_unconverged(message: str) -> None:
    """Issue a `ConvergenceWarning`, attributed to the nearest caller outside of jfbfast and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_code.co_filename.startswith(_INNER) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)
