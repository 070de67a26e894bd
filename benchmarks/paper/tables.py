"""Table 1, a few images and what each method restores of them; Table 2, the quality of every method."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from jfbfast.experiments.comparison import evaluate_all, results_table, score_cells, tuning
from jfbfast.experiments.evaluation import Scores, measurements
from jfbfast.imaging.quality import PAPER_OFFSET, psnr, ssim
from jfbfast.solvers import ConvergenceWarning, Status

from ..report import Row, markdown_table, section, write_csv
from .study import LABELS, Study

METHODS = ("blurred", "direct-inverse", "gradient-descent", "paper", "ours")  # of Table 1


class Restored(NamedTuple):
    """One method's images (3, H, W) in Table 1, and their rows in the CSV."""

    heading: str
    images: list[Tensor]
    rows: list[Row]


@torch.inference_mode()
def restore(study: Study) -> tuple[list[Tensor], list[Restored]]:
    """The first images that Table 2 scores, and what `METHODS` restore from the same measurements.

    A method is reported and left out if it cannot restore them, or if there are no images to choose its parameter.
    """
    every = measurements(study.images, study.blur, study.setting.noise, 1, study.options["device"])
    pairs = list(islice(every, study.plan.pictures))
    found = []
    for name in METHODS:
        if name in study.methods:
            try:
                found.append(_restored(study, name, pairs))
            except ValueError as error:
                study.say(f"{LABELS[name]} is not in the table: {error}")
    return [x[0].cpu() for x, _ in pairs], found


def _restored(study: Study, name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Restored:
    choice, method = study.choice(name), study.methods[name]
    restoration = method.restore(choice.value)
    found = Restored("measurement" if name == "blurred" else LABELS[name], [], [])
    for (x, d), file in zip(pairs, study.files, strict=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the column "status" tells
            each = restoration(d)
        quality = float(psnr(each.images, x))
        found.rows.append(
            {
                "image": file.name,
                "method": name,
                "parameter": "" if method.parameter is None else f"{method.parameter} = {choice.value:.3g}",
                "psnr": quality,
                "psnr_paper": quality - PAPER_OFFSET,
                "ssim": float(ssim(each.images, x)),
                "evaluations": None if each.evaluations is None else int(each.evaluations),
                "status": None if each.status is None else Status(int(each.status)).name,
            }
        )
        found.images.append(each.images[0].cpu())
    return found


def table1(study: Study, out: Path) -> str:
    """Write table1.csv and table1.png."""
    with study.console.status("restoring"):
        truth, found = restore(study)
    write_csv(out / "table1.csv", [row for restored in found for row in restored.rows])
    _pictures(truth, found).savefig(out / "table1.png", dpi=150)
    study.console.print(f"Pictures: {out / 'table1.png'}", highlight=False)
    header = ["image", *(restored.heading for restored in found)]
    images = zip(*(restored.rows for restored in found), strict=True)
    lines = [[rows[0]["image"], *map(_quality, rows)] for rows in images]
    text = f"PSNR in dB at range 2, and SSIM. {study.about()}\n\n{markdown_table(header, lines)}"
    return section("Table 1: pictures", text, "table1")


def _quality(row: Row) -> str:
    return f"{row['psnr']:.2f} dB / {row['ssim']:.3f}"


def _pictures(truth: Sequence[Tensor], found: Sequence[Restored]) -> Figure:
    """A row per image: the truth, the measurement, the restorations, with PSNR at range 2 and SSIM below each."""
    columns = [("truth", truth, ["PSNR (range 2) / SSIM"] * len(truth))]
    columns += [(restored.heading, restored.images, list(map(_quality, restored.rows))) for restored in found]
    figure = Figure(figsize=(2.3 * len(columns), 2.62 * len(truth) + 0.3), layout="constrained")
    axes = figure.subplots(len(truth), len(columns), squeeze=False)
    for column, (heading, images, told) in zip(axes.T, columns, strict=True):
        column[0].set_title(heading.replace(", ", ",\n"), fontsize=10)
        for axis, image, below in zip(column, images, told, strict=True):
            axis.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(below, fontsize=9)
            axis.spines[:].set_visible(False)
    return figure


def table2(study: Study, out: Path) -> str:
    """Write table2.csv, table2-tuning.csv and table2.png."""
    missing, choices = dict(study.missing), {}
    for name in [name for name in LABELS if name in study.methods]:
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
        console=study.console,
        say=missing.__setitem__,
        choices=choices,
        **study.options,
    )
    study.console.print(results_table(scores, study.about()))
    for name in missing.keys() - study.missing.keys():
        study.say(f"{LABELS[name]} is not in the table: {missing[name]}")
    found = {each.method: each.summary() for each in scores}
    blank = dict.fromkeys(scores[0].summary())
    more = {name: {"checkpoint": study.checkpoints.get(name), "missing": missing.get(name)} for name in LABELS}
    rows = [{**blank, "method": name, **found.get(name, {}), **more[name]} for name in LABELS]
    write_csv(out / "table2.csv", rows)
    write_csv(out / "table2-tuning.csv", _candidates(scores))
    _comparison(found, study.about()).savefig(out / "table2.png", dpi=130)
    text = f"{study.about()} Means, ± half of the 95% confidence interval.\n\n{_markdown(rows)}\n\n"
    text += "Parameters, by the best mean PSNR on only the validation images:\n\n"
    text += "\n".join(f"- {LABELS[method]}: {told}." for method, told in tuning(scores).items())
    return section("Table 2: quality", text, "table2", "table2-tuning.csv")


def _markdown(rows: Sequence[Row]) -> str:
    header = ("PSNR, dB (range 2)", "PSNR, dB (peak 1)", "SSIM", "evaluations, median (largest)", "not converged")
    lines = []
    for row in rows:
        cells = ["missing", *[""] * (len(header) - 1)]
        if not row["missing"]:
            quality, *others = score_cells(row).values()
            cells = [quality, f"{row['psnr_paper']:.2f}", *others]
        lines.append([LABELS[row["method"]], *cells])
    return markdown_table(["method", *header], lines)


def _candidates(scores: Sequence[Scores]) -> list[Row]:
    """A row for each candidate of a parameter: its mean PSNR on the validation images, and whether it was chosen."""
    return [
        {
            "method": found.method,
            "parameter": name,
            "value": value,
            "validation_psnr": quality,
            "chosen": value == chosen,
            "at_end": value == chosen and found.at_end,
        }
        for found in scores
        for name, chosen in found.parameter.items()
        for value, quality in found.trials.items()
    ]


def _comparison(found: Mapping[str, Row], title: str) -> Figure:
    """A row per method: its mean PSNR and SSIM with intervals, its evaluations, and its solves not converged."""
    figure = Figure(figsize=(13, 0.42 * len(LABELS) + 1.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 1.9), sharey=True)
    _plot_means(left, found, "psnr", "PSNR, dB, at range 2 (at the paper's peak of 1)")
    _plot_means(middle, found, "ssim", "SSIM")
    columns = (
        (0.0, "evaluations", "evaluations:\nmedian (largest)"),
        (0.62, "not_converged", "not\nconverged"),
    )
    for x, column, heading in columns:
        style = {"transform": right.get_yaxis_transform(), "fontsize": 9}
        right.text(x, -0.75, heading, va="bottom", **style)
        for y, name in enumerate(LABELS):
            if name in found:
                right.text(x, y, score_cells(found[name])[column].split(" of ")[0] or "–", va="center", **style)
    right.set_axis_off()
    left.set_yticks(range(len(LABELS)), list(LABELS.values()))
    left.set_ylim(len(LABELS) - 0.4, -0.6)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def _plot_means(axis: Any, found: Mapping[str, Row], column: str, heading: str) -> None:
    """Each mean with its interval; one below the axis, which starts just below the measurement's, is an arrow."""
    values = [row[column] for row in found.values() if math.isfinite(row[column])]
    least = found["blurred"][column] if "blurred" in found else min(values, default=0.0)
    high = max([*values, least])
    margin = (high - least) or abs(high) * 0.1 or 1.0
    low = least - 0.15 * margin
    axis.set_xlim(low, high + 0.55 * margin)
    axis.set_xticks([tick for tick in axis.get_xticks() if low <= tick <= high + 0.05 * margin])
    axis.set_title(heading, loc="left", fontsize=9.5)
    axis.grid(axis="x", alpha=0.3)
    for y, name in enumerate(LABELS):
        if name not in found:
            place = axis.get_yaxis_transform()
            axis.text(0.02, y, "missing", transform=place, va="center", color="grey", style="italic")
            continue
        row = found[name]
        value, half = row[column], row[f"{column}_ci95"]
        interval = half if math.isfinite(half) else 0.0
        told = f"{value:.2f} ({row['psnr_paper']:.2f})" if column == "psnr" else f"{value:.4f}"
        style = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        if value >= low:
            colour = "C3" if name == "ours" else "C0"
            axis.errorbar(value, y, xerr=interval, fmt="o", color=colour, capsize=3, markersize=5)
            axis.annotate(told, (value + interval, y), (8, 0), **style)
        else:  # lower, or not finite
            axis.annotate(f"← {told}", (low, y), (5, 0), **style)
