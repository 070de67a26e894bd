"""The tables and the picture of the benchmark `kernels`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from . import report
from .report import OURS, Row, distinct, where

OURS_BF16 = "jfbfast bf16"
PARAMETERS = {"blur": "radius", "data step": "radius", "Anderson step": "memory", "conv3x3": "channels"}
_BOUNDS = ("triad", "launch", "the map", "direct at peak")  # sides that are lower bounds, not rivals


def _parameter(row: Row) -> int:
    parameter: int = row[PARAMETERS[row["kernel"]]]
    return parameter


def _case(row: Row) -> str:
    return f"{row['shape'].replace('x', '×')}, {PARAMETERS[row['kernel']][0]} = {_parameter(row)}"


def tables(rows: Sequence[Row], about: str, warning: str | None = None) -> Iterator[Table]:
    """A table for each kernel and parameter, with a column per image shape.

    The first lines are jfbfast's float32 time, its interquartile range, its bytes and its share of the bandwidth;
    then follows the ratio of every other side.
    """
    for kernel in distinct(rows, "kernel"):
        name = PARAMETERS[kernel]
        for parameter in distinct(where(rows, kernel=kernel), name):
            chosen = where(rows, kernel=kernel, **{name: parameter})
            yield _table(f"{kernel}, {name} {parameter}", chosen)
    note = "n×: the side's time over jfbfast's in float32, the median of interleaved rounds; ~ measured once"
    yield report.notes(about, note, warning and f"[yellow]{warning}[/]")


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


def figure(rows: Sequence[Row], about: str) -> Figure:
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
    made.suptitle(about, fontsize=9)
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
