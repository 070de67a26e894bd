"""The precision of what must be exact, whatever the caller allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 nor another reduced-precision matrix product or convolution within."""
    backends: Any = torch.backends
    if device.type == "cuda":
        settings = (backends.cuda.matmul, backends.cudnn.conv)
    else:
        settings = (backends.mkldnn.matmul, backends.mkldnn.conv)
    precisions = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, precisions, strict=True):
            setting.fp32_precision = precision
