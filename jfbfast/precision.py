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
        parent, settings = backends.cudnn, (backends.cuda.matmul, backends.cudnn.conv)
    else:
        parent, settings = backends.mkldnn, (backends.mkldnn.matmul, backends.mkldnn.conv)
    changed = []
    try:
        for setting in settings:
            precision = setting.fp32_precision
            if precision != "ieee":
                inherited = precision == parent.fp32_precision  # and is to go on following it
                changed.append((setting, "none" if inherited else precision))
                setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in changed:
            setting.fp32_precision = precision
