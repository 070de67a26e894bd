"""Full float32 precision for computations that need it, whatever reduced precision the caller allows elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_LEAST_TOL = 1e-3  # TF32 rounds to 5e-4, and so cannot reach a fixed point to a smaller tolerance

_lock = threading.Lock()
_held: dict[str, tuple[int, Callable[[], None]]] = {}  # by device type: how many contexts are open, and the undo


def _to_ieee(device_type: str) -> Callable[[], None]:
    """Set matrix products and convolutions to full precision; return a function that restores the settings.

    torch raises an error when its older settings (``allow_tf32``, `torch.set_float32_matmul_precision`) are read or
    changed while they contradict the newer ones (``fp32_precision``), so both are set.
    """
    backends: Any = torch.backends
    cpu, cuda = backends.mkldnn, backends.cudnn
    settings, parent = [(cpu.matmul, cpu), (cpu.conv, cpu)], cpu
    if device_type == "cuda":  # set_float32_matmul_precision changes the CPU's products too
        settings, parent = [(backends.cuda.matmul, cuda), (cuda.conv, cuda), (cuda.rnn, cuda), (cpu.matmul, cpu)], cuda
    previous = []
    for setting, above in settings:
        inherited = setting.fp32_precision == above.fp32_precision  # "none" lets it go on inheriting
        previous.append((setting, "none" if inherited else setting.fp32_precision))
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
        for setting, precision in previous:
            setting.fp32_precision = precision

    return undo


def _readable(read: Callable[[], Any]) -> Any:
    """Read one of torch's older settings; None if the caller's settings already contradict each other."""
    try:
        return read()
    except RuntimeError:
        return None


class ieee(AbstractContextManager[None]):
    """Use neither TF32 nor any other reduced precision in float32 matrix products and convolutions.

    torch's settings belong to the process. Thread-safe: the first thread saves them, and the last one restores them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type

    def __enter__(self) -> None:
        with _lock:
            count, undo = _held.get(self.device_type) or (0, _to_ieee(self.device_type))
            _held[self.device_type] = count + 1, undo

    def __exit__(self, *_: object) -> None:
        with _lock:
            count, undo = _held.pop(self.device_type)
            if count > 1:
                _held[self.device_type] = count - 1, undo
            else:
                undo()


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    with ieee(device), torch.autocast(device.type, enabled=False):
        yield


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """`ieee`, and no autocast."""
    return _without_autocast(device) if torch.is_autocast_enabled(device.type) else ieee(device)


def precision_for(tol: float, device: torch.device) -> AbstractContextManager[None]:
    """`ieee` if a computation to the relative residual ``tol`` needs it."""
    return nullcontext() if tol >= _LEAST_TOL else ieee(device)
