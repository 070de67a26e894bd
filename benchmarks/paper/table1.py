"""Table 1: a few images, and what each method restores of them."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from torch import Tensor

from jfbfast.experiments.evaluation import measurements
from jfbfast.imaging.quality import PAPER_OFFSET, psnr, ssim
from jfbfast.solvers import ConvergenceWarning, Status

from .page import Section, markdown_table
from .study import LABELS, Study

matplotlib.use("Agg")

import matplotlib.pyplot as plt

METHODS = ("blurred", "direct-inverse", "gradient-descent", "paper", "ours")
_HEADINGS = {"blurred": "measurement"}


@dataclass(frozen=True)
class Restored:
    """One method's images (N, 3, H, W), and their row in the table, image by image."""

    method: str
    images: Sequence[Tensor]
    rows: Sequence[Mapping[str, Any]]


@torch.inference_mode()
def restore(study: Study, count: int) -> tuple[list[Tensor], list[Restored]]:
    """The first ``count`` images that Table 2 scores, and each of `METHODS` that there is, on the same measurements.

    The console is told of a method that cannot restore them, or whose parameter nothing chooses, and why.
    """
    pairs = list(islice(measurements(study.images, study.blur, study.setting.noise, 1, study.device), count))
    found = []
    for name in METHODS:
        if name in study.methods:
            try:
                found.append(_restored(study, name, pairs))
            except ValueError as error:  # one method's; the others' images are wanted all the same
                study.console.print(f"{LABELS[name]} is not in the table: {error}", highlight=False, markup=False)
    return [x[0].cpu() for x, _ in pairs], found


def _restored(study: Study, name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Restored:
    choice, method = study.choice(name), study.methods[name]
    restoration = method.restore(choice.value)
    images, rows = [], []
    for (x, d), file in zip(pairs, study.files, strict=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the table tells
            each = restoration(d)
        quality = float(psnr(each.images, x))
        rows.append(
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
        images.append(each.images[0].cpu())
    return Restored(name, images, rows)


def run(study: Study, out: Path, console: Console) -> Section:
    """Write table1.csv and table1.png."""
    with console.status("restoring"):
        truth, found = restore(study, study.plan.pictures)
    rows = [row for restored in found for row in restored.rows]
    with (out / "table1.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(truth, found, out / "table1.png")
    header = ["image", *(_heading(restored.method) for restored in found)]
    lines = [
        [rows[0]["image"], *(_quality(row) for row in rows)]
        for rows in zip(*(restored.rows for restored in found), strict=True)
    ]
    text = f"PSNR in dB at range 2, and SSIM. {study.about()}\n\n{markdown_table(header, lines)}"
    console.print(f"Pictures: {out / 'table1.png'}", highlight=False)
    return Section("Table 1: pictures", text, "table1.png", ("table1.csv",))


def _heading(method: str) -> str:
    return _HEADINGS.get(method, LABELS[method])


def _quality(row: Mapping[str, Any]) -> str:
    return f"{row['psnr']:.2f} dB / {row['ssim']:.3f}"


def plot(truth: Sequence[Tensor], found: Sequence[Restored], path: Path) -> None:
    """A row an image: the truth, the measurement, the restorations, with PSNR at range 2 and SSIM below each."""
    columns = len(found) + 1
    figure, axes = plt.subplots(
        len(truth), columns, figsize=(2.3 * columns, 2.62 * len(truth) + 0.3), squeeze=False, layout="constrained"
    )
    for i, x in enumerate(truth):
        _show(axes[i, 0], x, "PSNR (range 2) / SSIM")
        for axis, restored in zip(axes[i, 1:], found, strict=True):
            _show(axis, restored.images[i], _quality(restored.rows[i]))
    for axis, heading in zip(axes[0], ["truth", *(_heading(restored.method) for restored in found)], strict=True):
        axis.set_title(heading.replace(", ", ",\n"), fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _show(axis: Any, image: Tensor, below: str) -> None:
    axis.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(below, fontsize=9)
    for spine in axis.spines.values():
        spine.set_visible(False)
