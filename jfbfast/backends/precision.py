"""The precision of what must be exact, whatever the caller allows elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_LEAST_TOL = 1e-3  # below it TF32, which rounds to 5e-4, keeps a layer from its fixed point

_lock = threading.Lock()
_held: dict[str, tuple[int, Callable[[], None]]] = {}  # by device: how many are within, and what undoes the first's


def _to_ieee(device_type: str) -> Callable[[], None]:
    """Set the products and convolutions to full precision; return what undoes it.

    torch raises where its older settings (``allow_tf32``, `torch.set_float32_matmul_precision`) are read or changed
    while they contradict the newer ones (``fp32_precision``), so both are set.
    """
    backends: Any = torch.backends
    cpu, cuda = backends.mkldnn, backends.cudnn
    settings, parent = [(cpu.matmul, cpu), (cpu.conv, cpu)], cpu
    if device_type == "cuda":  # and the CPU's products, which set_float32_matmul_precision changes too
        settings, parent = [(backends.cuda.matmul, cuda), (cuda.conv, cuda), (cuda.rnn, cuda), (cpu.matmul, cpu)], cuda
    kept = []
    for setting, above in settings:
        inherited = setting.fp32_precision == above.fp32_precision  # and is to go on following it
        kept.append((setting, "none" if inherited else setting.fp32_precision))
    matmul = "highest" if parent is cpu else _readable(torch.get_float32_matmul_precision)
    convolutions = parent is cuda and _readable(lambda: cuda.allow_tf32)
    reduced = matmul not in (None, "highest")
    if reduced:
        torch.set_float32_matmul_precision("highest")
    if convolutions:
        cuda.allow_tf32 = False
    for setting, above in settings:
        if above is parent and setting.fp32_precision != "ieee":
            setting.fp32_precision = "ieee"

    def undo() -> None:
        if reduced:
            torch.set_float32_matmul_precision(matmul)
        if convolutions:
            cuda.allow_tf32 = True
        for setting, precision in kept:
            setting.fp32_precision = precision

    return undo


def _readable(read: Callable[[], Any]) -> Any:
    """What one of torch's older settings is; None where the caller's settings contradict each other already."""
    try:
        return read()
    except RuntimeError:
        return None


@contextmanager
def ieee(device: torch.device) -> Iterator[None]:
    """Neither TF32 nor another reduced precision in float32 matrix products and convolutions within.

    torch's settings are the process's. Of several threads the last to leave restores them.
    """
    with _lock:
        within, undo = _held.get(device.type) or (0, _to_ieee(device.type))
        _held[device.type] = within + 1, undo
    try:
        yield
    finally:
        with _lock:
            within, undo = _held.pop(device.type)
            if within > 1:
                _held[device.type] = within - 1, undo
            else:
                undo()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """`ieee`, and no autocast."""
    with ieee(device), torch.autocast(device.type, enabled=False):
        yield


def precision_for(tol: float, device: torch.device) -> AbstractContextManager[None]:
    """`ieee`, where what is to reach the relative residual ``tol`` needs it."""
    return nullcontext() if tol >= _LEAST_TOL else ieee(device)
