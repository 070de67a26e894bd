"""Time one call, and time several sides of a comparison against each other."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]

_SHORTEST = 4e-3  # seconds a sample should last, so that clock resolution and thread wake-up do not matter
_MOST_CALLS = 1000
_GRAPH_CALLS = 20  # in one CUDA graph, so that the cost of replaying it is negligible
_LEAST_ROUNDS = 5
_PRECISION = 0.005  # rounds end once interquartile range / √rounds is below this share of every median


class Sampler(NamedTuple):
    """A way to time a call."""

    clock: str  # "wall", "events" or "graph"
    sample: Callable[[], float]  # measures once, in seconds per call


class Spread(NamedTuple):
    """Median and quartiles of some samples."""

    median: float
    q1: float
    q3: float


def spread(samples: list[float]) -> Spread:
    """Median and quartiles; all three are the same for a single sample."""
    q1, median, q3 = statistics.quantiles(samples * (2 if len(samples) == 1 else 1), n=4, method="inclusive")
    return Spread(median, q1, q3)


@dataclass(frozen=True)
class Timing:
    """The measured time of one side of a case."""

    clock: str  # "wall", "events" or "graph"
    samples: int  # rounds; 1 for a side so slow that it was measured once
    seconds: Spread  # of one call
    ratio: Spread  # of this side's time to the reference's, taken round by round

    def columns(self, unit: str) -> dict[str, Any]:
        """The cells of a CSV, with times in ``unit``: "s" or "us"."""
        scale = {"s": 1, "us": 1e6}[unit]
        times = {f"{name}_{unit}": scale * value for name, value in self.seconds._asdict().items()}
        ratios = {"ratio": self.ratio.median, "ratio_q1": self.ratio.q1, "ratio_q3": self.ratio.q3}
        return {"samples": self.samples, **times, **ratios}


def compare(clock: str, samples: list[float], reference: list[float]) -> Timing:
    """Summarise a side's samples; if it was not sampled in every round, its ratios are to the reference's median."""
    if len(samples) != len(reference):
        reference = [spread(reference).median] * len(samples)
    ratios = [side / other for side, other in zip(samples, reference, strict=True)]
    return Timing(clock, len(samples), spread(samples), spread(ratios))


def _sample(many: Callable[[int], float]) -> float:
    """Seconds of one call, from the seconds of ``many(n)`` calls.

    The first call warms the caches and decides how many more make a sample. A long call is itself the sample.
    """
    seconds = many(1)
    count = min(_MOST_CALLS, int(_SHORTEST / max(seconds, 1e-9)))
    return seconds if count < 2 else many(count) / count


def _wall(call: Callable[[], object]) -> Sampler:
    def many(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - start

    return Sampler("wall", lambda: _sample(many))


def _on_device(call: Callable[[], object]) -> Sampler:
    """Time between two CUDA events, replaying a CUDA graph of several calls if the call can be captured."""

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
        # A failed capture leaves its own stream current; the outer context restores the caller's.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            launch()
    except RuntimeError:  # the call waits for the device, which a graph cannot do
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

    return Sampler(clock, lambda: _sample(many) / _GRAPH_CALLS)


def timed(call: Callable[[], object], device: torch.device) -> Sampler:
    """Time ``call()``: by the wall clock on the CPU, by device events on CUDA."""
    return _on_device(call) if device.type == "cuda" else _wall(call)


def between_evaluations(solve: Callable[[Layer], object], layer: Layer, device: torch.device, first: int) -> Sampler:
    """Time a solver's own step: the median gap between two evaluations of its layer, after the ``first`` gaps."""
    cuda = device.type == "cuda"

    def seconds(start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if cuda else end - start

    def sample() -> float:
        marks: list[Any] = []  # the layer's start and end in turn, as seconds or CUDA events

        def mark() -> None:
            if cuda:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())

        def marked(x: Tensor) -> Tensor:
            mark()
            f = layer(x)
            mark()
            return f

        solve(marked)
        if cuda:
            torch.cuda.synchronize()
        gaps = [seconds(left, entered) for left, entered in zip(marks[1:-1:2], marks[2::2], strict=True)]
        return statistics.median(gaps[first:])

    return Sampler("events" if cuda else "wall", sample)


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 100 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def interleave(
    sides: Mapping[str, Callable[[], Sampler]], seconds: float, say: Callable[[str], object], warm: bool = False
) -> dict[str, Timing]:
    """Time the sides in turn, A B C A B C …, after a warm-up, until their medians settle or time is up.

    The rounds take about ``seconds``; at least three are run. The first side is the reference: it is always repeated,
    and its errors are raised. Another side that fails (out of memory, no compiler) is reported by ``say`` and left
    out. A side that needs over a third of the time for one sample is not repeated. Where all sides are ``warm``, they
    have run before, and the first sample counts.
    """
    reference, limit = next(iter(sides)), seconds / 3
    samplers: dict[str, Sampler] = {}
    samples: dict[str, list[float]] = {}
    repeated: list[str] = []
    began = time.perf_counter()
    for name, make in sides.items():
        try:
            sampler = samplers[name] = make()
            value, took = _warm_up(sampler)
            if limit < took < seconds:  # a first call, or a busy moment
                value, took = _warm_up(sampler)
        except Exception as error:
            if name == reference:
                raise
            say(f"{name} is left out: {first_line(error)}")
            continue
        repeats = name == reference or took <= limit
        repeated += [name] if repeats else []
        samples[name] = [value] if warm or not repeats else []

    end = (began if warm else time.perf_counter()) + seconds
    while True:
        for name in repeated:
            samples[name].append(samplers[name].sample())
        done = len(samples[reference])
        if done >= 3 and time.perf_counter() > end:
            break
        if done >= _LEAST_ROUNDS and all(_settled(samples[name]) for name in repeated):
            break
    return {name: compare(samplers[name].clock, values, samples[reference]) for name, values in samples.items()}


def _warm_up(sampler: Sampler) -> tuple[float, float]:
    """A sample, and the seconds that taking it took."""
    start = time.perf_counter()
    return sampler.sample(), time.perf_counter() - start


def _settled(samples: list[float]) -> bool:
    median, q1, q3 = spread(samples)
    return (q3 - q1) / math.sqrt(len(samples)) < _PRECISION * median
