"""Figure 2: the time of a training step against the size of the images, Jacobian-based and by JFB."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from jfbfast.solvers import ConvergenceWarning

from .. import machine, report, step
from ..problem import untrained
from ..report import OURS
from ..step_sides import CG, GMRES, PUBLISHED
from .page import Section, markdown_table
from .plan import Plan

LABELS = {
    CG: "Jacobian-based: CG on the normal equations",
    GMRES: "Jacobian-based: GMRES",
    PUBLISHED: "JFB: the published loop",
    OURS: "JFB: jfbfast",
}
_STYLES = {CG: ("C3", "s"), GMRES: ("C1", "D"), PUBLISHED: ("C0", "^"), OURS: ("black", "o")}


@dataclass(frozen=True)
class Time:
    """One side at one size."""

    size: int
    side: str
    how: str  # "rounds" (the median of several), "once", "extrapolated" from a smaller size, or "left out"
    seconds: float | None  # of a step; None if it is left out
    q1: float | None = None
    q3: float | None = None
    ratio: float | None = None  # to jfbfast's JFB step of the same size


def measure(plan: Plan, console: Console, features: int = 64, depth: int = 17) -> list[Time]:
    """Time the sides of `LABELS` at every size of the plan: the paper's layer with the DnCNN of that size."""
    weights = untrained(features, depth)
    times: list[Time] = []
    for size in sorted(plan.sizes):
        beyond = {side for side in (CG, GMRES) if (_expected(times, side, size) or 0) > plan.cap}
        sizes = replace(step.FULL, sizes=(size,), sizes_batch=plan.step_batch, exact=(size,), seconds=plan.seconds)
        benchmark = step.Benchmark(sizes, weights, machine.default_device(), console, libraries=())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            benchmark.against_size("paper", plan.evaluations, LABELS.keys() - beyond)
        found = {row["side"]: row for row in benchmark.rows}
        for side in LABELS:
            if side in found:
                row = found[side]
                how = "once" if row["samples"] == 1 else "rounds"
                times.append(Time(size, side, how, row["median_s"], row["q1_s"], row["q3_s"], row["ratio"]))
            elif side in beyond and (expected := _expected(times, side, size)):
                ratio = expected / found[OURS]["median_s"]
                times.append(Time(size, side, "extrapolated", expected, ratio=ratio))
            else:
                times.append(Time(size, side, "left out", None))
    return times


def _expected(times: Sequence[Time], side: str, size: int) -> float | None:
    """Scale the largest size that was measured by the number of pixels, for the same number of iterations."""
    for time in reversed(times):
        if time.side == side and time.seconds is not None and time.how in ("rounds", "once"):
            return time.seconds * (size / time.size) ** 2
    return None


def run(plan: Plan, out: Path, console: Console) -> Section:
    """Write figure2.csv and figure2.png."""
    busy = machine.disturbance()  # before the benchmark itself keeps the machine busy
    times = measure(plan, console)
    about = machine.describe(machine.default_device())
    constants = {"batch": plan.step_batch, "evaluations": plan.evaluations, **vars(about)}
    report.write_csv(out / "figure2.csv", ({**vars(time), **constants} for time in times))
    title = f"training step of the paper's layer, batch {plan.step_batch}, {plan.evaluations} evaluations in the solve"
    picture = figure(times, f"a {title}\n{about.device}, threads: {about.threads}, float32")
    picture.savefig(out / "figure2.png", dpi=130)
    if busy:
        console.print(f"[yellow]{busy}[/]", highlight=False)
    console.print(f"Picture: {out / 'figure2.png'}", highlight=False)
    text = (
        f"A {title}, float32. In brackets the ratio to jfbfast's JFB. The Jacobian-based sides are "
        "jfbfast's too: the exact gradient, to a relative residual of 1e-6 in at most 50 iterations. They "
        "differentiate the layer with PyTorch's convolutions, while JFB's layer uses Winograd's on the CPU. "
        "The DnCNN, of 17 layers of 64 features, is untrained and scaled to a contraction. ~ measured once; "
        f"≈ extrapolated by the number of pixels, where a step was expected to take over {plan.cap:g} s."
        f"{f' **{busy[0].upper()}{busy[1:]}.**' if busy else ''}\n\n"
        f"{_markdown(times)}"
    )
    return Section("Figure 2: time of a training step", text, "figure2.png", ("figure2.csv",))


def _markdown(times: Sequence[Time]) -> str:
    sizes = list(dict.fromkeys(time.size for time in times))
    lines = [[label, *(_cell(time) for time in times if time.side == side)] for side, label in LABELS.items()]
    return markdown_table(["", *(f"{size}²" for size in sizes)], lines)


def _cell(time: Time) -> str:
    if time.seconds is None:
        return "left out"
    ratio = "" if time.side == OURS else f" ({time.ratio:.3g}×)"
    return {"once": "~", "extrapolated": "≈"}.get(time.how, "") + report.seconds(time.seconds) + ratio


def figure(times: Sequence[Time], title: str) -> Figure:
    """Time against size on logarithmic axes; what was not measured is hollow and dotted."""
    made = Figure(figsize=(7.8, 5.9), layout="constrained")
    axis: Any = made.subplots()
    for side, label in LABELS.items():
        style = {"color": _STYLES[side][0], "marker": _STYLES[side][1]}
        mine = [time for time in times if time.side == side]
        measured = [time for time in mine if time.how in ("rounds", "once")]
        beyond = [time for time in mine if time.how == "extrapolated"]
        _line(axis, measured, **style, label=label, linewidth=2 if side == OURS else 1.4)
        _line(axis, [time for time in mine if time.how == "once"], **style, linestyle="", markersize=9)
        _line(axis, [*measured[-1:], *beyond] if beyond else [], **style, linestyle=":", fillstyle="none")
    if any(time.how == "once" for time in times):
        axis.plot([], [], "s", color="grey", markersize=9, label="large marker: measured once")
    if any(time.how == "extrapolated" for time in times):
        axis.plot([], [], "s:", color="grey", fillstyle="none", label="hollow: extrapolated by the number of pixels")
    report.doubling(axis, (time.size for time in times), lambda size: f"{size}²")
    axis.set_xlabel("image size in pixels")
    axis.set_ylabel("time of a step")
    axis.set_title(title, fontsize=9, loc="left")
    made.legend(loc="outside lower left", fontsize=9, ncols=2)
    return made


def _line(axis: Any, times: Sequence[Time], **style: Any) -> None:
    axis.plot([time.size for time in times], [time.seconds for time in times], **style)
