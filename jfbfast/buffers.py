"""The buffers of a module as they were, to be put back: they are replaced, and never written over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Kept = list[tuple[nn.Module, str, "Tensor | None"]]


def buffers_of(modules: Iterable[nn.Module]) -> Kept:
    """The buffers of these modules, without those of their children."""
    return [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]


def restore(kept: Kept) -> None:
    """Put the buffers back."""
    for module, name, buffer in kept:
        module._buffers[name] = buffer


@contextmanager
def used(kept: Kept) -> Iterator[None]:
    """Within, the modules have these buffers; those of now come back after."""
    now = [(module, name, module._buffers.get(name)) for module, name, _ in kept]
    restore(kept)
    try:
        yield
    finally:
        restore(now)
