"""Figure 2: the time of a training step against the size of the images, Jacobian-based and by JFB."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console

from jfbfast.solvers import ConvergenceWarning

from .. import display, machine, step
from ..implicit_rivals import OURS, PUBLISHED
from ..problem import untrained
from .page import Section, markdown_table
from .plan import Plan

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

CG, GMRES = f"{OURS}, CG", f"{OURS}, GMRES"
LABELS = {
    CG: "Jacobian-based: CG on the normal equations",
    GMRES: "Jacobian-based: GMRES",
    PUBLISHED: "JFB: the published loop",
    OURS: "JFB: jfbfast",
}
_STYLES = {CG: ("C3", "s"), GMRES: ("C1", "D"), PUBLISHED: ("C0", "^"), OURS: ("black", "o")}


@dataclass(frozen=True)
class Time:
    """One side at one size.

    Attributes:
        how: "rounds" (the median of several), "once", "extrapolated" (from the largest size that was
            measured, by the number of pixels), or "left out".
        seconds: of a step; None where it is left out.
        ratio: over jfbfast's JFB step of the same size.
    """

    size: int
    side: str
    how: str
    seconds: float | None
    q1: float | None = None
    q3: float | None = None
    ratio: float | None = None


def measure(plan: Plan, console: Console, features: int = 64, depth: int = 17) -> list[Time]:
    """The sides of `LABELS` at every size of the plan, of the paper's layer with the DnCNN of that size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = untrained(features, depth)
    times: list[Time] = []
    for size in sorted(plan.sizes):
        beyond = {side for side in (CG, GMRES) if (_expected(times, side, size) or 0) > plan.cap}
        sizes = replace(step.FULL, sizes=(size,), sizes_batch=plan.step_batch, jacobian=(size,), seconds=plan.seconds)
        benchmark = step.Benchmark(sizes, weights, device, console, libraries=())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            benchmark.against_size("paper", plan.evaluations, [side for side in LABELS if side not in beyond])
        found = {row.side: row for row in benchmark.rows}
        ours = found[OURS].median_s
        assert ours is not None
        for side in LABELS:
            if side in found:
                row = found[side]
                how = "once" if row.samples == 1 else "rounds"
                times.append(Time(size, side, how, row.median_s, row.q1_s, row.q3_s, row.ratio))
                continue
            expected = _expected(times, side, size) if side in beyond else None
            how = "left out" if expected is None else "extrapolated"
            times.append(Time(size, side, how, expected, ratio=None if expected is None else expected / ours))
    return times


def _expected(times: Sequence[Time], side: str, size: int) -> float | None:
    """From the largest size that was measured: as many iterations, and time in proportion to the pixels."""
    measured = [t for t in times if t.side == side and t.how in ("rounds", "once")]
    if not measured:
        return None
    last = measured[-1]
    assert last.seconds is not None
    return last.seconds * (size / last.size) ** 2


def run(plan: Plan, out: Path, console: Console) -> Section:
    """Write figure2.csv and figure2.png."""
    busy = machine.disturbance()  # as it is before
    times = measure(plan, console)
    about = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with (out / "figure2.csv").open("w", newline="", encoding="utf-8") as file:
        constants = {"batch": plan.step_batch, "evaluations": plan.evaluations, **vars(about)}
        writer = csv.DictWriter(file, [*Time.__dataclass_fields__, *constants])
        writer.writeheader()
        writer.writerows({**vars(time), **constants} for time in times)
    title = (
        f"a training step of the paper's layer, batch {plan.step_batch}, {plan.evaluations} evaluations in the solve"
    )
    plot(times, f"{title}\n{about.device}, threads: {about.threads}, float32", out / "figure2.png")
    if busy:
        console.print(f"[yellow]{busy}[/]", highlight=False)
    console.print(f"Picture: {out / 'figure2.png'}", highlight=False)
    text = (
        f"{title[0].upper()}{title[1:]}, float32. In brackets the ratio to jfbfast's JFB. The Jacobian-based sides are "
        "jfbfast's too: the exact gradient, to a relative residual of 1e-6 in at most 50 iterations, and so with "
        "PyTorch's convolutions in the layer that is differentiated, where JFB's has Winograd's on the CPU. "
        "The DnCNN, of 17 layers of 64 features, is untrained and scaled to a contraction. ~ measured once; "
        f"≈ extrapolated by the number of pixels, where a step was expected to take over {plan.cap:g} s."
        f"{f' **{busy[0].upper()}{busy[1:]}.**' if busy else ''}\n\n"
        f"{_markdown(times)}"
    )
    return Section("Figure 2: time of a training step", text, "figure2.png", ("figure2.csv",))


def _markdown(times: Sequence[Time]) -> str:
    sizes = list(dict.fromkeys(time.size for time in times))
    lines = []
    for side, label in LABELS.items():
        found = {time.size: time for time in times if time.side == side}
        lines.append([label, *(_cell(found[size]) for size in sizes)])
    return markdown_table(["", *(f"{size}²" for size in sizes)], lines)


def _cell(time: Time) -> str:
    if time.seconds is None:
        return "left out"
    ratio = "" if time.side == OURS else f" ({time.ratio:.3g}×)"
    return {"once": "~", "extrapolated": "≈"}.get(time.how, "") + display.time(time.seconds) + ratio


def plot(times: Sequence[Time], title: str, path: Path) -> None:
    """Time against size, on logarithmic axes; what was not measured is hollow and dotted."""
    figure, axis = plt.subplots(figsize=(7.8, 5.9), layout="constrained")
    for side, label in LABELS.items():
        colour, marker = _STYLES[side]
        mine = [time for time in times if time.side == side and time.seconds is not None]
        measured = [time for time in mine if time.how != "extrapolated"]
        _line(axis, measured, color=colour, marker=marker, label=label, linewidth=2 if side == OURS else 1.4)
        _line(axis, [t for t in measured if t.how == "once"], color=colour, marker=marker, linestyle="", markersize=9)
        beyond = [time for time in mine if time.how == "extrapolated"]
        if beyond:
            _line(axis, beyond, color=colour, marker=marker, linestyle="", fillstyle="none")
            _line(axis, [*measured[-1:], *beyond], color=colour, linestyle=":")
    if any(time.how == "once" for time in times):
        axis.plot([], [], "s", color="grey", markersize=9, label="large marker: measured once")
    if any(time.how == "extrapolated" for time in times):
        axis.plot([], [], "s:", color="grey", fillstyle="none", label="hollow: extrapolated by the number of pixels")
    sizes = sorted({time.size for time in times})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{size}²" for size in sizes])
    display.logarithmic(axis.yaxis, display.time)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("image size in pixels")
    axis.set_ylabel("time of a step")
    axis.grid(alpha=0.3)
    axis.set_title(title, fontsize=9, loc="left")
    figure.legend(loc="outside lower left", fontsize=9, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axis: Any, times: Sequence[Time], **style: Any) -> None:
    axis.plot([time.size for time in times], [time.seconds for time in times], **style)
