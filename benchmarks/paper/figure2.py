"""Figure 2: the time of a training step against the size of the images, Jacobian-based and by JFB."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from jfbfast.solvers import ConvergenceWarning

from .. import machine, report, step
from ..problem import untrained
from ..report import OURS, Row, distinct, where
from ..step_sides import CG, GMRES, PUBLISHED
from .plan import Plan

LABELS = {
    CG: "Jacobian-based: CG on the normal equations",
    GMRES: "Jacobian-based: GMRES",
    PUBLISHED: "JFB: the published loop",
    OURS: "JFB: jfbfast",
}
_STYLES = {CG: ("C3", "s"), GMRES: ("C1", "D"), PUBLISHED: ("C0", "^"), OURS: ("black", "o")}


def measure(plan: Plan, console: Console, features: int = 64, depth: int = 17) -> list[Row]:
    """Time the sides of `LABELS` at every size of the plan: the paper's layer with the DnCNN of that size.

    ``how`` a time was found is "rounds" (the median of several), "once", "extrapolated", or "left out".
    """
    weights = untrained(features, depth)
    times: list[Row] = []
    for size in sorted(plan.sizes):
        expected = {side: _extrapolated(where(times, side=side), size) for side in (CG, GMRES)}
        beyond = {side: seconds for side, seconds in expected.items() if seconds > plan.cap}
        sizes = replace(step.FULL, sizes=(size,), sizes_batch=plan.step_batch, exact=(size,), seconds=plan.seconds)
        benchmark = step.Benchmark(sizes, weights, machine.default_device(), console, libraries=())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            benchmark.against_size("paper", plan.evaluations, LABELS.keys() - beyond.keys())
        found = {row["side"]: row for row in benchmark.rows}
        for side in LABELS:
            time: Row = {"size": size, "side": side, "how": "left out"} | dict.fromkeys(
                ("seconds", "q1", "q3", "ratio")
            )
            if side in found:
                time["how"] = "once" if found[side]["samples"] == 1 else "rounds"
                time |= {name.removesuffix("_s"): found[side][name] for name in ("q1_s", "q3_s", "ratio")}
                time["seconds"] = found[side]["median_s"]
            elif side in beyond:
                ratio = beyond[side] / found[OURS]["median_s"]
                time |= {"how": "extrapolated", "seconds": beyond[side], "ratio": ratio}
            times.append(time)
    return times


def _extrapolated(times: Sequence[Row], size: int) -> float:
    """Scale the largest size that was measured by the number of pixels, for the same number of iterations; or 0."""
    measured = [time for time in times if time["how"] in ("rounds", "once")]
    return measured[-1]["seconds"] * (size / measured[-1]["size"]) ** 2 if measured else 0.0


def run(plan: Plan, out: Path, console: Console) -> str:
    """Write figure2.csv and figure2.png."""
    busy = machine.disturbance()  # before the benchmark itself keeps the machine busy
    times = measure(plan, console)
    about = machine.describe(machine.default_device())
    constants = {"batch": plan.step_batch, "evaluations": plan.evaluations, **about}
    report.write_csv(out / "figure2.csv", ({**time, **constants} for time in times))
    title = f"training step of the paper's layer, batch {plan.step_batch}, {plan.evaluations} evaluations in the solve"
    picture = figure(times, f"a {title}\n{about['device']}, threads: {about['threads']}, float32")
    picture.savefig(out / "figure2.png", dpi=130)
    console.print(*busy, f"Picture: {out / 'figure2.png'}", sep="\n", highlight=False)
    text = (
        f"A {title}, float32. In brackets the ratio to jfbfast's JFB. The Jacobian-based sides are "
        "jfbfast's too: the exact gradient, to a relative residual of 1e-6 in at most 50 iterations. They "
        "differentiate the layer with PyTorch's convolutions, while JFB's layer uses Winograd's on the CPU. "
        "The DnCNN, of 17 layers of 64 features, is untrained and scaled to a contraction. ~ measured once; "
        f"≈ extrapolated by the number of pixels, where a step was expected to take over {plan.cap:g} s."
        f"{''.join(f' **{each[0].upper()}{each[1:]}.**' for each in busy)}\n\n{_markdown(times)}"
    )
    return report.section("Figure 2: time of a training step", text, "figure2")


def _markdown(times: Sequence[Row]) -> str:
    lines = [[label, *map(_cell, where(times, side=side))] for side, label in LABELS.items()]
    return report.markdown_table(["", *(f"{size}²" for size in distinct(times, "size"))], lines)


def _cell(time: Row) -> str:
    if time["seconds"] is None:
        return "left out"
    ratio = "" if time["side"] == OURS else f" ({time['ratio']:.3g}×)"
    return {"once": "~", "extrapolated": "≈"}.get(time["how"], "") + report.seconds(time["seconds"]) + ratio


def figure(times: Sequence[Row], title: str) -> Figure:
    """Time against size on logarithmic axes; what was not measured is hollow and dotted."""
    made = Figure(figsize=(7.8, 5.9), layout="constrained")
    axis: Any = made.subplots()

    def line(times: Sequence[Row], **style: Any) -> None:
        axis.plot([time["size"] for time in times], [time["seconds"] for time in times], **style)

    for side, label in LABELS.items():
        style = {"color": _STYLES[side][0], "marker": _STYLES[side][1]}
        mine = where(times, side=side)
        once, beyond = where(mine, how="once"), where(mine, how="extrapolated")
        measured = [time for time in mine if time["how"] in ("rounds", "once")]
        line(measured, **style, label=label, linewidth=2 if side == OURS else 1.4)
        line(once, **style, linestyle="", markersize=9)
        line([*measured[-1:], *beyond] if beyond else [], **style, linestyle=":", fillstyle="none")
    if where(times, how="once"):
        axis.plot([], [], "s", color="grey", markersize=9, label="large marker: measured once")
    if where(times, how="extrapolated"):
        axis.plot([], [], "s:", color="grey", fillstyle="none", label="hollow: extrapolated by the number of pixels")
    report.doubling(axis, distinct(times, "size"), lambda size: f"{size}²")
    axis.set_xlabel("image size in pixels")
    axis.set_ylabel("time of a step")
    axis.set_title(title, fontsize=9, loc="left")
    made.legend(loc="outside lower left", fontsize=9, ncols=2)
    return made
