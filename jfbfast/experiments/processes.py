"""The process of a run: its rank under torchrun, and the signals that ask it to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C (and Ctrl-Break), a closed terminal, and what schedulers send before they kill. Windows has the first three.
_NAMES = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if hasattr(signal, name))


def distributed() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The rank of this process under torchrun; 0 for a process on its own, whatever a scheduler has set."""
    return int(os.environ["RANK"]) if distributed() else 0


def world() -> int:
    """How many processes torchrun started on all machines; 1 for a process on its own."""
    return int(os.environ["WORLD_SIZE"]) if distributed() else 1


def launch() -> str:
    """The name of torchrun's call, the same when it starts its processes again; "" for a process on its own."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def check_launch(command: str) -> None:
    """Raise ValueError if srun started several processes, because each would do all the work of ``command``."""
    tasks, place = (os.environ.get(f"SLURM_{name}", "") for name in ("STEP_NUM_TASKS", "PROCID"))
    if not distributed() and (tasks not in ("", "1") or place not in ("", "0")):
        raise ValueError(
            f"srun started {tasks or 'several'} processes, each of which would {command} by itself; "
            f"start one for each machine: srun --ntasks-per-node=1 torchrun … -m jfbfast {command} …"
        )


class Interrupted(BaseException):
    """A signal ends the program. Not an `Exception`, so that no handler for those stops it.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int, state: str = "training had not begun") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {state}")
        self.signal = number


def handle_signals(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Set ``handler`` for `SIGNALS`, except those that are ignored, as under nohup; return the previous handlers.

    Only the main thread can do it; in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(number)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Within this context, `SIGNALS` raise `Interrupted`."""
    before = handle_signals(_interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Make a process that loads images ignore `SIGNALS`, which reach the whole group: its parent ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
