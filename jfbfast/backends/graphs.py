"""What CUDA graphs of a solve need from all rooms: tensors that stay, and the reasons why a solve was not captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from threading import local
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class _Thread(local):
    kept: list[Any] | None = None


_thread = _Thread()
_captured = 0
_reasons: Counter[str] = Counter()


def cached_tensors(maxsize: int) -> Callable[[Function], Function]:
    """functools.lru_cache, whose results a capture in progress (`keeping`) holds: a graph would outlive their entry."""

    def decorate(function: Function) -> Function:
        cached = lru_cache(maxsize=maxsize)(function)

        @wraps(function)
        def call(*args: Any) -> Any:
            found = cached(*args)
            if _thread.kept is not None:
                _thread.kept.append(found)
            return found

        call.cache_clear, call.cache_info = cached.cache_clear, cached.cache_info  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


@contextmanager
def keeping() -> Iterator[list[Any]]:
    """Collect what the functions with `cached_tensors` return to this thread within the context."""
    kept: list[Any] = []
    _thread.kept = kept
    try:
        yield kept
    finally:
        _thread.kept = None


def note(reason: str = "") -> None:
    """Count a captured solve, or a solve that is not captured for this reason."""
    global _captured
    if reason:
        _reasons[reason] += 1
    else:
        _captured += 1


def describe() -> str:
    """How many solves were captured, and why others were not."""
    told = f"{_captured} solves captured"
    return told + "".join(f"; {count} evaluated eagerly: {reason}" for reason, count in _reasons.most_common(3))
