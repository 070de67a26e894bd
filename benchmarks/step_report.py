"""The tables and the picture of the benchmark `step`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from . import report
from .report import OURS, Row, distinct, where
from .split import PARTS

_SHORT = {"float32": "f32", "TF32": "tf32", "bfloat16": "bf16"}
_COLOURS = {"float32": "C0", "TF32": "C2", "bfloat16": "C3"}
NOTE = (
    "n× in k: the side's time over jfbfast's of the same dtype, the median of interleaved rounds, and its "
    "evaluations of the layer; ~ measured once. Errors: ‖x − x*‖/‖x*‖, the largest of the batch"
)
_target = itemgetter("dtype", "target_error")
_GRIDS = ("size", "evaluations")  # experiments, named by the column that changes


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Each layer at equal error; the split of our step; time against size and against evaluations; memory."""
    steps = where(rows, experiment="step")
    yield from step_tables(steps)
    lines = [
        [_split_label(row, "\n"), *(f"{row[f'split_{part}']:.1%}" for part in PARTS)] for row in where(steps, side=OURS)
    ]
    parts = (part.replace(" ", "\n") for part in PARTS.values())
    yield report.table("where jfbfast's step spends its time", ["step", *parts], lines)
    for column in _GRIDS:
        if chosen := where(rows, experiment=column):
            headings = (_grid_text(column, value) for value in distinct(chosen, column))
            lines = report.pivot(chosen, itemgetter(column), time_or_ratio)
            title = f"a training step, {_grid_case(chosen[0], column)}"
            yield report.table(title, [column, *headings], lines, min_width=79)
    if memory := where(rows, experiment="memory"):
        lines = [[row["side"], str(row["evaluations"]), f"{row['peak_mb']:.0f} MB"] for row in memory]
        title = f"memory of a step, {_title(memory[0])}, float32"
        yield report.table(title, ["side", "evaluations", "peak"], lines, min_width=60)


def step_tables(steps: Sequence[Row]) -> Iterator[Table]:
    """Each layer at equal error in each dtype, and then in the dtype in which a side is fastest."""
    for title, block in _blocks(steps).items():
        headings = (f"{_SHORT[dtype]}\nto {target:g}" for dtype, target in distinct(block, "dtype", "target_error"))
        yield report.table(f"a training step, {title}", ["side", *headings], report.pivot(block, _target, _step_cell))
    best = fastest(steps)
    libraries = distinct(best, "library")
    cells = {(_case(row), row["library"]): _best_cell(row) for row in best}
    lines = [
        [f"{case[0]}\n{case[1]}² to {case[3]:g}", *(cells.get((case, name), "–") for name in libraries)]
        for case in dict.fromkeys(map(_case, best))
    ]
    headings = (name.replace(" ", "\n") for name in libraries)
    yield report.table("fastest at equal error in any dtype", ["layer", *headings], lines)


def fastest(steps: Sequence[Row]) -> list[Row]:
    """Of each ``library``, the side and dtype that reaches a target in the least median time.

    The ratio is between medians, since our fastest may have another dtype and so have been timed in other rounds.
    """
    best: dict[tuple[Any, ...], Row] = {}
    for row in sorted(where(steps, reached=True), key=itemgetter("median_s")):
        best.setdefault((_case(row), _library(row)), row)
    found = []
    for case, library in dict.fromkeys((_case(row), _library(row)) for row in steps):
        side, ours = best.get((case, library)), best.get((case, OURS))
        if side is not None and ours is not None:
            found.append({**side, "library": library, "ratio": side["median_s"] / ours["median_s"]})
    return found


def _case(row: Row) -> tuple[Any, ...]:
    """What the table of the fastest has a line for."""
    return row["layer"], row["size"], row["batch"], row["target_error"]


def _library(row: Row) -> str:
    """The side without its variant, as in "PyTorch, compiled"."""
    return str(row["side"]).partition(", ")[0]


def _best_cell(row: Row) -> str:
    time = report.seconds(row["median_s"]) if row["library"] == OURS else report.ratio(row)
    return f"{time}\n{row['side'].partition(', ')[2] or _SHORT[row['dtype']]}"


def _title(row: Row) -> str:
    return f"{row['layer']} layer, {row['batch']}×3×{row['size']}²"


def _blocks(steps: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each layer and batch, by its title."""
    titles = dict.fromkeys(map(_title, steps))
    return {title: [row for row in steps if _title(row) == title] for title in titles}


def time_or_ratio(row: Row) -> str:
    """Our time, or a rival's over ours."""
    return report.seconds(row["median_s"]) if row["side"] == OURS else report.ratio(row)


def _step_cell(row: Row) -> str:
    return f"{time_or_ratio(row)} in {row['evaluations']}" + ("" if row["reached"] else f"\nonly {row['error']:.1e}")


def _split_label(row: Row, separator: str = " ") -> str:
    return f"{row['layer']},{separator}{_SHORT[row['dtype']]}, {row['evaluations']} eval."


def _grid_text(column: str, value: int) -> str:
    return f"{value}²" if column == "size" else str(value)


def _grid_case(row: Row, column: str) -> str:
    """What stays the same while the column changes."""
    held = f"{row['size']}²" if column == "evaluations" else f"{row['evaluations']} evaluations"
    return f"{row['layer']} layer, batch {row['batch']}, {held}, float32"


def figure(rows: Sequence[Row]) -> Figure:
    """Four panels: the step at equal error, time against image size and against evaluations, and our split."""
    steps = where(rows, experiment="step")
    colours = {side: "black" if side == OURS else f"C{i}" for i, side in enumerate(distinct(rows, "side"))}
    grids = [column for column in _GRIDS if where(rows, experiment=column)]
    lines = len(distinct(steps, "layer", "side")) + 2 * len(distinct(steps, "layer"))
    made = Figure(figsize=(15, max(0.42 * lines + 1, 3.4 * (len(grids) + 1))), layout="constrained")
    grid = made.add_gridspec(len(grids) + 1, 2, width_ratios=(1.25, 1))
    plot_steps(made.add_subplot(grid[:, 0]), steps)
    for i, column in enumerate(grids):
        axis = made.add_subplot(grid[i, 1])
        _plot_grid(axis, where(rows, experiment=column), column, colours, legend=i == 0)
    lowest = min(distinct(steps, "target_error"))
    _plot_split(made.add_subplot(grid[-1, 1]), where(steps, side=OURS, target_error=lowest))
    return made


def plot_steps(axis: Any, steps: Sequence[Row]) -> None:
    """A line per side in a block per layer; colour shows the dtype, fill the target, a cross a target not reached."""
    targets = distinct(steps, "dtype", "target_error")
    largest = max(target for _, target in targets)
    styles: dict[tuple[str, float], dict[str, Any]] = {
        (dtype, target): {
            "color": _COLOURS[dtype],
            "fillstyle": "full" if target == largest else "none",
            "markersize": 5,
            "linestyle": "",
        }
        for dtype, target in targets
    }
    y, labels = 0, dict[float, str]()
    for title, block in _blocks(steps).items():
        axis.text(0.01, y, title, transform=axis.get_yaxis_transform(), va="center", fontsize=9, weight="bold")
        for side in distinct(block, "side"):
            y += 1
            labels[y] = side
            for row in where(block, side=side):
                place = y + 0.7 * ((targets.index(_target(row)) + 0.5) / len(targets) - 0.5)
                style = styles[_target(row)]
                axis.plot((row["q1_s"], row["q3_s"]), (place, place), color=style["color"], linewidth=1)
                axis.plot(row["median_s"], place, "o" if row["reached"] else "x", **style)
                told = {"textcoords": "offset points", "fontsize": 6.5, "va": "center"}
                axis.annotate(str(row["evaluations"]), (row["q3_s"], place), (6, 0), **told)
        y += 1
    for (dtype, target), style in styles.items():
        axis.plot([], [], "o", **style, label=f"{_SHORT[dtype]} to {target:g}")
    axis.plot([], [], "x", color="grey", label="not reached: nearest")
    axis.set_xscale("log")
    report.listed(axis, labels, y)
    report.logarithmic(axis.xaxis, report.seconds)
    report.titled(axis, "a training step at equal true error (its evaluations)", legend=False)
    handles, names = axis.get_legend_handles_labels()
    axis.figure.legend(handles, names, fontsize=8, loc="outside lower left", ncols=len(names))


def _plot_grid(axis: Any, rows: Sequence[Row], column: str, colours: Mapping[str, str], legend: bool) -> None:
    for i, side in enumerate(distinct(rows, "side")):
        points = distinct(where(rows, side=side), column, "median_s")
        style = {"color": colours[side], "marker": report.MARKERS[i % 8], "markersize": 5}
        axis.plot(*zip(*points, strict=True), **style, linewidth=2 if side == OURS else 1, label=side)
    report.doubling(axis, distinct(rows, column), partial(_grid_text, column))
    name = "image size" if column == "size" else "evaluations"
    report.titled(axis, f"a step against {name}: {_grid_case(rows[0], column)}", legend)


def _plot_split(axis: Any, rows: Sequence[Row]) -> None:
    start = [0.0] * len(rows)
    for part, name in PARTS.items():
        shares = [100 * row[f"split_{part}"] for row in rows]
        bars = axis.barh(range(len(rows)), shares, 0.7, left=start, label=name)
        labels = [f"{share:.0f}" if share >= 4 else "" for share in shares]
        axis.bar_label(bars, labels, label_type="center", fontsize=7, color="white")
        start = [left + share for left, share in zip(start, shares, strict=True)]
    report.listed(axis, {y: _split_label(row) for y, row in enumerate(rows)}, max(len(rows), 4))
    axis.grid(False)
    axis.set_xlim(0, 100)
    report.titled(axis, "jfbfast's step, in percent of its time")
