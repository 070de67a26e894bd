"""Measuring: how one call is timed, and how several sides are timed against each other."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]

_SHORTEST = 4e-3  # seconds a sample should last, so that neither the clock nor waking threads shows in it
_MOST_CALLS = 1000
_GRAPH_CALLS = 20  # in one CUDA graph, so that replaying it costs nothing beside them
_LEAST_ROUNDS = 5
_PRECISION = 0.005  # of a median, as interquartile range / √rounds; below it the rounds end


class Sampler(NamedTuple):
    """``sample()`` measures anew and returns seconds a call; ``clock`` says how."""

    clock: str
    sample: Callable[[], float]


class Spread(NamedTuple):
    """The median of some samples and their quartiles."""

    median: float
    q1: float
    q3: float


def spread(samples: list[float]) -> Spread:
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, q1, q3)


def _repeated(many: Callable[[int], float]) -> Callable[[], float]:
    """Seconds of one repetition, of which ``many(n)`` takes n.

    The first warms the caches and says how many more make a sample; a long one is the sample itself.
    """

    def sample() -> float:
        seconds = many(1)
        count = min(_MOST_CALLS, int(_SHORTEST / max(seconds, 1e-9)))
        return seconds if count < 2 else many(count) / count

    return sample


def _wall(call: Callable[[], object]) -> Sampler:
    def many(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - start

    return Sampler("wall", _repeated(many))


def _on_device(call: Callable[[], object]) -> Sampler:
    """Between two events, from a CUDA graph of several calls where the call can be captured."""

    def launch() -> None:
        for _ in range(_GRAPH_CALLS):
            call()

    replay, clock = launch, "events"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):  # the outer: a failure leaves the inner
            launch()
    except RuntimeError:  # the call waits for the device, which a graph cannot hold
        torch.cuda.synchronize()
    else:
        replay, clock = graph.replay, "graph"

    def many(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    repeated = _repeated(many)
    return Sampler(clock, lambda: repeated() / _GRAPH_CALLS)


def timed(call: Callable[[], object], device: torch.device) -> Sampler:
    """Seconds of ``call()``: by the wall clock on the CPU, by device events on CUDA."""
    return _on_device(call) if device.type == "cuda" else _wall(call)


def between_evaluations(solve: Callable[[Layer], object], layer: Layer, device: torch.device, first: int) -> Sampler:
    """What a solver spends from one evaluation of its layer to the next: its own step, without the layer.

    Args:
        solve: runs the solver on the layer that it is given, for more than ``first`` + 1 evaluations.
        layer: the map.
        first: how many gaps to leave out, while the history is filling; a sample is the others' median.
    """
    cuda = device.type == "cuda"

    def stamp() -> float | torch.cuda.Event:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(start, float) and isinstance(end, float):
            return end - start
        assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1e3

    def sample() -> float:
        evaluations: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

        def stamped(x: Tensor) -> Tensor:
            entered = stamp()
            f = layer(x)
            evaluations.append((entered, stamp()))
            return f

        solve(stamped)
        if cuda:
            torch.cuda.synchronize()
        gaps = [seconds(left, entered) for (_, left), (entered, _) in pairwise(evaluations)]
        return statistics.median(gaps[first:])

    return Sampler("events" if cuda else "wall", sample)


class Measured(NamedTuple):
    """The samples of one side, in seconds; round by round with the other sides unless there is one alone."""

    clock: str
    samples: list[float]


def interleave(
    sides: Mapping[str, Callable[[], Sampler]],
    seconds: float,
    required: tuple[str, ...],
    say: Callable[[str], None],
) -> dict[str, Measured]:
    """Time the sides in turn, A B C A B C …, after a warm-up, until their medians stand or time is up.

    A side that fails (no memory, no compiler) is said and left out. One that takes a sixth of the
    time by itself is not repeated: its warm-up is its only sample. Neither holds for ``required``.

    Args:
        sides: what makes each side's sampler.
        seconds: for the rounds; at least three are run.
    """
    samplers: dict[str, Sampler] = {}
    alone: dict[str, Measured] = {}
    limit = seconds / 6
    for name, make in sides.items():
        try:
            sampler = make()
            value, took = _warm_up(sampler)
            if limit < took < seconds:  # a first call, or a busy moment
                value, took = _warm_up(sampler)
        except Exception as error:
            if name in required:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"{name} is left out: {reason[:100]}")
            continue
        if name not in required and took > limit:
            alone[name] = Measured(sampler.clock, [value])
        else:
            samplers[name] = sampler

    samples: dict[str, list[float]] = {name: [] for name in samplers}
    end = time.perf_counter() + seconds
    for done in range(1, 10_000):
        for name, sampler in samplers.items():
            samples[name].append(sampler.sample())
        if done >= 3 and time.perf_counter() > end:
            break
        if done >= _LEAST_ROUNDS and all(_settled(s) for s in samples.values()):
            break
    rounds = {name: Measured(samplers[name].clock, values) for name, values in samples.items()}
    return {name: (rounds | alone)[name] for name in sides if name in rounds or name in alone}


def _warm_up(sampler: Sampler) -> tuple[float, float]:
    """A sample, and the seconds that it took to take."""
    start = time.perf_counter()
    return sampler.sample(), time.perf_counter() - start


def _settled(samples: list[float]) -> bool:
    median, q1, q3 = spread(samples)
    return (q3 - q1) / math.sqrt(len(samples)) < _PRECISION * median


def ratios(side: Measured, ours: Measured) -> Spread:
    """The side's time over ours, round by round."""
    if len(side.samples) != len(ours.samples):
        median = spread(ours.samples).median
        return spread([s / median for s in side.samples])
    return spread([s / o for s, o in zip(side.samples, ours.samples, strict=True)])
