"""The precision of what must be exact, whatever the caller allows elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_LEAST_TOL = 1e-3  # below it TF32, which rounds to 5e-4, keeps a layer from its fixed point

_lock = threading.Lock()
_held: dict[str, tuple[int, list[tuple[Any, str]]]] = {}  # by device: how many are within, what the first changed


def _to_ieee(device_type: str) -> list[tuple[Any, str]]:
    """Set the products and convolutions to full precision; the settings that were changed, and what they were."""
    backends: Any = torch.backends
    if device_type == "cuda":
        parent, settings = backends.cudnn, (backends.cuda.matmul, backends.cudnn.conv)
    else:
        parent, settings = backends.mkldnn, (backends.mkldnn.matmul, backends.mkldnn.conv)
    changed = []
    for setting in settings:
        precision = setting.fp32_precision
        if precision != "ieee":
            inherited = precision == parent.fp32_precision  # and is to go on following it
            changed.append((setting, "none" if inherited else precision))
            setting.fp32_precision = "ieee"
    return changed


@contextmanager
def ieee(device: torch.device) -> Iterator[None]:
    """Neither TF32 nor another reduced precision in float32 matrix products and convolutions within.

    torch's settings are the process's. Of several threads the last to leave restores them.
    """
    with _lock:
        within, changed = _held.get(device.type) or (0, _to_ieee(device.type))
        _held[device.type] = within + 1, changed
    try:
        yield
    finally:
        with _lock:
            within, changed = _held.pop(device.type)
            if within > 1:
                _held[device.type] = within - 1, changed
            else:
                for setting, precision in changed:
                    setting.fp32_precision = precision


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """`ieee`, and no autocast."""
    with ieee(device), torch.autocast(device.type, enabled=False):
        yield


def precision_for(tol: float, device: torch.device) -> AbstractContextManager[None]:
    """`ieee`, where what is to reach the relative residual ``tol`` needs it."""
    return nullcontext() if tol >= _LEAST_TOL else ieee(device)
