"""Figure 1: training and validation loss against steps, epochs and time."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

from jfbfast.experiments.runs import Run
from jfbfast.experiments.settings import read_run_settings
from jfbfast.imaging.datasets import split
from jfbfast.imaging.images import SUFFIXES
from jfbfast.imaging.photographs import ImageError, image_files
from jfbfast.models.config import SETTING, ModelConfig

from .. import report
from ..report import Row, distinct, where
from . import published
from .plan import Plan

# As docs/training/paper.yaml and filtered.yaml, but for the sizes.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "form": "paper",
        "gradient": "jfb",
        "padding_mode": "zeros",
        "identity_start": True,
        "freeze_statistics": True,
        "pretraining_noise": (0.005, 0.08),
        "training_max_iter": 15,
        "jacobian_penalty": 1e-2,
        "jacobian_bound": 0.9,
        "jacobian_interval": 4,
        "jacobian_samples": 4,
    },
    "ours": {
        "form": "filtered",
        "denoiser": "UNet",
        "injection": True,
        "padding_mode": "zeros",
        "schedule": "cosine",
        "warmup": 200,
        "learning_rate": 1e-3,
        "beta2": 0.99,
        "clip": 0.1,
        "ema": 0.999,
        "training_tol": 5e-3,
        "training_max_iter": 6,
        "jacobian_penalty": 1e-3,
        "jacobian_bound": 0.35,
        "jacobian_interval": 4,
        "jacobian_samples": 4,
    },
    "published": published.RECIPE,
}
PRETRAINING = {"paper": 0.2, "ours": 0.0, "published": 0.0}  # steps of pretraining per step of training
NAMES = {"paper": "DE-GRAD by the paper's recipe", "ours": "filtered DE-GRAD (ours)"}
PUBLISHED = "DE-GRAD by the published loop"


class Curve(NamedTuple):
    """A run, with the rows of its metrics.csv, and how many photographs it trains on, if these are found.

    The rows have three more columns: ``total_step`` counts the steps of all phases, ``epoch`` the passes over the
    training photographs, and ``mean_loss``, in the row of a validation, is the mean loss since the one before.
    """

    name: str
    points: list[Row]
    photographs: int | None


def read(name: str, directory: Path) -> Curve:
    """Read the curve of the run in a directory.

    Raises:
        ValueError: there is no metrics.csv of a run.
    """
    path = directory / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(line for line in file if line.endswith("\n")))  # a kill can cut the last line
    except OSError as error:
        raise ValueError(f"{directory} holds no metrics.csv of a run ({error.strerror})") from error
    needed = {"phase", "step", "seconds", "loss", "psnr", "val_loss", "val_psnr"}
    if not rows or not needed <= rows[0].keys():
        raise ValueError(f"{path}: not the metrics of a run of jfbfast train, or empty")
    photographs = batches = None
    if (directory / "config.yaml").exists():
        settings = read_run_settings(directory / "config.yaml")
        try:
            photographs = len(split(image_files(settings.data, SUFFIXES), settings.train, settings.validation)[0])
            batches = photographs / settings.batch_size
        except (ImageError, ValueError):
            pass
    return Curve(name, list(_points(rows, batches)), photographs)


def _points(rows: Sequence[Mapping[str, str]], batches: float | None) -> Iterator[Row]:
    phase, before, step, losses = rows[0]["phase"], 0, 0, list[float]()
    for row in rows:
        if row["phase"] != phase:
            phase, before, losses = row["phase"], before + step, []
        step = int(row["step"])
        numbers = {name: float(row[name] or "nan") for name in ("seconds", "loss", "psnr", "val_loss", "val_psnr")}
        point: Row = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if point["loss"] is not None:
            losses.append(point["loss"])
        mean = None
        if point["val_loss"] is not None and losses:
            mean, losses = sum(losses) / len(losses), []
        epoch = batches and (before + step) / batches
        yield {"phase": phase, "step": step, "total_step": before + step, "epoch": epoch, **point, "mean_loss": mean}


def settings(recipe: str, plan: Plan, photographs: int, setting: ModelConfig) -> dict[str, Any]:
    """The settings of `jfbfast train` for one of `RECIPES`: 80 photographs to train on for 20 to validate on."""
    count = min(plan.images, photographs)
    validation = max(1, round(0.2 * count))
    chosen = RECIPES[recipe]
    return {
        **chosen,
        **{name: getattr(setting, name) for name in SETTING},
        "warmup": min(chosen.get("warmup", 0), plan.steps // 10),
        "training_max_iter": min(chosen["training_max_iter"], plan.training_max_iter),
        "data": str(plan.data),
        "train": count - validation,
        "validation": validation,
        "resize": plan.resize,
        "squash": plan.squash and plan.resize is not None,
        "crop": min(plan.crop, plan.resize or plan.crop),
        "batch_size": plan.training_batch,
        "pretraining_steps": math.ceil(PRETRAINING[recipe] * plan.steps),
        "steps": plan.steps,
        "interval": max(1, (count - validation) // plan.training_batch),  # an epoch
        "log_every": 1,
        "seed": plan.seed,
        "logger": "csv",
    }


def _curves(plan: Plan, setting: ModelConfig, out: Path, console: Console) -> Iterator[Curve]:
    """The given runs, or else two that are trained here; then the published loop, if asked for."""
    assert plan.data is not None
    for given in plan.runs:
        name, equals, path = given.partition("=")
        yield read(name, Path(path)) if equals else read(Path(name).name, Path(name))
    names = {} if plan.runs else NAMES
    names |= {"published": PUBLISHED} if plan.published is not None else {}
    photographs = len(image_files(plan.data, SUFFIXES)) if names else 0
    if not plan.runs and photographs < 2:
        raise ValueError(f"{plan.data} holds {photographs} photograph; Figure 1 takes at least 2 to train and validate")
    for recipe, name in names.items():
        directory = out / f"figure1-{recipe}"
        resume = (directory / "config.yaml").exists()
        console.print(f"{'Going on with' if resume else 'Starting'} {name} in {directory}.", highlight=False)
        values = settings(recipe, plan, photographs, setting)
        if plan.published is not None and recipe == "published":
            few = min(values["validation"], values["batch_size"])
            values |= {"validation": few, "steps": published.STEPS, "interval": published.INTERVAL}
            run: Run = published.PublishedRun(values, directory, plan.published)
        else:
            run = Run(values, directory, resume=resume)
        run.train(console)
        yield read(name, directory)


def run(plan: Plan, setting: ModelConfig, out: Path, console: Console) -> str:
    """Write figure1.csv and figure1.png; ``setting`` holds the measurements that it trains for."""
    curves = list(_curves(plan, setting, out, console))
    rows = ({"run": curve.name, **point} for curve in curves for point in curve.points)
    report.write_csv(out / "figure1.csv", rows)
    figure(curves).savefig(out / "figure1.png", dpi=130)
    console.print(f"Picture: {out / 'figure1.png'}", highlight=False)
    text = (
        "The mean squared error of images in [−1, 1]. The training loss is the mean since the validation before; "
        f"pretraining, by denoising, is dotted.\n\n{_markdown(curves)}"
    )
    return report.section("Figure 1: training", text, "figure1")


def _markdown(curves: Sequence[Curve]) -> str:
    names = ("photographs", "steps", "epochs", "minutes", "training loss", "validation loss", "validation PSNR, dB")
    lines = []
    for curve in curves:
        last, validated = curve.points[-1], dict.fromkeys(("mean_loss", "val_loss", "val_psnr"))
        for point in where(curve.points, phase=last["phase"]):
            validated = validated if point["val_loss"] is None else point
        cells = [(curve.photographs, "d"), (last["total_step"], "d"), (last["epoch"], ".1f")]
        cells += [(last["seconds"] / 60, ".1f"), (validated["mean_loss"], ".2e")]
        cells += [(validated["val_loss"], ".2e"), (validated["val_psnr"], ".2f")]
        lines.append([curve.name, *("" if value is None else format(value, form) for value, form in cells)])
    return report.markdown_table(["run", *names], lines)


def figure(curves: Sequence[Curve]) -> Figure:
    """The losses of all runs, on the left against steps, on the right against time."""
    made = Figure(figsize=(12, 4.9), layout="constrained")
    left, right = made.subplots(1, 2, sharey=True)
    longest = max(point["seconds"] for curve in curves for point in curve.points)
    unit, scale = ("hours", 3600) if longest > 5400 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    for i, curve in enumerate(curves):
        _plot_curve(left, curve, "total_step", 1, f"C{i}")
        _plot_curve(right, curve, "seconds", scale, f"C{i}")
        size = ""
        if curve.photographs is not None:
            size = f", {curve.photographs:,} photographs, {curve.points[-1]['epoch']:.1f} epochs"
        left.plot([], [], color=f"C{i}", linewidth=3, label=f"{curve.name}{size}")
    for axis, label in ((left, "steps"), (right, f"{unit} of training and validation")):
        axis.set_yscale("log")
        report.logarithmic(axis.yaxis, lambda value: f"{value:g}")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    left.set_ylabel("mean squared error, images in [−1, 1]")
    left.plot([], [], "-", color="dimgrey", label="training")
    left.plot([], [], "--o", color="dimgrey", markersize=4, label="validation")
    left.plot([], [], ":", color="dimgrey", label="pretraining, by denoising")
    made.legend(loc="outside upper left", ncols=2, fontsize=9)
    return made


def _plot_curve(axis: Any, curve: Curve, column: str, scale: float, colour: str) -> None:
    """Batches as a faint line, their means and the validations as strong ones; phases before the last are dotted."""
    last = curve.points[-1]["phase"]
    for phase in distinct(curve.points, "phase"):
        for loss, line, width, style in (
            ("loss", "-", 0.8, {"alpha": 0.35}),
            ("mean_loss", "-", 1.8, {"marker": "."}),
            ("val_loss", "--", 1.3, {"marker": "o", "markersize": 4}),
        ):
            points = [point for point in where(curve.points, phase=phase) if point[loss] is not None]
            places = [point[column] / scale for point in points]
            line = line if phase == last else ":"
            axis.plot(places, [point[loss] for point in points], line, color=colour, linewidth=width, **style)
