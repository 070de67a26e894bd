"""The JSON file, the picture and the tables of `jfbfast bench gpu`, from its findings."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .. import kernels, report, step_report
from ..report import OURS, Row, distinct, where

_GRAPHS = ("iteration", "step")  # of what the part graph times


def publish(out: Path, console: Console, findings: Sequence[Row]) -> None:
    """Write gpu.json and gpu.png, and print the tables; findings are grouped by their part."""
    parts: dict[str, list[Row]] = defaultdict(list)
    for found in findings:
        parts[found["part"]].append({name: value for name, value in found.items() if name != "part"})
    data, picture = out / "gpu.json", out / "gpu.png"
    data.write_text(json.dumps(parts, indent=1), encoding="utf-8")
    for each in tables(parts):
        console.print(each)
    about = _about(parts)
    made = figure(parts)
    made.suptitle(about, fontsize=9)
    made.savefig(picture, dpi=110)
    console.print(f"{about}\n{step_report.NOTE}\nEvery finding: {data}\nPicture: {picture}", highlight=False)


def _about(parts: dict[str, list[Row]]) -> str:
    for found in parts.get("machine", []):
        if "device" in found:
            return "{device} ({instruction_sets}); {kernels}; torch {torch}; jfbfast {jfbfast}".format(**found)
    return "the machine was not described"


def _steps(parts: dict[str, list[Row]]) -> list[Row]:
    return [
        found for part in ("step", "compiled") for found in parts.get(part, []) if found.get("experiment") == "step"
    ]


def tables(parts: dict[str, list[Row]]) -> Iterator[Table]:
    """Training steps at equal error; kernels against their roofline; and what failed."""
    yield from step_report.step_tables(_steps(parts))
    if bounded := _kernels(parts):
        lines = [
            [name, shape, report.seconds(row["median_us"] / 1e6), f"{share:.0%}"]
            for (name, shape, side), (row, share) in bounded.items()
            if side == OURS
        ]
        yield report.table("kernels, float32", ["kernel", "images", "time", "of its roofline"], lines)
    lines = []
    for part, found in parts.items():
        bad = [str(each.get("name", "")) for each in found if not each.get("ok", True)]
        lines.append([part, str(len(found)), str(len(bad)), "; ".join(bad)[:60]])
    yield report.table("findings", ["part", "all", "failed", "which"], lines)


def _kernels(parts: dict[str, list[Row]]) -> dict[tuple[str, str, str], tuple[Row, float]]:
    """Our rows by kernel, shape and side, with their share of the roofline.

    That is the triad's bandwidth, or for a convolution the rate of a large matrix product.
    """
    rows = [found for found in parts.get("kernels", []) if "kernel" in found]
    peaks = {row["shape"]: row["ratio"] for row in where(rows, kernel="conv3x3", side="direct at peak")}
    return {
        (row["kernel"], row["shape"], row["side"]): (
            row,
            peaks.get(row["shape"], 0.0) if row["kernel"] == "conv3x3" else row["bandwidth_fraction"],
        )
        for row in rows
        if row["side"] in (OURS, kernels.OURS_BF16)
    }


def figure(parts: dict[str, list[Row]]) -> Figure:
    """Training steps; kernels against the bandwidth; a CUDA graph against eager launches; what a step holds."""
    steps = _steps(parts)
    height = max(9.0, 0.22 * (len(distinct(steps, "layer", "size", "side")) + 8))
    made = Figure(figsize=(16, height), layout="constrained")
    grid = made.add_gridspec(3, 2, width_ratios=(1.2, 1))
    if steps:
        step_report.plot_steps(made.add_subplot(grid[:, 0]), steps)
    _plot_kernels(made.add_subplot(grid[0, 1]), _kernels(parts))
    _plot_graphs(made.add_subplot(grid[1, 1]), parts.get("graph", []))
    _plot_memory(made.add_subplot(grid[2, 1]), parts.get("memory", []))
    return made


def _plot_kernels(axis: Any, bounded: dict[tuple[str, str, str], tuple[Row, float]]) -> None:
    cases = list(dict.fromkeys((name, shape) for name, shape, _ in bounded))
    for side, offset in ((OURS, -0.2), (kernels.OURS_BF16, 0.2)):
        found = [bounded.get((name, shape, side)) for name, shape in cases]
        bars = [(y + offset, each[1]) for y, each in enumerate(found) if each is not None]
        if bars:
            axis.barh(*zip(*bars, strict=True), 0.4, label=side)
    axis.axvline(1, color="black", linewidth=1)
    labels: dict[float, str] = {y: f"{name} {shape.replace('x', '×')}" for y, (name, shape) in enumerate(cases)}
    report.listed(axis, labels, max(len(cases), 1))
    report.titled(axis, "kernels: share of the roofline (bandwidth, or matrix products)", legend=bool(cases))


def _plot_graphs(axis: Any, found: Sequence[Row]) -> None:
    bars = [
        (f"{each['name']}, {what}", each[f"{what}_eager_ms"], each[f"{what}_graph_ms"])
        for each in found
        for what in _GRAPHS
        if f"{what}_graph_ms" in each and f"{what}_eager_ms" in each
    ]
    for column, name in ((1, "eager"), (2, "CUDA graph")):
        axis.barh(
            [y + 0.2 * (2 * column - 3) for y in range(len(bars))], [bar[column] for bar in bars], 0.4, label=name
        )
    report.listed(axis, {y: bar[0] for y, bar in enumerate(bars)}, max(len(bars), 1))
    report.titled(axis, "milliseconds, by launches and by one CUDA graph", legend=bool(bars))


def _plot_memory(axis: Any, found: Sequence[Row]) -> None:
    bars = {each["name"]: each["peak_mb"] for each in found if "peak_mb" in each}
    axis.barh(list(range(len(bars))), list(bars.values()), 0.6)
    report.listed(axis, dict(enumerate(bars)), max(len(bars), 1))
    report.titled(axis, "megabytes at the peak of a step", legend=False)
