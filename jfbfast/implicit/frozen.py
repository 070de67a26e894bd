"""A layer held still: the same map at every evaluation of a solve, its state stepped once a forward.

During a solve, and in the layer that carries the gradient, a network in train() normalises by the
running statistics of its batch norms (batch statistics would couple the samples), applies no
dropout, and keeps its spectral-norm weights. What a training forward changes is done here, once:
one power iteration before the solve, one update of the running statistics at the fixed point.
A step never writes over a buffer but puts a new tensor in its place, since an earlier forward's graph may need
the old one. A batch norm with track_running_stats=False couples the samples all the same: eval() leaves it no
statistics but the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from jfbfast import buffers
from jfbfast.models.lipschitz import NormalisedConv2d, SpectralNormConv2d


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
    """``module`` in eval() within; its modules' own modes come back after.

    An instance norm in train() goes on normalising by each sample's own statistics, which couple no samples.
    """
    modules = () if module is None else tuple(module.modules())
    instance_norms = [m for m in modules if isinstance(m, _InstanceNorm) and m.training and m.track_running_stats]
    with ExitStack() as stack:
        for name, value in (("track_running_stats", False), ("running_mean", None), ("running_var", None)):
            stack.enter_context(set_aside(instance_norms, name, value))
        with_modes = [m for m in modules if hasattr(m, "training")]  # torch.jit.freeze takes it away
        stack.enter_context(set_aside(with_modes, "training", False))
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


@torch.inference_mode(False)
@torch.no_grad()
def step_spectral_norms(module: nn.Module) -> None:
    """One power iteration of every spectral norm in train(): ours, torch's hook and its parametrisation."""
    for m in module.modules():
        if not getattr(m, "training", False):
            continue
        for name in _singular_vectors(m):
            m._buffers[name] = m._buffers[name].clone()  # type: ignore[union-attr]
        if isinstance(m, SpectralNormConv2d):
            m.power_iteration()
        for hook in _spectral_norm_hooks(m):
            hook(m, ())
    for m in module.modules():
        if parametrize.is_parametrized(m):
            assert isinstance(m.parametrizations, nn.ModuleDict)
            for name, parametrizations in m.parametrizations.items():
                if any(_is_spectral_norm(p) and p.training for p in parametrizations.children()):
                    getattr(m, name)  # evaluating it in train() is what steps it


def _spectral_norm_hooks(module: nn.Module) -> list[SpectralNorm]:
    """Those of `torch.nn.utils.spectral_norm`."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]


def _is_spectral_norm(module: nn.Module) -> bool:
    """That of `torch.nn.utils.parametrizations`."""
    return type(module).__name__ == "_SpectralNorm"


def _singular_vectors(module: nn.Module) -> list[str]:
    """The buffers that a power iteration of a module writes over."""
    if isinstance(module, SpectralNormConv2d):
        return ["u", "v"]
    if _is_spectral_norm(module):
        return ["_u", "_v"]
    return [f"{hook.name}_{vector}" for hook in _spectral_norm_hooks(module) for vector in "uv"]


def has_running_statistics(module: nn.Module) -> bool:
    """A norm of torch's or of anyone's, whose buffers are called running_…."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return any(name.startswith("running_") and buffer is not None for name, buffer in module._buffers.items())


class TrainingState:
    """What a training forward changes in a module, as it is now: running statistics and power iterations.

    Backward may evaluate parts of the layer again (`torch.utils.checkpoint`) after a later forward has moved on.

    Raises:
        ValueError: a SyncBatchNorm in train() in a group of several processes.
    """

    def __init__(self, module: nn.Module | None) -> None:
        modules = [] if module is None else [m for m in module.modules() if getattr(m, "training", False)]
        self.norms = [m for m in modules if has_running_statistics(m)]
        self.kept = buffers.buffers_of(self.norms)
        self.kept += [(m, name, m._buffers[name]) for m in modules for name in _singular_vectors(m)]
        if any(isinstance(m, nn.SyncBatchNorm) for m in self.norms) and _processes() > 1:
            raise ValueError(
                "layer has a SyncBatchNorm in train() among several processes, which would wait for one whose samples "
                "all diverged; it takes BatchNorm2d, whose statistics DistributedDataParallel keeps equal"
            )

    def restore(self) -> None:
        """Undo what has changed since."""
        buffers.restore(self.kept)

    def used(self) -> AbstractContextManager[None]:
        """Within, the module has this state."""
        return buffers.used(self.kept)

    @contextmanager
    def updated(self) -> Iterator[None]:
        """`used` for one evaluation of the layer, which updates the running statistics.

        Each norm's own forward in train(), whatever its class, does that in a copy of the norm.
        """
        copies = [_with_own_buffers(norm) for norm in self.norms]
        updating = False

        @torch.inference_mode(False)
        @torch.no_grad()
        def update(norm: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal updating
            if updating:  # a norm within another, which has its own update
                return
            updating = True
            try:
                type(norm).forward(copies[self.norms.index(norm)], *args, **kwargs)
            finally:
                updating = False

        with self.used(), ExitStack() as stack:
            for norm in self.norms:
                stack.callback(norm.register_forward_pre_hook(update, with_kwargs=True).remove)
            yield
        for norm, own in zip(self.norms, copies, strict=True):
            norm._buffers.update(own._buffers)


@torch.inference_mode(False)
@torch.no_grad()
def _with_own_buffers(norm: nn.Module) -> nn.Module:
    """A copy that shares all but its buffers, in its mode of now."""
    own = object.__new__(type(norm))  # copy() refuses parametrised modules
    cloned = {name: None if buffer is None else buffer.clone() for name, buffer in norm._buffers.items()}
    own.__dict__ = {**norm.__dict__, "_buffers": cloned}
    return own


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1
