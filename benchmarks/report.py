"""What the benchmarks share to report results: formats of numbers, CSV files, tables and plots.

A row is a dictionary with the cells of one CSV line by column name; tables and plots are made from the same rows.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

OURS = "jfbfast"
MARKERS = "osD^vP*X"

Row = dict[str, Any]


def digits(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def seconds(value: float) -> str:
    """A time in s, ms or µs."""
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if value * scale >= 0.9995:
            return f"{digits(value * scale)} {unit}"
    return f"{digits(value * 1e6)} µs"


def ratio(row: Row) -> str:
    """The ratio to jfbfast's time, with a ~ if it was measured once."""
    return f"{'~' if row['samples'] == 1 else ''}{digits(row['ratio'])}×"


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], significant: int = 17) -> None:
    """Write one line per row, with floats rounded to ``significant`` digits; cells that a row lacks stay empty."""
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        for row in rows:
            cells = row.items()
            writer.writerow({k: float(f"{v:.{significant}g}") if isinstance(v, float) else v for k, v in cells})


def publish(
    name: str, out: Path, console: Console, rows: Sequence[Row], tables: Iterable[Table], figure: Figure, *notes: str
) -> None:
    """Print the tables and notes, and write ``name``.csv and ``name``.png; the first note also heads the picture."""
    for each in tables:
        console.print(each)
    for note in notes:
        console.print(note, highlight=False)
    data, picture = out / f"{name}.csv", out / f"{name}.png"
    write_csv(data, rows, significant=6)
    figure.suptitle(notes[0], fontsize=9)
    figure.savefig(picture, dpi=110)
    console.print(f"Every side of every case: {data}\nPicture: {picture}", highlight=False)


def table(
    title: str, header: Sequence[str], lines: Iterable[Sequence[str] | None], min_width: int | None = None
) -> Table:
    """A table for the terminal: text in the first column, numbers in the others; None draws a rule between lines."""
    made = Table(title=title, title_justify="left", min_width=min_width)
    made.add_column(header[0])
    for heading in header[1:]:
        made.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        if line is None:
            made.add_section()
        else:
            made.add_row(*line, style="bold" if line[0] == OURS else None)
    return made


def distinct(rows: Iterable[Row], *columns: str) -> list[Any]:
    """The values of a column, or tuples of those of several, in order of appearance."""
    return list(dict.fromkeys(map(itemgetter(*columns), rows)))


def where(rows: Iterable[Row], **cells: Any) -> list[Row]:
    """The rows with these cells."""
    return [row for row in rows if all(row[column] == value for column, value in cells.items())]


def pivot(rows: Sequence[Row], column: Callable[[Row], Hashable], cell: Callable[[Row], str]) -> list[list[str]]:
    """One line per side with a cell for each value of ``column``, in order of appearance; "–" where there is none."""
    values = dict.fromkeys(map(column, rows))
    cells = {(row["side"], column(row)): cell(row) for row in rows}
    return [[side, *(cells.get((side, value), "–") for value in values)] for side in distinct(rows, "side")]


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown: text in the first column, numbers in the others."""
    every = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def section(title: str, text: str, name: str, *more: str) -> str:
    """A section in Markdown, with the picture ``name``.png and the data ``name``.csv and ``more``."""
    data = ", ".join(f"[{file}]({file})" for file in (f"{name}.csv", *more))
    return f"## {title}\n\n{text}\n\n![{title}]({name}.png)\n\nData: {data}."


def listed(axis: Any, labels: Mapping[float, str], height: float) -> None:
    """Label the lines of a horizontal plot, from top to bottom."""
    axis.set_yticks(list(labels), list(labels.values()), fontsize=8)
    axis.set_ylim(height - 0.5, -0.5)
    axis.grid(axis="x", which="both", alpha=0.3)
    axis.grid(axis="y", alpha=0.2)


def titled(axis: Any, title: str, legend: bool = True) -> None:
    """Set the title of a panel, and its legend at the right of it."""
    axis.set_title(title, loc="left", fontsize=10)
    if legend:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def logarithmic(axis: Any, text: Callable[[float], str]) -> None:
    """Mark a logarithmic axis at 1, 2 and 5, or only at powers of ten if it spans three decades or more."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(lambda value, _: text(value))
    axis.set_minor_formatter(NullFormatter())


def doubling(axis: Any, values: Iterable[int], text: Callable[[int], str]) -> None:
    """Scale the horizontal axis by powers of two, with a tick at each value, and the times logarithmically."""
    ticks = sorted(set(values))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [text(value) for value in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    logarithmic(axis.yaxis, seconds)
    axis.grid(alpha=0.3)
