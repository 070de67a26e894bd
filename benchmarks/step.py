"""`step`: one training step (solve, one layer with its gradient, backward) by jfbfast and by its rivals.

Equal work means equal true error: each side takes the fewest evaluations of the layer that bring every restored image
within the target, ‖x − x*‖/‖x*‖, with x* the fixed point in float64. All sides get the same layer, weights, batch and
start.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from jfbfast import ConvergenceWarning, checks

from . import machine, report, rivals
from .memory import peak_megabytes
from .problem import Problem, Weights, batch_norms, fixed_point, problem, trained, untrained
from .report import OURS, Row
from .split import split
from .step_report import NOTE, figure, tables
from .step_sides import Side, sides
from .timing import Sampler, first_line, interleave, timed

Makers = Mapping[str, Callable[[], Side]]

_NEAREST = 1.1  # times a side's lowest error is near enough, if that is above the target
_STALLED = 8  # more evaluations that lower the error by less than that factor are the last


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    features: int  # of the DnCNN, if no checkpoint is given
    depth: int
    cases: tuple[tuple[str, int], ...]  # layer and image size of the comparison at equal error
    batch: int  # images per batch, except in the comparison of sizes
    targets: tuple[float, ...]  # the errors, in falling order
    compiled: tuple[str, ...]  # layers that torch.compile gets too, in float32
    limit: int  # most evaluations
    seconds: float  # for the rounds of one case
    counts: tuple[int, ...]  # numbers of evaluations to compare
    counts_size: int  # of the images there, and in the measurement of memory
    sizes: tuple[int, ...]  # of the images to compare
    sizes_batch: int
    exact: tuple[int, ...]  # which of these sizes also take the exact gradient
    memory: tuple[tuple[str, int], ...]  # sides and evaluations


FULL = Plan(
    features=64,
    depth=17,
    cases=(("preconditioned", 64), ("filtered", 64), ("paper", 32)),
    batch=8,
    targets=(1e-2, 1e-3),
    compiled=("preconditioned",),
    limit=100,
    seconds=45.0,
    counts=(4, 8, 16, 32),
    counts_size=32,
    sizes=(16, 32, 64, 128),
    sizes_batch=16,
    exact=(16, 32),
    memory=((OURS, 5), (OURS, 200), *((side, 5) for side in ("PyTorch", "published loop", "TorchDEQ", "deepinv"))),
)
QUICK = replace(
    FULL,
    cases=(("preconditioned", 64),),
    batch=2,
    compiled=(),
    limit=40,
    seconds=20.0,
    counts=(),
    sizes=(),
    exact=(),
    memory=((OURS, 5), ("TorchDEQ", 5)),
)


def errors(x: Tensor, fixed: Tensor) -> Tensor:
    """‖x − x*‖/‖x*‖ of each image, (B,); infinite if it is not finite, or if samples diverged and left the batch."""
    if x.shape != fixed.shape:
        return torch.full((len(fixed),), torch.inf)
    distance = (x.detach().double() - fixed).flatten(1).norm(dim=1) / fixed.flatten(1).norm(dim=1)
    return distance.nan_to_num(torch.inf)


class Found(NamedTuple):
    """The fewest evaluations with which a side reaches the target, or else comes near its lowest error."""

    evaluations: int
    reached: bool
    error: float  # the batch's largest
    error_median: float


def find(
    side: Side, fixed: Tensor, targets: Sequence[float], limit: int, starts: Sequence[int] | None = None
) -> list[Found]:
    """Find the fewest evaluations that reach each target (in falling order), by strides that double and then bisection.

    ``starts`` are guesses, such as another side's counts: a search that starts at its result ends after two solves.
    """
    tried: dict[int, Tensor] = {}
    found: list[Found] = []

    def largest(evaluations: int) -> float:
        if evaluations not in tried:
            tried[evaluations] = errors(side.forward(evaluations), fixed)
        return float(tried[evaluations].max())

    with side.context():
        for i, target in enumerate(targets):
            guess = starts[i] if starts else 2 * found[-1].evaluations if found else side.least
            count = _fewest(largest, target, min(max(guess, side.least), limit), side.least, limit)
            if count is None:  # no number of evaluations will do
                lowest = min(map(largest, tried))
                count = min(k for k in tried if largest(k) <= _NEAREST * lowest)
            error = largest(count)
            found.append(Found(count, error <= target, error, float(tried[count].median())))
    return found


def _fewest(largest: Callable[[int], float], target: float, start: int, least: int, limit: int) -> int | None:
    """The fewest evaluations, or None if neither the limit reaches the target nor the error falls any more."""
    low, high, stride = least - 1, start, 1
    while largest(high) > target:
        stalled = high - low >= _STALLED and low >= least and largest(high) * _NEAREST > largest(low)
        if stalled or high == limit:
            return None
        low, high, stride = high, min(high + stride, limit), 2 * stride
    stride = 1 if high == start else high
    while high - low > 1:
        middle = max((low + high) // 2, high - stride)
        if largest(middle) <= target:
            high, stride = middle, 2 * stride
        else:
            low = middle
    return high


class Benchmark:
    """One run: measures experiment by experiment, with the ``libraries`` that are installed, and collects ``rows``.

    A row holds one side of one case. Its ``experiment`` is "step" (at equal error), "evaluations", "size" (both with
    given evaluations) or "memory"; ``evaluations`` are those of the solve, and the layer with the gradient is one more.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        device: torch.device,
        console: Console,
        libraries: tuple[str, ...] = ("torchdeq", "deepinv"),
    ) -> None:
        self.plan, self.weights, self.device, self.console = plan, weights, device, console
        self.say: Callable[..., Any] = partial(console.print, highlight=False)
        self.missing = {"torchdeq", "deepinv"} - set(libraries) | rivals.missing(libraries, self.say)
        self.rows: list[Row] = []

    def run(self) -> list[Row]:
        """Measure everything; the later experiments take the first layer with a fixed point."""
        for layer, size in self.plan.cases:
            given = problem(self.weights, size, self.plan.batch, self.device, layer)
            fixed = self.fixed_points(given)
            if fixed is not None:
                for half in (False, True):
                    self.at_equal_error(replace(given, half=half), *fixed)
        if self.rows:
            first = self.rows[0]  # jfbfast in float32, at the largest target
            self._against_evaluations(first["layer"])
            self.against_size(first["layer"], first["evaluations"])
            self._memory(first["layer"])
        return self.rows

    def _add(self, experiment: str, given: Problem, side: str, evaluations: int, **cells: Any) -> None:
        case = {
            "experiment": experiment,
            "side": side,
            "layer": given.layer,
            "size": given.x.shape[-1],
            "batch": len(given.x),
            "dtype": "bfloat16" if given.half else "float32",
            "evaluations": evaluations,
        }
        self.rows.append({**case, **cells, **machine.describe(self.device)})

    def fixed_points(self, given: Problem) -> tuple[Tensor, Tensor | None] | None:
        """The layer's fixed point, and that with batch statistics; None, which is said, if the first is not found."""
        with self.console.status(f"{given.layer} layer, {given.x.shape[-1]}²: its fixed points in float64"):
            coupled = bool(batch_norms(self.weights.denoiser))
            fixed = {statistics: fixed_point(given, statistics) for statistics in {False, coupled}}
        plain = fixed[False]
        if plain is None:
            self.say(f"no fixed point of the {given.layer} layer was found with these weights; it is left out")
            return None
        if fixed[coupled] is None:
            self.say(f"published loop, {given.layer} layer: no fixed point was found with batch statistics")
        return plain, fixed[coupled]

    def _time(
        self, given: Problem, makers: Makers, counts: Mapping[str, int], label: str, warm: bool = False
    ) -> dict[str, Row]:
        """The cells of each side's time, with that many evaluations; ``warm`` as in `interleave`."""

        def sampler(name: str) -> Sampler:  # with the CPU's clock, since a step waits for the device
            return timed(partial(makers[name]().step, given.x, counts[name]), torch.device("cpu"))

        with self.console.status(label):
            samplers = {name: partial(sampler, name) for name in counts}
            timings = interleave(samplers, self.plan.seconds, lambda text: self.say(f"{label}: {text}"), warm)
        return {name: timing.columns("s") for name, timing in timings.items()}

    def at_equal_error(self, given: Problem, fixed: Tensor, coupled: Tensor | None) -> None:
        """Find each side's evaluations for each target, and time its step with them."""
        torch.compiler.reset()
        compiling = given.layer in self.plan.compiled and not given.half
        makers, found = sides(given, self.missing, compiling), dict[str, list[Found]]()
        with self.console.status(f"{given.layer} layer: the evaluations of each side"):
            for name, make in makers.items():
                try:
                    side = make()
                    target = coupled if side.batch_statistics and coupled is not None else fixed
                    ours = [each.evaluations for each in found.get(OURS, [])]
                    found[name] = find(side, target, self.plan.targets, self.plan.limit, ours)
                    makers[name] = partial(replace, side)  # the same side again, which may be compiled by now
                except Exception as failure:
                    if name == OURS:
                        raise
                    self.say(f"{name} is left out: {first_line(failure)}")
        for i, target_error in enumerate(self.plan.targets):
            counts = {name: each[i].evaluations for name, each in found.items()}
            label = f"{given.layer} layer, error {target_error:g}"
            times = self._time(given, makers, counts, label, warm=not compiling)  # a first backward may compile
            times[OURS] |= {f"split_{part}": share for part, share in split(given, counts[OURS]).items()}
            for name, time in times.items():
                self._add("step", given, name, target_error=target_error, **found[name][i]._asdict(), **time)

    def _against_evaluations(self, layer: str) -> None:
        given = problem(self.weights, self.plan.counts_size, self.plan.batch, self.device, layer)
        makers = sides(given, self.missing)
        for count in self.plan.counts:
            for name, time in self._time(given, makers, dict.fromkeys(makers, count), f"{count} evaluations").items():
                self._add("evaluations", given, name, count, **time)

    def against_size(self, layer: str, evaluations: int, wanted: Collection[str] | None = None) -> None:
        """Time the sides of these names, or all, with that many evaluations at each size of the plan."""
        for size in self.plan.sizes:
            given = problem(self.weights, size, self.plan.sizes_batch, self.device, layer)
            makers = sides(given, self.missing, exact=size in self.plan.exact)
            counts = {name: evaluations for name in makers if wanted is None or name in wanted}
            for name, time in self._time(given, makers, counts, f"{size}²").items():
                self._add("size", given, name, evaluations, **time)

    def _memory(self, layer: str) -> None:
        given = problem(self.weights, self.plan.counts_size, self.plan.batch, self.device, layer)
        for name, evaluations in self.plan.memory:
            if name.lower() in self.missing:
                continue
            try:
                with self.console.status(f"memory of {name}"):
                    self._add("memory", given, name, evaluations, peak_mb=peak_megabytes(given, name, evaluations))
            except RuntimeError as failure:
                self.say(f"memory of {name}: {failure}")


def run(
    out: Path,
    quick: bool,
    console: Console,
    checkpoint: str | None = None,
    batch: int | None = None,
    size: int | None = None,
) -> None:
    """Measure `QUICK` or `FULL`, and write step.csv and step.png into the directory.

    ``checkpoint`` is a shipped model's name or a file of trained weights, instead of an untrained network that is
    made a contraction; ``batch`` overrides the plan's, and ``size`` its pixels a side in the comparison at equal error.

    Raises:
        ValueError: a batch below 1; a size below 16; weights with which no layer has a fixed point.
    """
    torch.manual_seed(0)
    device, busy = machine.default_device(), machine.disturbance()  # before the benchmark keeps the machine busy
    plan = QUICK if quick else FULL
    if batch is not None:
        checks.integer("batch", batch, 1)
        plan = replace(plan, batch=batch)
    if size is not None:
        checks.integer("size", size, 16)
        plan = replace(plan, cases=tuple((layer, size) for layer, _ in plan.cases))
    weights = untrained(plan.features, plan.depth) if checkpoint is None else trained(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        rows = Benchmark(plan, weights, device, console).run()
    if not rows:
        raise ValueError("no layer has a fixed point with these weights; there is nothing to measure")
    report.publish("step", out, console, rows, tables(rows), figure(rows), machine.about(device), NOTE, *busy)
