"""Keep the buffers of modules and put them back later. Buffers are replaced, never overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Kept = list[tuple[nn.Module, str, "Tensor | None"]]


def buffers_of(modules: Iterable[nn.Module]) -> Kept:
    """The buffers of these modules, excluding their children's."""
    return [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]


def restore(kept: Kept) -> None:
    """Put the buffers back."""
    for module, name, buffer in kept:
        module._buffers[name] = buffer


@contextmanager
def used(kept: Kept) -> Iterator[None]:
    """Give the modules these buffers within the context, and the current ones back afterwards."""
    now = [(module, name, module._buffers.get(name)) for module, name, _ in kept]
    restore(kept)
    try:
        yield
    finally:
        restore(now)
