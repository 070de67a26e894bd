"""Hold a layer still: it is the same map at every evaluation of one forward, and changes its state once.

During a solve, and in the application that carries the gradient, a network in train() normalises by the running
statistics of its batch norms (batch statistics would couple the samples), applies no dropout, and keeps its spectral
norms. What a training forward changes happens here, once: one power iteration before the solve, and one update of the
running statistics at the fixed point. Buffers are replaced and never written over, because the graph of an earlier
forward may still need the old ones.

Threads: in eval() nothing of a module is changed but what each thread fixes for itself, so that threads may solve with
it, and one may differentiate it, at the same time. A module in train() belongs to one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import get_ident
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from jfbfast import buffers

Item = TypeVar("Item")
Modules = nn.Module | list[nn.Module] | None  # a module, or all modules in it


class NormalisedConv2d(nn.Conv2d):
    """Conv2d whose weight is W divided by a norm of it; a forward computes the quotients once, by `normalised_weights`.

    Arguments as in torch.nn.Conv2d. Unlike torch's parametrisations it can be pickled.

    A class defines `normalised_weight` and `power_iteration` of one convolution. It may also compute those of several
    together, by `normalised_weights` and `power_iterations`, which a solve calls; both must agree.

    Attributes:
        iterated: names of the buffers that `power_iteration` replaces.
    """

    iterated: tuple[str, ...] = ()

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        # The weight, the quotient that stands for it, and the thread for which it does.
        self._materialised: tuple[Tensor, Tensor, int] | None = None

    def normalised_weight(self) -> Tensor:
        """The weight divided by its norm, differentiable in W."""
        raise NotImplementedError

    def power_iteration(self) -> None:
        """Update the estimate of the norm by one step, for a norm that is iterated; it replaces the buffers."""

    @classmethod
    def normalised_weights(cls, convolutions: Sequence[Any]) -> list[Tensor]:
        """The `normalised_weight` of each of several convolutions of this class."""
        return [conv.normalised_weight() for conv in convolutions]

    @classmethod
    def power_iterations(cls, convolutions: Sequence[Any]) -> None:
        """The `power_iteration` of several convolutions of this class."""
        for conv in convolutions:
            conv.power_iteration()

    def current_weight(self) -> Tensor:
        """The weight that this thread has fixed, or else a newly computed one: also if W has been replaced since."""
        fixed = self._materialised  # read once: another thread may fix its own, which may have no gradient
        if fixed is None or fixed[0] is not self.weight:
            return self.normalised_weight()
        own = torch.compiler.is_compiling() or fixed[2] == get_ident()
        return fixed[1] if own else self.normalised_weight()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._materialised is None:
            self.power_iteration()
        return self._conv_forward(x, self.current_weight(), self.bias)


def owner(layer: Callable[..., Tensor]) -> nn.Module | None:
    """The layer itself if it is a module, or the module whose method it is; None for any other callable."""
    found = getattr(layer, "__self__", layer)
    return found if isinstance(found, nn.Module) else None


def submodules(module: Modules) -> list[nn.Module]:
    """`module.modules()` as a list, and empty for None; without torch's generators, which cost more than a solver.

    Such a list is returned as it is: one forward makes it once.
    """
    if isinstance(module, list):
        return module
    found: dict[nn.Module, None] = {}
    left = [module]
    while left:
        each = left.pop()
        if each is not None and each not in found:
            found[each] = None
            if each._modules:
                left.extend([*each._modules.values()][::-1])
    return list(found)


def parameters_of(module: Modules) -> list[nn.Parameter]:
    """The parameters of a module and its submodules, in the order of `module.parameters()`; empty for None."""
    return [p for m in submodules(module) for p in m._parameters.values() if p is not None]


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in groups that have the same key, each in the items' order."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _in_training(module: Modules) -> list[nn.Module]:
    return [m for m in submodules(module) if getattr(m, "training", False)]  # torch.jit.freeze takes it away


_SETATTR: object = nn.Module.__setattr__


@contextmanager
def assigned(objects: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of the objects to ``value`` within the context, and restore it after."""
    changed = []
    try:
        for each in objects:
            earlier = getattr(each, name)
            plain = name in vars(each) and type(each).__setattr__ is _SETATTR
            if plain:  # torch's own __setattr__ costs more than the rest of a solve
                vars(each)[name] = value
            else:
                setattr(each, name, value)
            changed.append((each, earlier, plain))
        yield
    finally:
        for each, earlier, plain in changed:
            if plain:
                vars(each)[name] = earlier
            else:
                setattr(each, name, earlier)


@contextmanager
def frozen(module: Modules) -> Iterator[None]:
    """``module`` in eval() within the context; the modes come back after it.

    An instance norm in train() continues to normalise by each sample's own statistics, which couples no samples.
    """
    training = _in_training(module)
    if not training:
        yield
        return
    instance_norms = [m for m in training if isinstance(m, _InstanceNorm) and m.track_running_stats]
    # Assigned to their dictionaries, since torch's own __setattr__ costs more than the rest of a solve.
    plain = [m.__dict__ for m in training if type(m).__setattr__ is _SETATTR]
    others = [m for m in training if type(m).__setattr__ is not _SETATTR]
    with ExitStack() as stack:
        for name, value in (("track_running_stats", False), ("running_mean", None), ("running_var", None)):
            stack.enter_context(assigned(instance_norms, name, value))
        stack.enter_context(assigned(others, "training", False))
        try:
            for attributes in plain:
                attributes["training"] = False
            yield
        finally:
            for attributes in plain:
                attributes["training"] = True


@contextmanager
def _own_parametrization_cache() -> Iterator[None]:
    """Like `parametrize.cached()`, but with a fresh cache, so nothing leaks into one the caller has open."""
    callers, parametrize._cache = parametrize._cache, {}
    try:
        with parametrize.cached():
            yield
    finally:
        parametrize._cache = callers if parametrize._cache_enabled else {}


def normalised_weights(module: Modules) -> dict[NormalisedConv2d, Tensor]:
    """Every normalised weight of a module, differentiable in the weights; those of one class are computed together."""
    found: dict[NormalisedConv2d, Tensor] = {}
    for group in grouped([m for m in submodules(module) if isinstance(m, NormalisedConv2d)], type):
        found.update(zip(group, type(group[0]).normalised_weights(group), strict=True))
    return found


@contextmanager
def fixed_weights(weights: Mapping[NormalisedConv2d, Tensor]) -> Iterator[None]:
    """Each convolution has its weight of ``weights`` within the context, in this thread."""
    try:
        for conv, weight in weights.items():
            conv._materialised = conv.weight, weight, get_ident()
        yield
    finally:
        for conv in weights:
            conv._materialised = None


@contextmanager
def materialised_weights(module: Modules, weights: Mapping[NormalisedConv2d, Tensor] | None = None) -> Iterator[None]:
    """Compute every normalised and every parametrised weight once within the context, without gradients.

    ``weights`` are the `normalised_weights` of the module, if they have been computed.
    """
    if weights is None:
        with torch.no_grad():
            weights = normalised_weights(module)
    with fixed_weights(weights), _own_parametrization_cache():
        yield


@torch.inference_mode(False)
@torch.no_grad()
def step_spectral_norms(module: Modules) -> None:
    """One power iteration of every spectral norm in train(): ours, torch's hook and torch's parametrisation."""
    training = [m for m in _in_training(module) if m._buffers]
    for group in grouped([m for m in training if isinstance(m, NormalisedConv2d)], type):
        type(group[0]).power_iterations(group)
    for m in training:
        if not isinstance(m, NormalisedConv2d):
            for name in _iterated(m):  # torch writes over them
                m._buffers[name] = m._buffers[name].clone()  # type: ignore[union-attr]
        for hook in _spectral_norm_hooks(m):
            hook(m, ())
    for m in submodules(module):
        if "parametrizations" in m._modules:
            for name, chain in m._modules["parametrizations"]._modules.items():  # type: ignore[union-attr]
                if any(_is_spectral_norm(p) and p.training for p in chain.children()):  # type: ignore[union-attr]
                    getattr(m, name)  # evaluating it in train() is what steps it


def _spectral_norm_hooks(module: nn.Module) -> list[SpectralNorm]:
    """The hooks of `torch.nn.utils.spectral_norm`."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]


def _is_spectral_norm(module: nn.Module) -> bool:
    """Whether it is the parametrisation of `torch.nn.utils.parametrizations.spectral_norm`."""
    return type(module).__name__ == "_SpectralNorm"


def _iterated(module: nn.Module) -> list[str]:
    """The buffers that a module's power iteration writes over."""
    if isinstance(module, NormalisedConv2d):
        return list(module.iterated)
    if _is_spectral_norm(module):
        return ["_u", "_v"]
    return [f"{hook.name}_{vector}" for hook in _spectral_norm_hooks(module) for vector in "uv"]


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm with running statistics: torch's, or any with buffers called running_…."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return any(name.startswith("running_") and buffer is not None for name, buffer in module._buffers.items())


class TrainingState:
    """A snapshot of what a forward in train() changes in a module: running statistics and power iterations.

    Backward may evaluate parts of the layer again (`torch.utils.checkpoint`) after a later forward changed them.

    Attributes:
        norms: the norms in train() with running statistics.
        moving: those whose statistics an update changes: all but batch norms with a momentum of 0.

    Raises:
        ValueError: a SyncBatchNorm in train() in a group of several processes.
    """

    def __init__(self, module: Modules) -> None:
        training = [m for m in _in_training(module) if m._buffers]
        self.norms = [m for m in training if has_running_statistics(m)]
        self.moving = [m for m in self.norms if not (type(m) is nn.BatchNorm2d and m.momentum == 0)]
        self.kept = buffers.buffers_of(self.norms) if self.norms else []
        self.kept += [(m, name, m._buffers[name]) for m in training for name in _iterated(m)]
        if any(isinstance(m, nn.SyncBatchNorm) for m in self.norms) and _processes() > 1:
            raise ValueError(
                "layer has a SyncBatchNorm in train() among several processes, which would wait for one whose samples "
                "all diverged; it takes BatchNorm2d, whose statistics DistributedDataParallel keeps equal"
            )

    def restore(self) -> None:
        """Undo what has changed since."""
        buffers.restore(self.kept)

    def used(self) -> AbstractContextManager[None]:
        """Give the module this state within the context."""
        return buffers.used(self.kept) if self.kept else nullcontext()

    @contextmanager
    def updated(self) -> Iterator[None]:
        """Like `used`, for one evaluation of the layer that updates the running statistics.

        Those of torch's BatchNorm2d are measured without an output, and updated together. Each other norm, of whatever
        class, is updated by its own forward in train(), on a copy of the norm.
        """
        plain = {norm for norm in self.moving if type(norm) is nn.BatchNorm2d and norm.momentum is not None}
        copies = {norm: _with_own_buffers(norm) for norm in self.moving if norm not in plain}
        measured: list[dict[nn.BatchNorm2d, _Moments]] = []  # as many as times that the same norm is called
        updating = False

        @torch.inference_mode(False)
        @torch.no_grad()
        def update(norm: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal updating
            if updating:  # a norm inside another norm, which has its own update
                return
            updating = True
            try:
                if norm in plain:
                    _measure(measured, norm, *args, **kwargs)
                else:
                    type(norm).forward(copies[norm], *args, **kwargs)
            finally:
                updating = False

        with self.used(), ExitStack() as stack:
            for norm in self.moving:
                stack.callback(norm.register_forward_pre_hook(update, with_kwargs=True).remove)
            yield
        for norm, own in copies.items():
            norm._buffers.update(own._buffers)
        for moments in measured:
            _update_statistics(moments)
        _count_batch([norm for norm in self.norms if norm not in self.moving])


class _Moments(NamedTuple):
    """Mean and variance of a batch, per channel, and n/(n − 1) for its n values per channel."""

    mean: Tensor
    var: Tensor
    correction: float


def _measure(measured: list[dict[nn.BatchNorm2d, _Moments]], norm: nn.BatchNorm2d, input: Tensor) -> None:
    """Add the moments of a norm's input to the first entry that has none of this norm."""
    norm._check_input_dim(input)
    if (count := input.numel() // input.shape[1]) == 1:
        F.batch_norm(input, None, None, training=True)  # raises torch's error
    entry = next((each for each in measured if norm not in each), None)
    if entry is None:
        measured.append(entry := {})
    assert norm.running_mean is not None
    # This op makes no output, and on a CPU it takes a thirtieth of the time of var_mean.
    mean, var = torch.batch_norm_update_stats(input.to(norm.running_mean.dtype), None, None, 0.0)
    entry[norm] = _Moments(mean, var, count / (count - 1))


@torch.inference_mode(False)
@torch.no_grad()
def _update_statistics(measured: dict[nn.BatchNorm2d, _Moments]) -> None:
    """The update of torch's BatchNorm2d in train(), of several norms at once."""
    mean, var, correction = (list(each) for each in zip(*measured.values(), strict=True))
    momenta = [norm.momentum for norm in measured]
    for name, new in (("running_mean", mean), ("running_var", torch._foreach_mul(var, correction))):
        old = [norm._buffers[name] for norm in measured]
        _replace(name, measured, torch._foreach_lerp(old, new, momenta))  # type: ignore[arg-type]
    _count_batch(measured)


@torch.inference_mode(False)
@torch.no_grad()
def _count_batch(norms: Iterable[nn.Module]) -> None:
    """Add one batch to those that the norms have tracked."""
    name = "num_batches_tracked"
    counts = {norm: count for norm in norms if (count := norm._buffers[name]) is not None}
    if counts:
        _replace(name, counts, torch._foreach_add(list(counts.values()), 1))


def _replace(name: str, modules: Iterable[nn.Module], buffers: Sequence[Tensor]) -> None:
    """Give each module its buffer of this name."""
    for module, buffer in zip(modules, buffers, strict=True):
        module._buffers[name] = buffer


@torch.inference_mode(False)
@torch.no_grad()
def _with_own_buffers(norm: nn.Module) -> nn.Module:
    """A copy in the norm's present mode that shares everything except the buffers."""
    own = object.__new__(type(norm))  # copy() refuses parametrised modules
    cloned = {name: None if buffer is None else buffer.clone() for name, buffer in norm._buffers.items()}
    own.__dict__ = {**norm.__dict__, "_buffers": cloned}
    return own


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1
