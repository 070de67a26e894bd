"""Full float32 precision for computations that need it, whatever reduced precision the caller allows elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch

_LEAST_TOL = 1e-3  # TF32 rounds to 5e-4, and so cannot reach a fixed point to a smaller tolerance

_lock = threading.Lock()
# By device type: the number of open contexts, and the stack that restores the settings.
_held: dict[str, tuple[int, ExitStack]] = {}


def _to_ieee(device_type: str) -> ExitStack:
    """Set matrix products and convolutions to full precision; closing the result restores the settings.

    torch raises an error when its older settings (``allow_tf32``, `torch.set_float32_matmul_precision`) are read or
    changed while they contradict the newer ones (``fp32_precision``), so both are set.
    """
    backends: Any = torch.backends
    cpu, cuda = backends.mkldnn, backends.cudnn
    settings, parent = [(cpu.matmul, cpu), (cpu.conv, cpu)], cpu
    if device_type == "cuda":  # set_float32_matmul_precision changes the CPU's products too
        settings, parent = [(backends.cuda.matmul, cuda), (cuda.conv, cuda), (cuda.rnn, cuda), (cpu.matmul, cpu)], cuda
    undo = ExitStack()
    for setting, above in settings:
        inherited = setting.fp32_precision == above.fp32_precision  # "none" lets it go on inheriting
        undo.callback(setattr, setting, "fp32_precision", "none" if inherited else setting.fp32_precision)
    if device_type == "cuda":
        with suppress(RuntimeError):  # the caller's settings may contradict each other already
            if cuda.allow_tf32:
                undo.callback(setattr, cuda, "allow_tf32", True)
                cuda.allow_tf32 = False
        with suppress(RuntimeError):
            if (matmul := torch.get_float32_matmul_precision()) != "highest":
                undo.callback(torch.set_float32_matmul_precision, matmul)
                torch.set_float32_matmul_precision("highest")
    for setting, above in settings:
        if above is parent and setting.fp32_precision != "ieee":
            setting.fp32_precision = "ieee"
    return undo


class ieee(AbstractContextManager[None]):
    """Use neither TF32 nor any other reduced precision in float32 matrix products and convolutions.

    torch's settings belong to the process. Thread-safe: the first thread saves them, and the last one restores them.
    Where the CPU's are as they have to be, which is torch's default, nothing is saved: every data step enters this.
    """

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.holds = True

    def __enter__(self) -> None:
        with _lock:
            held = _held.get(self.device_type)
            if held is None and self.device_type == "cpu":
                cpu: Any = torch.backends.mkldnn
                self.holds = not {cpu.matmul.fp32_precision, cpu.conv.fp32_precision} <= {"ieee", "none"}
            if self.holds:
                count, undo = held or (0, _to_ieee(self.device_type))
                _held[self.device_type] = count + 1, undo

    def __exit__(self, *_: object) -> None:
        if not self.holds:
            return
        with _lock:
            count, undo = _held.pop(self.device_type)
            if count > 1:
                _held[self.device_type] = count - 1, undo
            else:
                undo.close()


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
