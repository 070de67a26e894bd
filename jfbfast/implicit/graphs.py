"""A solve as CUDA graphs: the evaluation of the layer and Anderson's step are captured once, and replayed.

A graph reads and writes fixed addresses. So it has its own x, inputs and copies of the module's parameters and buffers,
which every solve writes anew. The first graph of a solve also prepares the weights (norms, folded batch norms, layouts)
from those copies; the others evaluate with what it has prepared. Samples leave the batch by halves, each half with a
graph of its own. All else that a layer's attributes hold is part of the key of its graphs: numbers, strings, arrays,
collections and the attributes of objects by value; functions, and what has no attributes, by identity. What a layer
reads elsewhere, such as a global variable, must not change.
"""

from __future__ import annotations

import copyreg
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jfbfast.backends import dispatch, graphs
from jfbfast.backends.graphs import keeping
from jfbfast.implicit.frozen import NormalisedConv2d, grouped, materialised_weights, submodules
from jfbfast.solvers import FixedPointSolution, Layer
from jfbfast.solvers.loop import Phase, few_remain

_MOST_GRAPHS = 4  # of one module; each holds the memory of an evaluation and of the history
_MOST_CAPTURES = 16  # of one module; more of them, and its attributes change all the time
_NAME = "_solve_graphs"
_NOT_IN_KEY = {*vars(nn.Module()), "_materialised", "solution", _NAME}  # tensors and children are looked at apart


class Graphs(OrderedDict[Any, Any]):
    """A module's graphs by key, the newest last; a string is the reason why there is none. Copies of it are empty."""

    captures = 0

    def __reduce__(self) -> Any:
        return Graphs, ()

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()


class CapturedLayer:
    """A prepared layer whose solves may be replayed from CUDA graphs; called like a layer, it evaluates eagerly.

    Args:
        prepare: makes the prepared layer, which takes its weights at its first evaluation.
        module: the layer's module, in eval().
        batch: the size of a whole batch; other batches are evaluated eagerly.
        key: what the prepared layer depends on besides the module.
    """

    def __init__(self, prepare: Callable[[], Layer], module: nn.Module, batch: int, key: Any) -> None:
        self.prepare, self.module, self.batch, self.key = prepare, module, batch, key
        self.layer = prepare()

    def __call__(self, x: Tensor, *inputs: Tensor) -> Tensor:
        return self.layer(x, *inputs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def replayed(self, phase: Phase, solver: Any, start: Callable[[Tensor, Tensor], Any]) -> FixedPointSolution | None:
        """Solve by graphs; None if the solve has to be eager, whose reason `graphs.describe` tells.

        Args:
            phase: a phase with this layer.
            solver: the solver, as part of the key.
            start: makes the state of a solve from the start and the budget (`AndersonSolve`).
        """
        if len(phase.start) != self.batch or not phase.start.numel():
            return None
        if any(m._forward_hooks or m._forward_pre_hooks for m in submodules(self.module)):
            graphs.note("the layer has a forward hook, which would run at the capture only")
            return None
        try:
            facts, objects = _fingerprint(self.module)
        except RecursionError:
            graphs.note("an attribute of the layer is nested too deeply to be compared")
            return None
        shapes = [(t.shape, t.dtype, t.device) for t in (phase.start, *phase.inputs)]
        key = (self.key, solver, phase.stall_floor, _precision(phase.start.device.type), *shapes, *facts)
        found: Graphs = vars(self.module).setdefault(_NAME, Graphs())
        graph = found.get(key)
        if graph is None:
            if found.captures >= _MOST_CAPTURES:
                graphs.note(f"the layer was captured {_MOST_CAPTURES} times, each time with other attributes or shapes")
                return None
            found.captures += 1
            try:
                graph = SolveGraph(phase, self.prepare, self.module, start, objects)
            except Exception as error:  # whatever a layer may do that cannot be captured
                graph = f"{type(error).__name__}: {error}".splitlines()[0]
            found[key] = graph
            while len(found) > _MOST_GRAPHS:
                found.popitem(last=False)
        found.move_to_end(key)
        if isinstance(graph, str):
            graphs.note(graph)
            return None
        return graph.solve(phase, self.module)


@dataclass
class _Level:
    """The graph of one batch size, for the samples in ``rows``, int32 (b,), or for all if that is None."""

    x: Tensor
    inputs: tuple[Tensor, ...]
    rows: Tensor | None
    graph: Any


class SolveGraph:
    """The graphs of one solve; the arguments are those of `CapturedLayer.replayed`, and objects to keep alive."""

    def __init__(
        self,
        phase: Phase,
        prepare: Callable[[], Layer],
        module: nn.Module,
        start: Callable[[Tensor, Tensor], Any],
        objects: list[Any],
    ) -> None:
        self.objects, self.lock = objects, threading.Lock()
        x, inputs = phase.flat_start(), tuple([i.clone() for i in phase.inputs])
        self.budget = phase.budget.clone()
        self.copies = [mapping[name].detach().clone() for mapping, name in _tensors(module)]
        self.state = start(x, self.budget)
        sizes = [len(x)]
        while inputs and sizes[-1] > 1:
            sizes.append((sizes[-1] + 1) // 2)
        graph, device = torch.cuda.CUDAGraph, x.device
        self.levels = [
            _Level(
                x if b == len(x) else torch.empty_like(x[:b]),
                inputs if b == len(x) else tuple([torch.empty_like(i[:b]) for i in inputs]),
                None if b == len(x) else torch.arange(b, dtype=torch.int32, device=device),
                graph(),
            )
            for b in sizes
        ]
        self.first, pool = graph(), torch.cuda.graph_pool_handle()
        with keeping() as self.kept, self._in_place_of(module):
            # Once without a graph: caches are filled, kernels compiled and chosen. On another stream, as torch asks.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), materialised_weights(module):
                warm = replace(phase, layer=prepare())
                for level in self.levels:
                    n = len(level.x)
                    warm.evaluate(x[:n], tuple([i[:n] for i in inputs]))
            torch.cuda.current_stream().wait_stream(stream)
            start_images = x.view(phase.start.shape)
            captured = replace(phase, layer=prepare(), start=start_images, inputs=(), budget=self.budget)
            with ExitStack() as stack:
                with torch.cuda.graph(self.first, pool=pool, capture_error_mode="thread_local"):
                    stack.enter_context(materialised_weights(module))
                    self.state.restart(x)
                    self._step(captured, self.levels[0])
                for level in self.levels:
                    with torch.cuda.graph(level.graph, pool=pool, capture_error_mode="thread_local"):
                        self._step(captured, level)
        self.captured = captured  # holds the prepared weights, which the graphs read
        graphs.note()

    def _step(self, phase: Phase, level: _Level) -> None:
        self.state.take_rows(level.rows)
        self.state.step(level.x, phase.evaluate(level.x, level.inputs))

    @contextmanager
    def _in_place_of(self, module: nn.Module) -> Iterator[None]:
        """The module computes with the copies of its tensors within the context."""
        normalised = [m for m in submodules(module) if isinstance(m, NormalisedConv2d)]
        places, weights = _tensors(module), [m._materialised for m in normalised]
        originals = [mapping[name] for mapping, name in places]
        try:
            for (mapping, name), copy in zip(places, self.copies, strict=True):
                mapping[name] = copy
            yield
        finally:
            for (mapping, name), original in zip(places, originals, strict=True):
                mapping[name] = original
            for m, weight in zip(normalised, weights, strict=True):
                m._materialised = weight

    def solve(self, phase: Phase, module: nn.Module) -> FixedPointSolution | None:
        """Replay the solve of this phase; None while another thread does."""
        if not self.lock.acquire(blocking=False):
            graphs.note("another thread replays the graphs")
            return None
        try:
            return self._replay(phase, module)
        finally:
            self.lock.release()

    def _replay(self, phase: Phase, module: nn.Module) -> FixedPointSolution:
        level = self.levels[0]
        # One launch for each dtype.
        pairs = list(zip(self.copies, (mapping[name] for mapping, name in _tensors(module)), strict=True))
        pairs += [(level.x, phase.start.reshape(level.x.shape)), (self.budget, phase.budget)]
        pairs += zip(level.inputs, phase.inputs, strict=True)
        for group in grouped(pairs, lambda pair: pair[0].dtype):
            torch._foreach_copy_([copy for copy, _ in group], [source for _, source in group])
        self.state.forget()
        self.first.replay()
        for evaluation in range(1, phase.longest + 1):
            if evaluation > 1:
                level.graph.replay()
            running = self.state.running()
            remaining = int(running.sum())
            if remaining == 0:
                break
            for smaller in self.levels[::-1]:
                if (
                    len(smaller.x) < len(level.x)
                    and remaining <= len(smaller.x)
                    and few_remain(remaining, len(level.x))
                ):
                    level = self._moved(level, smaller, running)
                    break
        value, residual, iterations, status, following = (t.clone() for t in self.state.finish())
        return FixedPointSolution(value, residual, iterations, status, following=following)

    def _moved(self, level: _Level, smaller: _Level, running: Tensor) -> _Level:
        """Go on with the running rows, and as many of those that are done as the smaller batch takes."""
        order = torch.argsort((~running).to(torch.int8), stable=True)[: len(smaller.x)]
        rows = order.to(level.x.device, non_blocking=True)
        assert smaller.rows is not None
        everything = rows if level.rows is None else level.rows[rows]
        smaller.rows.copy_(everything)
        for target, source in zip((smaller.x, *smaller.inputs), (level.x, *level.inputs), strict=True):
            torch.index_select(source, 0, rows, out=target)
        self.state.take_rows(smaller.rows, order)
        return smaller


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module and its submodules hold their parameters and buffers."""
    mappings = [mapping for m in submodules(module) for mapping in (m._parameters, m._buffers)]
    return [(mapping, name) for mapping in mappings for name, tensor in mapping.items() if tensor is not None]


def _fingerprint(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """What a module is besides the numbers in its tensors; and the objects whose identities are part of it."""
    facts: list[Any] = [(name, mapping[name].shape, mapping[name].dtype) for mapping, name in _tensors(module)]
    objects: list[Any] = []
    for m in submodules(module):
        objects.append(m)
        facts.append(id(m))
        for name, value in vars(m).items():
            if name in _NOT_IN_KEY:
                continue
            facts.append((name, _fact(value, objects, set())))
    return facts, objects


def _fact(value: Any, objects: list[Any], seen: set[int]) -> Any:
    """A value as part of a key; adds those objects to ``objects`` whose identity it has."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return type(value), value
    objects.append(value)
    if id(value) in seen or isinstance(value, (type, ModuleType, FunctionType, nn.Module)):
        return id(value)
    seen.add(id(value))
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    return id(value), *(_fact(each, objects, seen) for each in _held(value))


def _held(value: Any) -> Iterable[Any]:
    """What an object consists of: the items of a collection, the parts of a method or a partial, attributes."""
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, dict):
        return [each for item in value.items() for each in item]
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    slots = [name for name in copyreg._slotnames(type(value)) if hasattr(value, name)]  # type: ignore[attr-defined]
    return [each for name in slots for each in (name, getattr(value, name))] + [
        each for item in getattr(value, "__dict__", {}).items() for each in item
    ]


def _precision(device: str) -> tuple[Any, ...]:
    """The settings of torch and of this package that choose kernels."""
    backends: Any = torch.backends
    return (
        backends.cudnn.conv.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.enabled,
        backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        dispatch.selected_backend(),
    )
