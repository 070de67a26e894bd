"""Signals that end a program, as an exception: a run can save what it has, and say how it goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C, a closed terminal, and what schedulers send before they kill.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Interrupted(BaseException):
    """A signal ends the program. No Exception, so that what mends those lets it pass.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int, told: str = "training had not begun") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {told}")
        self.signal = number


def handle_signals(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Have these signals call ``handler``, but those that are ignored, as under nohup; the handlers that they had.

    Only the main thread can; in another nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(number)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Within, these signals raise `Interrupted`."""
    before = handle_signals(_interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_parent(worker: int) -> None:
    """Have a process that loads images ignore these signals, which reach a whole group: its parent ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
