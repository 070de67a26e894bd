"""Figure 1: training and validation loss against steps, epochs and time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from jfbfast.experiments.runs import Run
from jfbfast.imaging.photographs import image_files
from jfbfast.models.config import SETTING

from ..display import logarithmic
from . import published
from .curves import Curve, Point, read
from .page import Section, markdown_table
from .plan import Plan

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# As docs/training/paper.yaml and filtered.yaml, without the sizes; the steps of pretraining for each step of training.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"form": "paper", "gradient": "jfb", "padding_mode": "zeros", "training_max_iter": 20},
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
PRETRAINING = {"paper": 0.2, "ours": 0.0, "published": 0.0}
NAMES = {"paper": "DE-GRAD by the paper's recipe", "ours": "filtered DE-GRAD (ours)"}
PUBLISHED = "DE-GRAD by the published loop"


def settings(recipe: str, plan: Plan, photographs: int) -> dict[str, Any]:
    """The settings of `jfbfast train` for one of `RECIPES`: 80 photographs to train on for 20 to validate on."""
    count = min(plan.images, photographs)
    validation = max(1, round(0.2 * count))
    epoch = max(1, (count - validation) // plan.training_batch)
    chosen = RECIPES[recipe]
    limits = {
        "warmup": min(chosen.get("warmup", 0), plan.steps // 10),
        "training_max_iter": min(chosen["training_max_iter"], plan.training_max_iter),
    }
    return {
        **chosen,
        **limits,
        **{name: getattr(plan, name) for name in SETTING if getattr(plan, name) is not None},
        "data": str(plan.data),
        "train": count - validation,
        "validation": validation,
        "resize": plan.resize,
        "squash": plan.squash and plan.resize is not None,
        "crop": min(plan.crop, plan.resize or plan.crop),
        "batch_size": plan.training_batch,
        "pretraining_steps": round(PRETRAINING[recipe] * plan.steps),
        "steps": plan.steps,
        "interval": epoch,
        "log_every": 1,
        "seed": plan.seed,
        "tensorboard": False,
    }


def _trained(plan: Plan, out: Path, console: Console) -> list[Curve]:
    assert plan.data is not None
    photographs = len(image_files(plan.data))
    if photographs < 2:
        raise ValueError(f"{plan.data} holds {photographs} photograph; Figure 1 takes at least 2 to train and validate")
    curves = []
    for recipe, name in NAMES.items():
        directory = out / f"figure1-{recipe}"
        resume = (directory / "config.yaml").exists()
        console.print(f"{'Going on with' if resume else 'Starting'} {name} in {directory}.", highlight=False)
        Run(settings(recipe, plan, photographs), directory, resume=resume).train(console)
        curves.append(read(name, directory))
    return curves


def _published(plan: Plan, minutes: float, out: Path, console: Console) -> Curve:
    assert plan.data is not None
    directory = out / "figure1-published"
    values = settings("published", plan, len(image_files(plan.data)))
    few = min(values["validation"], values["batch_size"])
    values |= {"validation": few, "steps": published.STEPS, "interval": published.INTERVAL}
    run = published.PublishedRun(values, directory, minutes)
    going = "Going on with" if run.resume else "Starting"
    console.print(f"{going} {PUBLISHED} in {directory}, up to {minutes:g} minutes.", highlight=False)
    run.train(console)
    return read(PUBLISHED, directory)


def _given(run: str) -> Curve:
    name, equals, directory = run.partition("=")
    path = Path(directory if equals else name)
    return read(name if equals else path.name, path)


def run(plan: Plan, out: Path, console: Console) -> Section:
    """Write figure1.csv and figure1.png."""
    curves = [_given(each) for each in plan.runs] or _trained(plan, out, console)
    if plan.published is not None:
        curves.append(_published(plan, plan.published, out, console))
    with (out / "figure1.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["run", *Point.__dataclass_fields__])
        writer.writeheader()
        for curve in curves:
            writer.writerows({"run": curve.name, **asdict(point)} for point in curve.points)
    plot(curves, out / "figure1.png")
    text = (
        "The mean squared error of images in [−1, 1]. The training loss is the mean since the validation before; "
        f"pretraining, by denoising, is dotted.\n\n{_markdown(curves)}"
    )
    if any(point.from_psnr for curve in curves for point in curve.points):
        text += (
            "\n\nA validation loss with a * comes from the mean PSNR: it is the geometric mean over the images, "
            "at most their mean."
        )
    console.print(f"Picture: {out / 'figure1.png'}", highlight=False)
    return Section("Figure 1: training", text, "figure1.png", ("figure1.csv",))


def _markdown(curves: Sequence[Curve]) -> str:
    header = ("run", "photographs", "steps", "epochs", "minutes", "training loss", "validation loss", "validation PSNR")
    lines = []
    for curve in curves:
        last = curve.points[-1]
        validated = next((p for p in reversed(curve.points) if p.val_loss is not None and p.phase == last.phase), None)
        cells = [str(curve.photographs or ""), str(last.total_step)]
        cells.append("" if last.epoch is None else f"{last.epoch:.1f}")
        cells.append("" if last.seconds is None else f"{last.seconds / 60:.1f}")
        if validated is None:
            cells += ["", "", ""]
        else:
            cells.append("" if validated.mean_loss is None else f"{validated.mean_loss:.2e}")
            cells.append(f"{validated.val_loss:.2e}{'*' if validated.from_psnr else ''}")
            cells.append(f"{validated.val_psnr:.2f} dB")
        lines.append([curve.name, *cells])
    return markdown_table(header, lines)


def plot(curves: Sequence[Curve], path: Path) -> None:
    """The losses of all runs, on the left against steps, on the right against time where a run has it."""
    timed = [curve for curve in curves if any(point.seconds is not None for point in curve.points)]
    figure, axes = plt.subplots(
        1, 2 if timed else 1, figsize=(12 if timed else 7.5, 4.9), layout="constrained", sharey=True, squeeze=False
    )
    colours = {curve.name: f"C{i}" for i, curve in enumerate(curves)}
    longest = max((p.seconds or 0 for curve in timed for p in curve.points), default=0)
    unit, scale = ("hours", 3600) if longest > 5400 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    for curve in curves:
        _plot_curve(axes[0, 0], curve, lambda point: point.total_step, colours[curve.name])
        if curve in timed:
            _plot_curve(
                axes[0, 1],
                curve,
                lambda point: None if point.seconds is None else point.seconds / scale,
                colours[curve.name],
            )
    for axis, label in zip(axes[0], ("steps", f"{unit} of training and validation"), strict=False):
        axis.set_yscale("log")
        logarithmic(axis.yaxis, lambda value: f"{value:g}")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("mean squared error, images in [−1, 1]")
    for curve in curves:
        axes[0, 0].plot([], [], color=colours[curve.name], linewidth=3, label=f"{curve.name}{_size(curve)}")
    styles: tuple[tuple[dict[str, Any], str], ...] = (
        ({"linestyle": "-"}, "training"),
        ({"linestyle": "--", "marker": "o", "markersize": 4}, "validation"),
        ({"linestyle": ":"}, "pretraining, by denoising"),
    )
    for style, label in styles:
        axes[0, 0].plot([], [], color="dimgrey", label=label, **style)
    figure.legend(loc="outside upper left", ncols=2, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _size(curve: Curve) -> str:
    if curve.photographs is None:
        return ""
    return f", {curve.photographs:,} photographs, {curve.points[-1].epoch:.1f} epochs"


def _plot_curve(axis: Any, curve: Curve, place: Callable[[Point], float | None], colour: str) -> None:
    """Batches as a faint line, their means and the validations as strong ones; phases before the last are dotted."""
    markers: dict[str, dict[str, Any]] = {"mean_loss": {"marker": "."}, "val_loss": {"marker": "o", "markersize": 4}}
    points = [(x, point) for point in curve.points if (x := place(point)) is not None]
    last = curve.points[-1].phase
    for phase in dict.fromkeys(point.phase for _, point in points):
        style = "-" if phase == last else ":"
        for name, line, width, alpha in (
            ("loss", style, 0.8, 0.35),
            ("mean_loss", style, 1.8, 1.0),
            ("val_loss", "--" if phase == last else ":", 1.3, 1.0),
        ):
            found = [(x, getattr(p, name)) for x, p in points if p.phase == phase and getattr(p, name) is not None]
            if found:
                marker = markers.get(name, {})
                axis.plot(*zip(*found, strict=True), line, color=colour, linewidth=width, alpha=alpha, **marker)
