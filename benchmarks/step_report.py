"""Rows of the end-to-end benchmark: as tables for the terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

from . import display
from .implicit_rivals import OURS
from .machine import Machine
from .split import Split, as_columns
from .timing import Measured, ratios, spread

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

_PARTS = {
    "denoiser": "denoiser",
    "data_step": "data step",
    "anderson": "Anderson",
    "gradient": "gradient, backward",
    "overhead": "overhead",
}
_GRIDS = ("size", "evaluations")  # experiments, and the columns that they vary
_SHORT = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Row:
    """One side of one case.

    Attributes:
        experiment: "step" (at equal error), "evaluations", "size" (at given evaluations) or "memory".
        reached: whether ``error`` is within ``target_error``; if not, it is the lowest that the side comes to.
        error, error_median: ‖x − x*‖/‖x*‖ of the restored images, the batch's largest and its median.
        evaluations: of the layer in the solve; its one with the gradient comes on top.
        samples: 1 for a side so slow that it was measured once.
        ratio: the median over the rounds of this side's time over jfbfast's of the same dtype, in the same round.
        split_…: shares of jfbfast's own step.
        peak_mb: memory of the first step, beside what the modules and the batch take.
    """

    experiment: str
    side: str
    layer: str
    size: int
    batch: int
    dtype: str
    evaluations: int
    machine: Machine
    target_error: float | None = None
    reached: bool | None = None
    error: float | None = None
    error_median: float | None = None
    samples: int = 0
    median_s: float | None = None
    q1_s: float | None = None
    q3_s: float | None = None
    ratio: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    split_denoiser: float | None = None
    split_data_step: float | None = None
    split_anderson: float | None = None
    split_gradient: float | None = None
    split_overhead: float | None = None
    peak_mb: float | None = None

    def timed(self, measured: Measured, ours: Measured) -> Row:
        time, ratio = spread(measured.samples), ratios(measured, ours)
        return replace(
            self,
            samples=len(measured.samples),
            median_s=time.median,
            q1_s=time.q1,
            q3_s=time.q3,
            ratio=ratio.median,
            ratio_q1=ratio.q1,
            ratio_q3=ratio.q3,
        )

    def split(self, shares: Split) -> Row:
        columns: dict[str, Any] = as_columns(shares)
        return replace(self, **columns)


def _of(rows: Sequence[Row], experiment: str) -> list[Row]:
    return [row for row in rows if row.experiment == experiment]


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.side for row in rows))


def _seconds(row: Row) -> float:
    assert row.median_s is not None
    return row.median_s


def _step_key(row: Row) -> tuple[str, float]:
    assert row.target_error is not None
    return row.dtype, row.target_error


def _step_title(row: Row) -> str:
    return f"{row.layer} layer, {row.batch}×3×{row.size}²"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Each layer at equal error; the split of our step; time against evaluations and size; memory."""
    steps = _of(rows, "step")
    for title in dict.fromkeys(map(_step_title, steps)):
        yield _step_table([row for row in steps if _step_title(row) == title], title)
    yield _split_table([row for row in steps if row.side == OURS])
    for column in _GRIDS:
        if chosen := _of(rows, column):
            yield _grid_table(chosen, column)
    if memory := _of(rows, "memory"):
        yield _memory_table(memory)
    yield _notes(rows)


def _step_table(rows: list[Row], title: str) -> Table:
    table = Table(title=f"a training step, {title}", title_justify="left")
    table.add_column("side")
    keys = list(dict.fromkeys(map(_step_key, rows)))
    for dtype, target in keys:
        table.add_column(f"{_SHORT[dtype]}\nto {target:g}", justify="right", no_wrap=True)
    for side in _names(rows):
        found = {_step_key(row): row for row in rows if row.side == side}
        table.add_row(side, *(_step_cell(found.get(key)) for key in keys), style="bold" if side == OURS else None)
    return table


def _time_or_ratio(row: Row) -> str:
    if row.side == OURS:
        return display.time(_seconds(row))
    assert row.ratio is not None
    return display.ratio(row.ratio, row.samples)


def _step_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{_time_or_ratio(row)} in {row.evaluations}" + ("" if row.reached else f"\nonly {row.error:.1e}")


def _split_label(row: Row) -> str:
    return f"{row.layer}, {_SHORT[row.dtype]}, {row.evaluations} eval."


def _split_table(rows: list[Row]) -> Table:
    table = Table(title="where jfbfast's step spends its time", title_justify="left")
    table.add_column("step", no_wrap=True)
    for part in _PARTS.values():
        table.add_column(part.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        shares = [getattr(row, f"split_{part}") for part in _PARTS]
        table.add_row(_split_label(row).replace(", ", "\n", 1), *(f"{share:.1%}" for share in shares))
    return table


def _grid_table(rows: list[Row], column: str) -> Table:
    held = f"{rows[0].size}²" if column == "evaluations" else f"{rows[0].evaluations} evaluations"
    title = f"a training step, {rows[0].layer} layer, batch {rows[0].batch}, {held}, float32"
    table = Table(title=title, title_justify="left", min_width=79)
    table.add_column(column)
    values = list(dict.fromkeys(getattr(row, column) for row in rows))
    for value in values:
        table.add_column(f"{value}²" if column == "size" else str(value), justify="right", no_wrap=True)
    for side in _names(rows):
        found = {getattr(row, column): row for row in rows if row.side == side}
        cells = [_grid_cell(found.get(value)) for value in values]
        table.add_row(side, *cells, style="bold" if side == OURS else None)
    return table


def _grid_cell(row: Row | None) -> str:
    return "–" if row is None else _time_or_ratio(row)


def _memory_table(rows: list[Row]) -> Table:
    first = rows[0]
    table = Table(title=f"memory of a step, {_step_title(first)}, float32", title_justify="left", min_width=60)
    table.add_column("side")
    table.add_column("evaluations", justify="right")
    table.add_column("peak", justify="right")
    for row in rows:
        table.add_row(row.side, str(row.evaluations), f"{row.peak_mb:.0f} MB")
    return table


def _notes(rows: Sequence[Row]) -> Table:
    notes = Table.grid()
    notes.add_row(display.about(rows[0].machine))
    notes.add_row(
        "n× in k: the side's time over jfbfast's of the same dtype, the median of interleaved rounds, and its "
        "evaluations of the layer; ~ measured once. Errors: ‖x − x*‖/‖x*‖, the largest of the batch"
    )
    return notes


def plot(rows: Sequence[Row], path: Path) -> None:
    """Four panels: the step at equal error, time against image size, against evaluations, and our split."""
    steps = _of(rows, "step")
    colours = {side: "black" if side == OURS else f"C{i}" for i, side in enumerate(_names(rows))}
    grids = [column for column in _GRIDS if _of(rows, column)]
    lines = len({(row.layer, row.side) for row in steps}) + 2 * len({row.layer for row in steps})
    figure = plt.figure(figsize=(15, max(0.42 * lines + 1, 3.4 * (len(grids) + 1))), layout="constrained")
    grid = figure.add_gridspec(len(grids) + 1, 2, width_ratios=(1.25, 1))
    _plot_steps(figure.add_subplot(grid[:, 0]), steps)
    for i, column in enumerate(grids):
        _plot_grid(figure.add_subplot(grid[i, 1]), _of(rows, column), column, colours, i == 0)
    _plot_split(figure.add_subplot(grid[-1, 1]), _tightest(steps))
    figure.suptitle(display.about(rows[0].machine), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tightest(steps: list[Row]) -> list[Row]:
    """Our rows at the lowest target."""
    lowest = min(target for _, target in map(_step_key, steps))
    return [row for row in steps if row.side == OURS and row.target_error == lowest]


def _plot_steps(axis: Any, rows: list[Row]) -> None:
    """A line a side, in a block a layer; colour by dtype, fill by target; a cross where it is not reached."""
    keys = list(dict.fromkeys(map(_step_key, rows)))
    targets = list(dict.fromkeys(target for _, target in keys))
    y, ticks, labels = 0, [], []
    for title in dict.fromkeys(map(_step_title, rows)):
        block = [row for row in rows if _step_title(row) == title]
        axis.text(0.01, y, title, transform=axis.get_yaxis_transform(), va="center", fontsize=9, weight="bold")
        for side in _names(block):
            y += 1
            ticks.append(y)
            labels.append(side)
            for row in block:
                if row.side == side:
                    _plot_step(axis, row, y, keys, targets)
        y += 1
    for i, (dtype, target) in enumerate(keys):
        fill = "full" if targets.index(target) == 0 else "none"
        axis.plot([], [], **_marker(dtype), fillstyle=fill, label=f"{_SHORT[dtype]} to {target:g}")
        if i == len(keys) - 1:
            axis.plot([], [], "x", color="grey", label="not reached: nearest")
    axis.set_xscale("log")
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_ylim(y - 0.5, -0.7)
    axis.grid(axis="x", which="both", alpha=0.3)
    axis.grid(axis="y", alpha=0.2)
    display.logarithmic(axis.xaxis, display.time)
    axis.set_title("a training step at equal true error (its evaluations)", loc="left", fontsize=10)
    axis.figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=len(keys) + 1)


def _marker(dtype: str) -> dict[str, Any]:
    return {"marker": "o", "linestyle": "", "color": "C0" if dtype == "float32" else "C3", "markersize": 5}


def _plot_step(axis: Any, row: Row, y: float, keys: list[tuple[str, float]], targets: list[float]) -> None:
    place = y + 0.7 * ((keys.index(_step_key(row)) + 0.5) / len(keys) - 0.5)
    style = _marker(row.dtype) | ({} if row.reached else {"marker": "x"})
    fill = "full" if targets.index(_step_key(row)[1]) == 0 else "none"
    axis.plot((row.q1_s, row.q3_s), (place, place), color=style["color"], linewidth=1)
    axis.plot((_seconds(row),), (place,), **style, fillstyle=fill)
    axis.annotate(
        str(row.evaluations), (row.q3_s or 0.0, place), (6, 0), textcoords="offset points", fontsize=6.5, va="center"
    )


def _plot_grid(axis: Any, rows: list[Row], column: str, colours: dict[str, str], legend: bool) -> None:
    for i, side in enumerate(_names(rows)):
        mine = [row for row in rows if row.side == side]
        values = [getattr(row, column) for row in mine]
        style = {"color": colours[side], "marker": "osD^vP*X"[i % 8], "markersize": 5}
        axis.plot(values, [_seconds(row) for row in mine], **style, linewidth=2 if side == OURS else 1, label=side)
    values = sorted({getattr(row, column) for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(values, [f"{v}²" if column == "size" else str(v) for v in values])
    axis.xaxis.set_minor_formatter(NullFormatter())
    display.logarithmic(axis.yaxis, display.time)
    axis.grid(alpha=0.3)
    held = f"{rows[0].evaluations} evaluations" if column == "size" else f"{rows[0].size}²"
    name = "image size" if column == "size" else "evaluations"
    title = f"a step against {name}: {rows[0].layer} layer, batch {rows[0].batch}, {held}, float32"
    axis.set_title(title, loc="left", fontsize=10)
    if legend:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _plot_split(axis: Any, rows: list[Row]) -> None:
    labels = [_split_label(row) for row in rows]
    start = [0.0] * len(rows)
    for i, (part, name) in enumerate(_PARTS.items()):
        shares = [getattr(row, f"split_{part}") * 100 for row in rows]
        axis.barh(range(len(rows)), shares, 0.7, left=start, label=name, color=f"C{i}")
        for y, (left, share) in enumerate(zip(start, shares, strict=True)):
            if share >= 4:
                axis.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=7, color="white")
        start = [a + b for a, b in zip(start, shares, strict=True)]
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.set_ylim(max(len(rows), 4) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_title("jfbfast's step, in percent of its time", loc="left", fontsize=10)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
