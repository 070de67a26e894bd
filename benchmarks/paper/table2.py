"""Table 2: the quality of every method on the same measurements."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from jfbfast.experiments.comparison import evaluate_all, results_table, score_cells, tuning
from jfbfast.experiments.evaluation import Scores

from .page import Section, markdown_table
from .study import LABELS, Study

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def run(study: Study, out: Path, console: Console) -> Section:
    """Write table2.csv, table2-tuning.csv and table2.png."""
    missing = dict(study.missing)
    choices = {}
    for name in [n for n in LABELS if n in study.methods]:
        try:
            choices[name] = study.choice(name)
        except ValueError as error:
            missing[name] = str(error)
    scores = evaluate_all(
        [study.methods[name] for name in choices],
        study.images,
        study.validation,
        study.blur,
        study.setting.noise,
        console=console,
        say=missing.__setitem__,
        choices=choices,
        **study.options,
    )
    console.print(results_table(scores, study.about()))
    for name, why in missing.items():
        if name not in study.missing:
            console.print(f"{LABELS[name]} is not in the table: {why}", highlight=False, markup=False)
    rows = [_row(name, scores, missing, study) for name in LABELS]
    with (out / "table2.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _write_tuning(out / "table2-tuning.csv", scores)
    plot(scores, missing, study.about(), out / "table2.png")
    return Section(
        "Table 2: quality",
        f"{study.about()} Means, ± half of the 95% confidence interval.\n\n{_markdown(rows)}\n\n{_tuned(scores)}",
        "table2.png",
        ("table2.csv", "table2-tuning.csv"),
    )


def _write_tuning(path: Path, scores: Sequence[Scores]) -> None:
    """Every candidate of every parameter: its mean PSNR on the validation images, and whether it was chosen."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "parameter", "value", "validation_psnr", "chosen", "at_end"))
        for found in scores:
            for name, chosen in found.parameter.items():
                for value, quality in found.trials.items():
                    taken = value == chosen
                    writer.writerow((found.method, name, value, quality, taken, taken and found.at_end))


def _row(name: str, scores: Sequence[Scores], missing: Mapping[str, str], study: Study) -> dict[str, Any]:
    """The summary of a method's scores; of a missing one the reason, and no figures."""
    found = {each.method: each.summary() for each in scores}
    blank = dict.fromkeys(scores[0].summary())
    return {
        **found.get(name, {**blank, "method": name}),
        "checkpoint": study.checkpoints.get(name),
        "missing": missing.get(name),
    }


_HEADER = ("PSNR, dB (range 2)", "PSNR, dB (peak 1)", "SSIM", "evaluations, median (largest)", "not converged")


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        cells = ["missing", *[""] * (len(_HEADER) - 1)]
        if not row["missing"]:
            psnr, *others = score_cells(row).values()
            cells = [psnr, f"{row['psnr_paper']:.2f}", *others]
        lines.append([LABELS[row["method"]], *cells])
    return markdown_table(["method", *_HEADER], lines)


def _tuned(scores: Sequence[Scores]) -> str:
    lines = [f"- {LABELS[method]}: {told}." for method, told in tuning(scores).items()]
    return "Parameters, by the best mean PSNR on the validation images alone:\n\n" + "\n".join(lines)


def plot(scores: Sequence[Scores], missing: Mapping[str, str], title: str, path: Path) -> None:
    """A line a method: its mean PSNR and SSIM with intervals and figures, evaluations and solves not converged."""
    found = {each.method: each.summary() for each in scores}
    names = list(LABELS)
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 0.42 * len(names) + 1.9), layout="constrained", width_ratios=(3, 3, 1.9), sharey=True
    )
    for axis, column, heading in (
        (axes[0], "psnr", "PSNR, dB, at range 2 (at the paper's peak of 1)"),
        (axes[1], "ssim", "SSIM"),
    ):
        values = [row[column] for row in found.values() if math.isfinite(row[column])]
        least = found["blurred"][column] if "blurred" in found else min(values, default=0.0)
        high = max([*values, least])
        margin = (high - least) or abs(high) * 0.1 or 1.0
        low = least - 0.15 * margin
        axis.set_xlim(low, high + 0.55 * margin)
        axis.set_xticks([tick for tick in axis.get_xticks() if low <= tick <= high + 0.05 * margin])
        for y, name in enumerate(names):
            if name in found:
                _bar(axis, y, found[name], column, low, "C3" if name == "ours" else "C0")
            else:
                axis.text(
                    0.02, y, "missing", transform=axis.get_yaxis_transform(), va="center", color="grey", style="italic"
                )
        axis.set_title(heading, loc="left", fontsize=9.5)
        axis.grid(axis="x", alpha=0.3)
    for x, column, heading in (
        (0.0, "evaluations", "evaluations:\nmedian (largest)"),
        (0.62, "not_converged", "not\nconverged"),
    ):
        axes[2].text(x, -0.75, heading, transform=axes[2].get_yaxis_transform(), va="bottom", fontsize=9)
        for y, name in enumerate(names):
            if name in found:
                told = score_cells(found[name])[column].split(" of ")[0]
                axes[2].text(x, y, told or "–", transform=axes[2].get_yaxis_transform(), va="center", fontsize=9)
    axes[2].set_axis_off()
    axes[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bar(axis: Any, y: int, row: Mapping[str, Any], column: str, low: float, colour: str) -> None:
    """The mean, its interval and its figure; below ``low``, where the axis starts, an arrow to the left."""
    value, half = row[column], row[f"{column}_ci95"]
    interval = half if math.isfinite(half) else 0.0
    told = f"{value:.2f} ({row['psnr_paper']:.2f})" if column == "psnr" else f"{value:.4f}"
    if value >= low:
        axis.errorbar(value, y, xerr=interval, fmt="o", color=colour, capsize=3, markersize=5)
        axis.annotate(told, (value + interval, y), (8, 0), textcoords="offset points", va="center", fontsize=9)
    else:  # or not finite
        axis.annotate(f"← {told}", (low, y), (5, 0), textcoords="offset points", va="center", fontsize=9)
