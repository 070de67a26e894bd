"""`kernels`: each kernel against its definition in PyTorch and against what users write or call today.

Every side computes in float32 on the same random data, which are in the caches if they fit; jfbfast is also measured
in bfloat16. A time covers everything from the user's call on: dispatch, allocation of the result, arithmetic. On CUDA
it is the time on the device, with calls replayed from a CUDA graph where possible; see the column ``clock``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jfbfast import backend
from jfbfast.backends import conv3x3 as winograd
from jfbfast.backends import reference
from jfbfast.operators.blur import GaussianBlur
from jfbfast.operators.tables import bands
from jfbfast.solvers import Anderson

from . import machine, report, rivals
from .report import OURS, Row, distinct, where
from .timing import Sampler, Timing, between_evaluations, interleave, spread, timed

OURS_BF16 = "jfbfast bf16"
PARAMETERS = {"blur": "radius", "data step": "radius", "Anderson step": "memory", "conv3x3": "channels"}
_BOUNDS = ("triad", "launch", "the map", "direct at peak")  # sides that are lower bounds, not rivals
_STEP_SIZE = 0.5
_STEPS = 6  # of Anderson's method with a full history, in one solve

Sides = dict[str, Callable[[], Sampler]]


@dataclass(frozen=True)
class Case:
    """One kernel on one shape of images."""

    kernel: str
    parameter: int  # the blur's radius, Anderson's memory, or the convolution's channels
    shape: tuple[int, int, int, int]  # (B, C, H, W)

    def __str__(self) -> str:
        return f"{self.kernel}, {'×'.join(map(str, self.shape))}, {self.parameter}"

    def bytes(self, itemsize: int) -> int:
        """The bytes that any implementation must move, for elements of ``itemsize`` bytes.

        The band tables of one operator are float32: (H + W) rows of 2r + 1 weights. Anderson's step with a full
        history of m reads x and f, writes the residual f − x and reads the m − 1 others; then it reads the m images
        and writes the next x. A history in bfloat16 keeps m − 1 differences of images instead: the newest is
        written, from f and the image before it, and the others are read.
        """
        size, n = torch.Size(self.shape).numel(), self.parameter
        tables = 4 * (self.shape[2] + self.shape[3]) * (2 * n + 1)
        if self.kernel == "blur":  # reads x, writes A x
            return 2 * itemsize * size + tables
        if self.kernel == "data step":  # reads x, d and r, writes the result; tables of A and Aᵀ
            return 4 * itemsize * size + 2 * tables
        if self.kernel == "conv3x3":  # reads x and the weight, writes the result
            return itemsize * (2 * size + 9 * n**2)
        if itemsize == 2:
            return size * ((4 + 4 + 2 + 2 * (n - 1)) + (4 + 4 + 2 + 2 * (n - 2) + 4))
        return size * (2 * n + 3) * itemsize

    def row(self, side: str, timing: Timing, bandwidth: float) -> Row:
        """The cells of the CSV; ``bandwidth`` in bytes per second. A fraction above 1 means data in a cache."""
        dtype = torch.bfloat16 if side.endswith("bf16") else torch.float32
        count = self.bytes(dtype.itemsize)
        rate = count / timing.seconds.median
        return {
            "kernel": self.kernel,
            "shape": "x".join(map(str, self.shape)),
            **dict.fromkeys(("radius", "memory", "channels")),
            PARAMETERS[self.kernel]: self.parameter,
            "side": side,
            "dtype": str(dtype).removeprefix("torch."),
            "clock": timing.clock,
            **timing.columns("us"),
            "bytes": count,
            "gb_per_s": rate / 1e9,
            "bandwidth_fraction": rate / bandwidth,
            "triad_gb_per_s": bandwidth / 1e9,
        }


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: tuple[tuple[int, int, int, int], ...]  # (B, C, H, W) of the images
    radii: tuple[int, ...]  # of the blur and the data step
    memories: tuple[int, ...]  # of Anderson's method
    features: tuple[tuple[int, int, int, int], ...]  # (B, C, H, W) of the convolution, to as many channels
    seconds: float  # for the rounds of one case
    compiled_radius: int  # the largest to give torch.compile, which unrolls the taps; 31 taps take it a minute
    triad_bytes: int  # of the arrays that measure the memory's bandwidth

    def cases(self) -> Iterator[Case]:
        """Every kernel with every parameter and shape."""
        for kernel, parameters in (("blur", self.radii), ("data step", self.radii), ("Anderson step", self.memories)):
            yield from (Case(kernel, parameter, shape) for parameter in parameters for shape in self.shapes)
        yield from (Case("conv3x3", shape[1], shape) for shape in self.features)


FULL = Plan(
    shapes=(*((16, 3, n, n) for n in (32, 64, 128, 256)), (1, 3, 2048, 2048)),
    radii=(2, 4, 15),
    memories=(3, 5, 10),
    features=((16, 64, 64, 64), (16, 64, 128, 128), (16, 128, 64, 64), (16, 96, 32, 32)),
    seconds=3.0,
    compiled_radius=4,
    triad_bytes=3 << 28,
)
QUICK = Plan(
    shapes=((16, 3, 64, 64), (16, 3, 128, 128)),
    radii=(2,),
    memories=(5,),
    features=((16, 64, 64, 64),),
    seconds=2.0,
    compiled_radius=2,
    triad_bytes=3 << 27,
)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _compiled(call: partial[Tensor], device: torch.device) -> Sampler:
    """The call, compiled for exactly its shapes before it is timed."""
    compiled = partial(torch.compile(call.func, dynamic=False), *call.args)
    compiled()
    return timed(compiled, device)


def operator_sides(case: Case, plan: Plan, device: torch.device, missing: set[str]) -> Sides:
    """Blur: A x. Data step: x − η(Aᵀ(A x − d) + r)."""
    step = case.kernel == "data step"
    images: Sequence[Tensor] = torch.randn(3 if step else 1, *case.shape, device=device).unbind()
    halves, last = [x.bfloat16() for x in images], [_channels_last(x) for x in images]
    size, sigma = 2 * case.parameter + 1, max(case.parameter / 2, 1.0)
    blur, eta = GaussianBlur(size, sigma), torch.tensor(_STEP_SIZE, device=device)
    forward, adjoint = (bands(blur.taps, case.shape[2:], torch.float32, device, a) for a in (False, True))
    if step:
        ours: Callable[..., Tensor] = partial(blur.gradient_step, step_size=eta)
        definition = partial(reference.gradient, images[0], images[1], images[2], forward, adjoint, eta)
    else:
        ours, definition = blur, partial(reference.blur, images[0], forward)

    sides: Sides = {
        OURS: partial(timed, partial(ours, *images), device),
        OURS_BF16: partial(timed, partial(ours, *halves), device),
        "PyTorch": partial(timed, definition, device),
    }
    if case.parameter <= plan.compiled_radius:
        sides["compiled"] = partial(_compiled, definition, device)
    for name, make, given in (
        ("conv2d", rivals.conv2d, images),
        ("conv2d NHWC", rivals.conv2d, last),
        ("conv2d separable", rivals.separable_conv2d, images),
        ("kornia", rivals.kornia, images),
        ("torchvision", rivals.torchvision, images),
    ):
        if name not in missing:
            theirs = make(size, sigma, given[0])
            call: Callable[..., Tensor] = partial(rivals.data_step, theirs, step_size=_STEP_SIZE) if step else theirs
            sides[name] = partial(timed, partial(call, *given), device)
    return sides


def linear_map(x: Tensor) -> Callable[[Tensor], Tensor]:
    """T(x) = c ⊙ x + b with random c in [0, 0.95]: a contraction that costs one pass over x."""
    c, b = torch.rand_like(x) * 0.95, torch.randn_like(x)
    return lambda x: torch.addcmul(b, c, x)


def anderson_sides(case: Case, plan: Plan, device: torch.device, missing: set[str]) -> Sides:
    """One step of Anderson's method with a full history, without the map; all sides solve the same linear map.

    Each side is its whole solver with its stopping rule. torch.compile cannot take any of these loops.
    """
    x0, memory = torch.randn(case.shape, device=device), case.parameter
    layer = linear_map(x0)
    max_iter = memory + _STEPS

    def ours(layer: rivals.Layer, kernels: str | None = None, history: torch.dtype | None = None) -> None:
        with backend(kernels) if kernels else nullcontext():
            Anderson(tol=0.0, max_iter=max_iter, memory=memory, history_dtype=history).solve(layer, x0)

    solvers: dict[str, Callable[[rivals.Layer], object]] = {
        OURS: ours,
        OURS_BF16: partial(ours, history=torch.bfloat16),  # only the history
        "PyTorch": partial(ours, kernels="reference"),
        "published loop": lambda layer: rivals.gilton_anderson(layer, x0, memory, max_iter),
        "TorchDEQ": lambda layer: rivals.torchdeq_anderson(layer, x0, memory, max_iter),
        "deepinv": lambda layer: rivals.deepinv_anderson(layer, x0, memory, max_iter),
    }
    sides: Sides = {
        name: partial(between_evaluations, solve, layer, device, first=memory - 1)
        for name, solve in solvers.items()
        if name.lower() not in missing
    }
    sides["the map"] = lambda: timed(lambda: layer(x0), device)
    return sides


def conv3x3_sides(case: Case, plan: Plan, device: torch.device, missing: set[str]) -> Sides:
    """ReLU(weight ∗ x + bias) from and to ``channels``; the weight is already transformed, as during a solve."""
    channels = case.parameter
    x = _channels_last(torch.randn(case.shape, device=device))
    weight = _channels_last(torch.randn(channels, channels, 3, 3, device=device) / (9 * channels) ** 0.5)
    bias = torch.randn(channels, device=device)
    transformed = winograd.transformed_weight(weight)
    half = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    planar = x.contiguous(), weight.contiguous()
    size = 1024 if device.type == "cpu" else 8192  # large enough to occupy a whole GPU
    a, b = torch.randn(2, size, size, device=device)
    # Winograd's F(4 × 4, 3 × 3) needs a quarter of the direct convolution's multiplications.
    share = 18 * channels * x.numel() / (2 * size**3)

    def at_peak() -> Sampler:
        sampler = timed(lambda: a @ b, device)
        return Sampler(sampler.clock, lambda: share * sampler.sample())

    return {
        OURS: lambda: timed(lambda: winograd.conv3x3(x, weight, bias, True, transformed), device),
        f"{OURS} with its transform": lambda: timed(lambda: winograd.conv3x3(x, weight, bias, True), device),
        "conv2d NHWC": lambda: timed(lambda: reference.conv3x3(x, weight, bias, True), device),
        "conv2d NCHW": lambda: timed(lambda: reference.conv3x3(*planar, bias, True), device),
        "conv2d bf16": lambda: timed(lambda: reference.conv3x3(*half, True), device),
        "direct at peak": at_peak,
    }


_SIDES: dict[str, Callable[[Case, Plan, torch.device, set[str]], Sides]] = {
    "blur": operator_sides,
    "data step": operator_sides,
    "Anderson step": anderson_sides,
    "conv3x3": conv3x3_sides,
}


@torch.no_grad()
def measure(plan: Plan, device: torch.device, console: Console) -> list[Row]:
    """Measure all cases of the plan; the memory's bandwidth is measured before, between and after the kernels."""
    say: Callable[..., Any] = partial(console.print, highlight=False)
    missing = rivals.missing(("kornia", "torchvision", "torchdeq", "deepinv"), say)
    triads: list[float] = []
    measured: dict[Case, dict[str, Timing]] = {}
    for kernel, cases in groupby(plan.cases(), lambda case: case.kernel):
        triads += machine.bandwidth_samples(plan.triad_bytes, device)
        for case in cases:
            with console.status(str(case)):
                torch.compiler.reset()  # otherwise the shapes of earlier cases make it compile a general function
                sides = _SIDES[kernel](case, plan, device, missing)
                sides["triad"] = partial(timed, machine.triad(case.bytes(4), device), device)
                if device.type == "cuda":
                    sides["launch"] = partial(timed, partial(torch.rand(1, device=device).add_, 1), device)
                measured[case] = interleave(sides, plan.seconds, partial(say, f"{case}:"))
    triads += machine.bandwidth_samples(plan.triad_bytes, device)

    bandwidth = spread(triads).median
    rows = [case.row(side, timing, bandwidth) for case, timings in measured.items() for side, timing in timings.items()]
    return [row | machine.describe(device) for row in rows]


def _case(row: Row) -> str:
    name = PARAMETERS[row["kernel"]]
    return f"{row['shape'].replace('x', '×')}, {name[0]} = {row[name]}"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table for each kernel and parameter, with a column per image shape.

    The first lines are jfbfast's float32 time, its interquartile range, its bytes and its share of the bandwidth;
    then follows the ratio of every other side.
    """
    for kernel in distinct(rows, "kernel"):
        name = PARAMETERS[kernel]
        for parameter in distinct(where(rows, kernel=kernel), name):
            chosen = where(rows, kernel=kernel, **{name: parameter})
            yield _table(f"{kernel}, {name} {parameter}", chosen)


def _table(title: str, rows: Sequence[Row]) -> Table:
    ours = where(rows, side=OURS)
    shapes = [row["shape"].split("x") for row in ours]
    lines = [
        [OURS, *(report.seconds(row["median_us"] / 1e6) for row in ours)],
        ["  interquartile", *(f"{(row['q3_us'] - row['q1_us']) / row['median_us']:.0%}" for row in ours)],
        ["  bytes", *(f"{report.digits(row['bytes'] / 1e6)} MB" for row in ours)],
        ["  of bandwidth", *(f"{row['bandwidth_fraction']:.0%}" for row in ours)],
        None,
        *report.pivot([row for row in rows if row["side"] != OURS], lambda row: row["shape"], report.ratio),
    ]
    return report.table(title, ["images", *(f"{b}×{c}\n{h}×{w}" for b, c, h, w in shapes)], lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Two panels per kernel: the rivals' times over jfbfast's, and jfbfast's share of the bandwidth."""
    kernels = distinct(rows, "kernel")
    heights = [len(where(rows, kernel=kernel, side=OURS)) + 3 for kernel in kernels]
    made = Figure(figsize=(13, 0.3 * sum(heights) + 1), layout="constrained")
    axes = made.subplots(len(kernels), 2, squeeze=False, height_ratios=heights, width_ratios=(3, 1))
    for (left, right), kernel in zip(axes, kernels, strict=True):
        plot_ratios(left, where(rows, kernel=kernel))
        report.titled(left, f"{kernel}: time of the others over jfbfast's (float32)")
        plot_bandwidth(right, where(rows, kernel=kernel))
        report.titled(right, "counted bytes/s over the triad's")
    return made


def plot_ratios(axis: Any, rows: Sequence[Row]) -> None:
    """A line per case: each rival's ratio with its quartiles; hollow markers were measured once."""
    cases = list(dict.fromkeys(map(_case, rows)))
    rivals = [side for side in distinct(rows, "side") if not side.startswith(OURS) and side not in _BOUNDS]
    axis.axvline(1, color="black", linewidth=1)
    for i, rival in enumerate(rivals):
        style: Row = {"marker": report.MARKERS[i % 8], "linestyle": "", "color": f"C{i}"}
        axis.plot([], [], **style, label=rival)
        for row in where(rows, side=rival):
            y = cases.index(_case(row))
            axis.plot((row["ratio_q1"], row["ratio_q3"]), (y, y), color=f"C{i}", linewidth=1)
            axis.plot(row["ratio"], y, **style, fillstyle="none" if row["samples"] == 1 else "full")
    axis.set_xscale("log")
    report.listed(axis, dict(enumerate(cases)), len(cases))
    report.logarithmic(axis.xaxis, lambda value: f"{value:g}×")


def plot_bandwidth(axis: Any, rows: Sequence[Row]) -> None:
    """A bar per case and dtype."""
    cases = list(dict.fromkeys(map(_case, rows)))
    for side, offset in ((OURS, -0.2), (OURS_BF16, 0.2)):
        bars = {cases.index(_case(row)) + offset: row["bandwidth_fraction"] for row in where(rows, side=side)}
        if bars:
            axis.barh(list(bars), list(bars.values()), 0.4, label=side)
    axis.axvline(1, color="black", linewidth=1)
    report.listed(axis, {}, len(cases))


def run(out: Path, quick: bool, console: Console) -> None:
    """Measure `QUICK` or `FULL`, and write kernels.csv and kernels.png into the directory."""
    torch.manual_seed(0)
    device, warnings = machine.default_device(), machine.disturbance()  # before the benchmark keeps the machine busy
    rows = measure(QUICK if quick else FULL, device, console)
    about = f"{machine.about(device)}; triad {rows[0]['triad_gb_per_s']:.1f} GB/s"
    note = "n×: the side's time over jfbfast's in float32, the median of interleaved rounds; ~ measured once"
    report.publish("kernels", out, console, rows, tables(rows), figure(rows), about, note, *warnings)
