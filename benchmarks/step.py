"""`step`: one training step (solve, one layer with its gradient, backward) by jfbfast and by its rivals.

Equal work is equal true error: each side takes as few evaluations of the layer as bring its restored
images within the target, ‖x − x*‖/‖x*‖ for every image of the batch, x* the fixed point in float64. All
sides get the same layer, weights, batch and start.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from jfbfast import ConvergenceWarning

from . import machine, rivals
from .implicit_rivals import OURS, Side, jacobian_sides, sides
from .memory import peak_megabytes
from .problem import Problem, Weights, fixed_point, has_batch_statistics, problem, trained, untrained
from .report import write_csv
from .split import split
from .step_report import Row, plot, tables
from .timing import Measured, Sampler, interleave, timed

_TRIES = 8  # at most, each with a twentieth more evaluations, where the recorded count falls short
_NEAREST = 1.1  # of the lowest error that a side comes to, where that is above the target


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        features, depth: of the DnCNN, where no checkpoint is given.
        cases: layer and image size of the comparison at equal error.
        batch: of it, and of the steps at given evaluations.
        targets: the errors, falling.
        compiled: layers that torch.compile gets, in float32.
        limit: evaluations at most.
        seconds: for the rounds of one case.
        counts: of evaluations, at images of ``counts_size``.
        sizes: of images, ``sizes_batch`` of them.
        jacobian: of these sizes, those at which the exact gradient is taken too.
        memory: side and evaluations, at images of ``counts_size``.
    """

    features: int
    depth: int
    cases: tuple[tuple[str, int], ...]
    batch: int
    targets: tuple[float, ...]
    compiled: tuple[str, ...]
    limit: int
    seconds: float
    counts: tuple[int, ...]
    counts_size: int
    sizes: tuple[int, ...]
    sizes_batch: int
    jacobian: tuple[int, ...]
    memory: tuple[tuple[str, int], ...]


_MEMORY = tuple((side, 5) for side in ("PyTorch", "published loop", "TorchDEQ", "deepinv"))
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
    jacobian=(16, 32),
    memory=((OURS, 5), (OURS, 200), *_MEMORY),
)
QUICK = replace(
    FULL,
    cases=(("preconditioned", 64),),
    batch=2,
    compiled=(),
    limit=40,
    seconds=15.0,
    counts=(),
    sizes=(),
    jacobian=(),
    memory=((OURS, 5), ("TorchDEQ", 5)),
)


class Error(NamedTuple):
    """‖x − x*‖/‖x*‖, the batch's largest and median."""

    largest: float
    median: float


class Found(NamedTuple):
    """The fewest evaluations of a side for a target, or for the lowest error that it comes to."""

    evaluations: int
    error: Error
    reached: bool


class _Enough(Exception):
    """The lowest target is reached."""


def error(x: Tensor, fixed: Tensor) -> Error:
    if x.shape != fixed.shape:  # samples that diverged have left the batch
        return Error(torch.inf, torch.inf)
    distance = (x.detach().double() - fixed).flatten(1).norm(dim=1) / fixed.flatten(1).norm(dim=1)
    distance = distance.nan_to_num(torch.inf)
    return Error(float(distance.max()), float(distance.median()))


def find(side: Side, fixed: Tensor, targets: tuple[float, ...], limit: int) -> list[Found]:
    """For each target: from a record of one solve, then tried."""
    record: list[float] = []

    def see(f: Tensor) -> None:
        record.append(error(f, fixed).largest)
        if record[-1] <= min(targets):
            raise _Enough

    with side.context():
        with suppress(_Enough):
            side.forward(limit, see)
        return [_tried(side, fixed, target, record, limit) for target in targets]


def _tried(side: Side, fixed: Tensor, target: float, record: list[float], limit: int) -> Found:
    within = min(record) <= target
    aim = target if within else _NEAREST * min(record)
    first = next((k for k, value in enumerate(record, 1) if value <= aim), len(record))
    least = min(max(first - 1, side.least), limit)  # the layer with its gradient is one more
    more = max(least // 20, 1)
    for evaluations in range(least, min(least + _TRIES * more, limit) + 1, more):
        found = error(side.forward(evaluations, None), fixed)
        if found.largest <= target:
            return Found(evaluations, found, True)
        if not within:
            break
    return Found(evaluations, found, False)


def _timer(side: Side, x: Tensor, evaluations: int) -> Sampler:
    return timed(partial(side.step, x, evaluations), torch.device("cpu"))  # the step waits for the device


class Benchmark:
    """One run: measures experiment by experiment, and keeps the rows.

    Args:
        libraries: of the rivals' libraries, those to measure where they are installed.
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
        self.machine = machine.describe(device)
        self.rows: list[Row] = []
        self.missing = {"torchdeq", "deepinv"} - set(libraries)
        self.main: tuple[str, int] | None = None  # the first layer with a fixed point, and our evaluations
        for name in libraries:
            if reason := rivals.quiet_import(name):
                self.say(f"{reason}; it is left out")
                self.missing.add(name)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def run(self) -> list[Row]:
        for layer, size in self.plan.cases:
            given = problem(self.weights, size, self.plan.batch, self.device)
            with self.console.status(f"{layer} layer, {size}²: its fixed points in float64"):
                coupled = has_batch_statistics(self.weights.denoiser)
                fixed = {b: fixed_point(given, layer, b) for b in {False, coupled}}
            if fixed[False] is None:
                self.say(f"the {layer} layer has no fixed point to be found with these weights; it is left out")
                continue
            if fixed[coupled] is None:
                self.say(f"published loop, {layer} layer: its map, by batch statistics, has no fixed point to be found")
            for half in (False, True):
                with self.console.status(f"{layer} layer, {size}², {'bfloat16' if half else 'float32'}"):
                    self._at_equal_error(given, layer, half, fixed)
        if self.main is not None:
            self._against_evaluations(self.main[0])
            self.against_size(*self.main)
            self._memory(self.main[0])
        return self.rows

    def _make(self, names: Iterator[tuple[str, Callable[[], Side]]]) -> dict[str, Side]:
        """Those that can be made."""
        made = {}
        for name, make in names:
            try:
                made[name] = make()
            except Exception as failure:
                self._leave_out(name, failure)
        return made

    def _leave_out(self, name: str, failure: Exception) -> None:
        """Say why a rival is not measured; of jfbfast itself it is an error."""
        if name == OURS:
            raise failure
        self.say(f"{name} is left out: {(str(failure).strip() or type(failure).__name__).splitlines()[0][:100]}")

    def _measure(
        self, made: dict[str, Side], given: Problem, evaluations: dict[str, int], label: str
    ) -> dict[str, Measured]:
        samplers = {name: partial(_timer, made[name], given.x, k) for name, k in evaluations.items()}
        return interleave(samplers, self.plan.seconds, (OURS,), lambda text: self.say(f"{label}: {text}"))

    def _row(self, experiment: str, side: str, layer: str, given: Problem, half: bool, evaluations: int) -> Row:
        return Row(
            experiment=experiment,
            side=side,
            layer=layer,
            size=given.x.shape[-1],
            batch=len(given.x),
            dtype="bfloat16" if half else "float32",
            evaluations=evaluations,
            machine=self.machine,
        )

    def _at_equal_error(self, given: Problem, layer: str, half: bool, fixed: dict[bool, Tensor | None]) -> None:
        torch.compiler.reset()
        found, made = {}, self._make(sides(given, layer, half, self.missing, layer in self.plan.compiled and not half))
        for name, side in made.items():
            target = fixed[side.batch_statistics]
            try:
                target = fixed[False] if target is None else target
                assert target is not None
                found[name] = find(side, target, self.plan.targets, self.plan.limit)
            except Exception as failure:
                self._leave_out(name, failure)
        if self.main is None:
            self.main = layer, found[OURS][0].evaluations
        for i, target_error in enumerate(self.plan.targets):
            counts = {name: each[i].evaluations for name, each in found.items()}
            measured = self._measure(made, given, counts, f"{layer} layer, error {target_error:g}")
            shares = split(given, layer, half, counts[OURS])
            for name, samples in measured.items():
                at = found[name][i]
                row = self._row("step", name, layer, given, half, at.evaluations).timed(samples, measured[OURS])
                row = replace(row, target_error=target_error, reached=at.reached)
                row = replace(row, error=at.error.largest, error_median=at.error.median)
                self.rows.append(row.split(shares) if name == OURS else row)

    def _against_evaluations(self, layer: str) -> None:
        given = problem(self.weights, self.plan.counts_size, self.plan.batch, self.device)
        made = self._make(sides(given, layer, False, self.missing))
        for count in self.plan.counts:
            with self.console.status(f"{count} evaluations"):
                measured = self._measure(made, given, dict.fromkeys(made, count), f"{count} evaluations")
            for name, samples in measured.items():
                row = self._row("evaluations", name, layer, given, False, count)
                self.rows.append(row.timed(samples, measured[OURS]))

    def against_size(self, layer: str, evaluations: int, wanted: Collection[str] | None = None) -> None:
        """The sides of these names, or all, with that many evaluations at each size of the plan."""
        for size in self.plan.sizes:
            given = problem(self.weights, size, self.plan.sizes_batch, self.device)
            names = [*sides(given, layer, False, self.missing)]
            if size in self.plan.jacobian:
                names += jacobian_sides(given, layer)
            made = self._make(each for each in names if wanted is None or each[0] in wanted)
            with self.console.status(f"{size}²"):
                measured = self._measure(made, given, dict.fromkeys(made, evaluations), f"{size}²")
            for name, samples in measured.items():
                row = self._row("size", name, layer, given, False, evaluations)
                self.rows.append(row.timed(samples, measured[OURS]))

    def _memory(self, layer: str) -> None:
        given = problem(self.weights, self.plan.counts_size, self.plan.batch, self.device)
        for name, evaluations in self.plan.memory:
            if name.lower() in self.missing:
                continue
            with self.console.status(f"memory of {name}"):
                try:
                    peak = peak_megabytes(given, layer, False, name, evaluations)
                except RuntimeError as failure:
                    self.say(f"memory of {name}: {failure}")
                    continue
            self.rows.append(replace(self._row("memory", name, layer, given, False, evaluations), peak_mb=peak))


def run(
    out: Path,
    quick: bool,
    console: Console,
    plan: Plan | None = None,
    checkpoint: str | None = None,
    batch: int | None = None,
) -> None:
    """Measure and write step.csv and step.png.

    Args:
        plan: in place of the full or the quick one.
        checkpoint: a shipped model's name or a file of trained weights, in place of an untrained network that is
            made a contraction.
        batch: in place of the plan's.

    Raises:
        ValueError: a batch below 1; weights with which no layer has a fixed point.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan or (QUICK if quick else FULL)
    if batch is not None:
        if batch < 1:
            raise ValueError(f"batch is {batch}; it takes an integer of at least 1")
        plan = replace(plan, batch=batch)
    warning = machine.disturbance()
    weights = untrained(plan.features, plan.depth) if checkpoint is None else trained(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        rows = Benchmark(plan, weights, device, console).run()
    if not rows:
        raise ValueError("no layer has a fixed point with these weights; there is nothing to measure")
    for table in tables(rows):
        console.print(table)
    if warning:
        console.print(f"[yellow]{warning}[/]", highlight=False)
    csv, png = out / "step.csv", out / "step.png"
    write_csv(rows, csv)
    plot(rows, png)
    console.print(f"Every side of every case: {csv}\nPicture: {png}", highlight=False)
