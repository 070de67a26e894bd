"""The curves of a training run, read from its metrics.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jfbfast.experiments.settings import make_settings, read_settings
from jfbfast.experiments.training_settings import TrainingSettings
from jfbfast.imaging.datasets import split
from jfbfast.imaging.photographs import ImageError, image_files


@dataclass(frozen=True)
class Point:
    """A row of metrics.csv.

    Attributes:
        step: of the phase; total_step: with the steps of the phases before it.
        epoch: total_step in passes over the training photographs; None where these are not to be found.
        seconds: since the run began; None in files without them.
        loss, psnr: of one batch, the latter of its mean error; mean_loss: in a row of a validation, of the batches that
            have a row since the validation before, which are those of every ``log_every``-th step.
        val_loss, val_psnr: of a validation, means over its images. Where the file has no val_loss, it is
            4·10^(−val_psnr/10), the geometric mean over the images, and ``from_psnr`` says so.
    """

    phase: str
    step: int
    total_step: int
    epoch: float | None
    seconds: float | None
    loss: float | None
    psnr: float | None
    mean_loss: float | None
    val_loss: float | None
    val_psnr: float | None
    from_psnr: bool


@dataclass(frozen=True)
class Curve:
    """A run: its name, its points in order, and the photographs it trains on, where they are to be found."""

    name: str
    points: tuple[Point, ...]
    photographs: int | None


def read(name: str, directory: Path) -> Curve:
    """The curve of the run in a directory.

    Raises:
        ValueError: no metrics there, or a file that is none of a run.
    """
    path = directory / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(line for line in file if line.endswith("\n")))  # a kill can cut the last one off
    except OSError as error:
        raise ValueError(f"{directory} holds no metrics.csv of a run ({error.strerror})") from error
    if not rows or not {"phase", "step", "loss", "val_psnr"} <= rows[0].keys():
        raise ValueError(f"{path}: not the metrics of a run of jfbfast train, or empty")
    settings = None
    if (directory / "config.yaml").exists():
        settings = make_settings(read_settings(directory / "config.yaml"))
    photographs = None if settings is None else _photographs(settings)
    batches = None if photographs is None or settings is None else photographs / settings.batch_size
    return Curve(name, tuple(_points(rows, batches)), photographs)


def _photographs(settings: TrainingSettings) -> int | None:
    try:
        return len(split(image_files(settings.data), settings.train, settings.validation)[0])
    except (ImageError, ValueError):
        return None


def _number(row: Mapping[str, str], name: str) -> float | None:
    value = float(row.get(name) or "nan")
    return value if math.isfinite(value) else None


def _points(rows: list[dict[str, str]], batches: float | None) -> Iterator[Point]:
    phase, before, step, losses = rows[0]["phase"], 0, 0, list[float]()
    for row in rows:
        if row["phase"] != phase:
            phase, before, losses = row["phase"], before + step, []
        step = int(row["step"])
        total = before + step
        loss, val_loss, val_psnr = (_number(row, name) for name in ("loss", "val_loss", "val_psnr"))
        if loss is not None:
            losses.append(loss)
        mean = sum(losses) / len(losses) if val_psnr is not None and losses else None
        from_psnr = val_loss is None and val_psnr is not None
        if val_loss is None and val_psnr is not None:
            val_loss = 4 * 10 ** (-val_psnr / 10)
        if val_psnr is not None:
            losses = []
        epoch = None if batches is None else total / batches
        seconds, psnr = _number(row, "seconds"), _number(row, "psnr")
        yield Point(phase, step, total, epoch, seconds, loss, psnr, mean, val_loss, val_psnr, from_psnr)
