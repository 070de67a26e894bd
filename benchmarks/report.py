"""Rows of results: as a CSV, as tables for the terminal, and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.table import Table

from . import display
from .machine import Machine
from .timing import Measured, ratios, spread

matplotlib.use("Agg")

import matplotlib.pyplot as plt

OURS, OURS_BF16 = "jfbfast", "jfbfast bf16"
_FLOORS = ("triad", "launch", "the map", "direct at peak")  # sides that are no rivals
_PARAMETER = {"blur": "radius", "data step": "radius", "Anderson step": "memory", "conv3x3": "channels"}


@dataclass(frozen=True)
class Row:
    """One side of one case; times in microseconds.

    Attributes:
        bytes: what the operation must move, whoever computes it, counted by the benchmark's formula.
        bandwidth_fraction: bytes / median over the memory's bandwidth. Above 1, the data lay in a cache.
        ratio: the median over the rounds of this side's time over jfbfast's, in the same round.
        samples: 1 for a side so slow that it was measured once.
    """

    kernel: str
    shape: str
    radius: int | None
    memory: int | None
    channels: int | None
    side: str
    dtype: str
    clock: str
    samples: int
    median_us: float
    q1_us: float
    q3_us: float
    bytes: int
    gb_per_s: float
    bandwidth_fraction: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    triad_gb_per_s: float
    machine: Machine

    @property
    def parameter(self) -> int | None:
        parameter: int | None = getattr(self, _PARAMETER[self.kernel])
        return parameter


def make_row(
    kernel: str,
    shape: Sequence[int],
    parameter: int,
    side: str,
    dtype: torch.dtype,
    count: int,
    measured: Measured,
    ours: Measured,
    machine: Machine,
    bandwidth: float,
) -> Row:
    time, ratio = spread(measured.samples), ratios(measured, ours)
    parameters = dict.fromkeys(("radius", "memory", "channels")) | {_PARAMETER[kernel]: parameter}
    return Row(
        kernel=kernel,
        shape="x".join(map(str, shape)),
        **parameters,
        side=side,
        dtype=str(dtype).removeprefix("torch."),
        clock=measured.clock,
        samples=len(measured.samples),
        median_us=time.median * 1e6,
        q1_us=time.q1 * 1e6,
        q3_us=time.q3 * 1e6,
        bytes=count,
        gb_per_s=count / time.median / 1e9,
        bandwidth_fraction=count / time.median / bandwidth,
        ratio=ratio.median,
        ratio_q1=ratio.q1,
        ratio_q3=ratio.q3,
        triad_gb_per_s=bandwidth / 1e9,
        machine=machine,
    )


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """One line a row, of a dataclass; the fields of its machine are the last columns."""
    names = [f.name for f in fields(rows[0]) if f.name != "machine"] + [f.name for f in fields(Machine)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            machine = values.pop("machine")
            writer.writerow({name: _number(value) for name, value in (values | machine).items()})


def _number(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _about(rows: Sequence[Row]) -> str:
    return f"{display.about(rows[0].machine)}; triad {rows[0].triad_gb_per_s:.1f} GB/s"


def _cases(rows: Sequence[Row], kernel: str) -> Iterator[tuple[str, dict[str, Row]]]:
    """The label of each case of a kernel, and its sides."""
    cases: dict[tuple[str, int | None], dict[str, Row]] = {}
    for row in rows:
        if row.kernel == kernel:
            cases.setdefault((row.shape, row.parameter), {})[row.side] = row
    for (shape, parameter), sides in cases.items():
        yield f"{shape.replace('x', '×')}, {_PARAMETER[kernel][0]} = {parameter}", sides


def _kernels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.kernel for row in rows))


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table for each kernel and radius or memory, with a column an image shape.

    jfbfast's float32 time, its interquartile range, its bytes and its share of the bandwidth; then
    every other side's time over it.
    """
    for kernel in _kernels(rows):
        cases = [sides for _, sides in _cases(rows, kernel)]
        for parameter in dict.fromkeys(sides[OURS].parameter for sides in cases):
            yield _table([sides for sides in cases if sides[OURS].parameter == parameter])
    yield _notes(rows)


def _table(cases: list[dict[str, Row]]) -> Table:
    ours = [sides[OURS] for sides in cases]
    table = Table(title=f"{ours[0].kernel}, {_PARAMETER[ours[0].kernel]} {ours[0].parameter}", title_justify="left")
    table.add_column("images")
    for row in ours:
        batch, channels, height, width = row.shape.split("x")
        table.add_column(f"{batch}×{channels}\n{height}×{width}", justify="right", no_wrap=True)
    table.add_row(OURS, *(display.time(row.median_us / 1e6) for row in ours), style="bold")
    table.add_row("  interquartile", *(f"{(row.q3_us - row.q1_us) / row.median_us:.0%}" for row in ours))
    table.add_row("  bytes", *(f"{display.digits(row.bytes / 1e6)} MB" for row in ours))
    table.add_row("  of bandwidth", *(f"{row.bandwidth_fraction:.0%}" for row in ours), end_section=True)
    for side in dict.fromkeys(side for sides in cases for side in sides if side != OURS):
        table.add_row(side, *(_ratio(sides.get(side)) for sides in cases))
    return table


def _ratio(row: Row | None) -> str:
    return "–" if row is None else display.ratio(row.ratio, row.samples)


def _notes(rows: Sequence[Row]) -> Table:
    notes = Table.grid()
    notes.add_row(_about(rows))
    notes.add_row("n×: the side's time over jfbfast's in float32, the median of interleaved rounds; ~ measured once")
    return notes


def plot(rows: Sequence[Row], path: Path) -> None:
    """A row of panels a kernel: the rivals' times over jfbfast's, and jfbfast's share of the bandwidth.

    A rival that was measured once has a hollow marker; lines are interquartile ranges.
    """
    kernels = _kernels(rows)
    heights = [len(list(_cases(rows, kernel))) + 3 for kernel in kernels]
    figure, axes = plt.subplots(
        len(kernels),
        2,
        figsize=(13, 0.3 * sum(heights) + 1),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights, "width_ratios": (3, 1)},
    )
    for (left, right), kernel in zip(axes, kernels, strict=True):
        cases = list(_cases(rows, kernel))
        _plot_ratios(left, cases)
        _plot_bandwidth(right, cases)
        left.set_title(f"{kernel}: time of the others over jfbfast's (float32)", loc="left", fontsize=10)
        right.set_title("counted bytes/s over the triad's", loc="left", fontsize=10)
    figure.suptitle(_about(rows), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_ratios(axis: Any, cases: list[tuple[str, dict[str, Row]]]) -> None:
    rivals = dict.fromkeys(s for _, sides in cases for s in sides if not s.startswith(OURS) and s not in _FLOORS)
    axis.axvline(1, color="black", linewidth=1)
    for i, rival in enumerate(rivals):
        points = [(y, sides[rival]) for y, (_, sides) in enumerate(cases) if rival in sides]
        for y, row in points:
            axis.plot((row.ratio_q1, row.ratio_q3), (y, y), color=f"C{i}", linewidth=1)
        marker = {"marker": "osD^vP*X"[i % 8], "linestyle": "", "color": f"C{i}"}
        for once in (False, True):
            shown = [(row.ratio, y) for y, row in points if (row.samples == 1) == once]
            if shown:
                axis.plot(*zip(*shown, strict=True), **marker, fillstyle="none" if once else "full")
        axis.plot([], [], **marker, label=rival)
    axis.set_xscale("log")
    axis.set_yticks(range(len(cases)), [label for label, _ in cases], fontsize=8)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.grid(axis="x", which="both", alpha=0.3)
    axis.grid(axis="y", alpha=0.15)
    display.logarithmic(axis.xaxis, lambda value: f"{value:g}×")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _plot_bandwidth(axis: Any, cases: list[tuple[str, dict[str, Row]]]) -> None:
    for side, offset in ((OURS, -0.2), (OURS_BF16, 0.2)):
        bars = {y + offset: sides[side] for y, (_, sides) in enumerate(cases) if side in sides}
        if bars:
            axis.barh(list(bars), [row.bandwidth_fraction for row in bars.values()], 0.4, label=side)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks([])
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
