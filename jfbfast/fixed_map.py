"""A layer held still: the same map at every evaluation of a solve, its state stepped once a forward.

During a solve, and in the layer that carries the gradient, a network in train() normalises by the
running statistics of its batch norms (batch statistics would couple the samples), applies no
dropout, and keeps its spectral-norm weights. What a training forward changes is done here, once:
one power iteration before the solve, one update of the running statistics at the fixed point.
A batch norm with track_running_stats=False couples the samples all the same: eval() leaves it no
statistics but the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from jfbfast.lipschitz import NormalisedConv2d, SpectralNormConv2d


def owner(layer: Callable[..., Tensor]) -> nn.Module | None:
    """The module that a layer is, or is a method of; None for another callable."""
    found = getattr(layer, "__self__", layer)
    return found if isinstance(found, nn.Module) else None


_lock = Lock()
_kept: dict[tuple[int, str], tuple[int, Any]] = {}  # by object and attribute: how many are within, and its value


@contextmanager
def set_aside(objects: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """An attribute of the objects is ``value`` within.

    Of several threads the first to enter keeps what it was, and the last to leave puts that back.
    """
    objects, entered = tuple(objects), []
    try:
        with _lock:
            for each in objects:
                within, kept = _kept.get((id(each), name)) or (0, getattr(each, name))
                setattr(each, name, value)
                _kept[id(each), name] = within + 1, kept
                entered.append(each)
        yield
    finally:
        with _lock:
            for each in entered:
                within, kept = _kept.pop((id(each), name))
                if within > 1:
                    _kept[id(each), name] = within - 1, kept
                else:
                    setattr(each, name, kept)


@contextmanager
def fixed_map(module: nn.Module | None) -> Iterator[None]:
    """``module`` in eval() within; its modules' own modes come back after."""
    modules = () if module is None else module.modules()
    with set_aside((m for m in modules if hasattr(m, "training")), "training", False):  # torch.jit.freeze takes it away
        yield


@contextmanager
def _cached_apart() -> Iterator[None]:
    """torch's `parametrize.cached`, whose one cache else hands what is computed within to a caller's that is open."""
    callers, parametrize._cache = parametrize._cache, {}
    try:
        with parametrize.cached():
            yield
    finally:
        parametrize._cache = callers if parametrize._cache_enabled else {}


@contextmanager
def materialised_weights(module: nn.Module | None) -> Iterator[None]:
    """Normalised weights are computed once within, without gradients."""
    convolutions = [] if module is None else [m for m in module.modules() if isinstance(m, NormalisedConv2d)]
    try:
        for conv in convolutions:
            conv.materialise()
        with _cached_apart():
            yield
    finally:
        for conv in convolutions:
            conv.release()


def step_spectral_norms(module: nn.Module) -> None:
    """One power iteration of every spectral norm in train(): ours, torch's hook and its parametrisation."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, SpectralNormConv2d) and m.training:
                m.power_iteration()
            for hook in m._forward_pre_hooks.values():
                if isinstance(hook, SpectralNorm) and m.training:
                    hook(m, ())
            if parametrize.is_parametrized(m):
                assert isinstance(m.parametrizations, nn.ModuleDict)
                for name, parametrizations in m.parametrizations.items():
                    if any(type(p).__name__ == "_SpectralNorm" and p.training for p in parametrizations.children()):
                        getattr(m, name)  # evaluating it in train() is what steps it


def _update_statistics(norm: _BatchNorm, mean: Tensor, var: Tensor, x: Tensor) -> None:
    """What a training forward of ``norm`` on x does to its running statistics, written to mean and var."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    F.batch_norm(x.detach(), mean, var, training=True, momentum=momentum)


class RunningStatistics:
    """The running statistics of a module's batch norms in train(), as they are now: a trace normalises by them.

    So does whatever backward evaluates again (`torch.utils.checkpoint`), after a training forward has moved on.
    """

    def __init__(self, module: nn.Module | None) -> None:
        modules = () if module is None else module.modules()
        norms = [m for m in modules if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        self.kept = [(norm, _copy(norm.running_mean), _copy(norm.running_var)) for norm in norms]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the batch norms normalise by these, which no update changes."""
        with ExitStack() as stack:
            for norm, mean, var in self.kept:
                stack.callback(setattr, norm, "running_mean", norm.running_mean)
                stack.callback(setattr, norm, "running_var", norm.running_var)
                norm.running_mean, norm.running_var = mean, var
            yield

    @contextmanager
    def updated(self) -> Iterator[None]:
        """Within one evaluation of the layer, every batch norm updates its own, while it normalises by these."""
        with ExitStack() as stack:
            for norm, _, _ in self.kept:
                mean, var = norm.running_mean, norm.running_var

                def hook(norm: nn.Module, args: Any, kwargs: Any, mean: Any = mean, var: Any = var) -> None:
                    with torch.no_grad():
                        assert isinstance(norm, _BatchNorm)
                        _update_statistics(norm, mean, var, args[0] if args else kwargs["input"])

                stack.callback(norm.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(self.used())
            yield


def _copy(statistics: Tensor | None) -> Tensor:
    assert statistics is not None
    return statistics.clone()


class Buffers:
    """A module's buffers as they are now, to undo what a trace changes in its running statistics."""

    def __init__(self, module: nn.Module | None) -> None:
        self.kept = [] if module is None else [(b, b.clone()) for b in module.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, value in self.kept:
            if not torch.equal(buffer, value):  # else an earlier graph may hold it as it is
                buffer.copy_(value)
