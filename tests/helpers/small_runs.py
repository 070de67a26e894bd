"""Small photographs, and training runs on them."""

import csv

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from jfbfast.experiments.runs import Run
from jfbfast.models.checkpoint import load_checkpoint

TINY = {
    "features": 4,
    "depth": 3,
    "crop": 16,
    "batch_size": 2,
    "validation": 1,
    "log_every": 1,
    "logger": "csv",
}


def write_photographs(out, count, drawn=(6, 7), size=(30, 24)):
    """Write smooth photographs into a new directory, made from noise of ``drawn`` pixels (height, width)."""
    out.mkdir()
    for i in range(count):
        rgb = np.random.default_rng(i).integers(0, 256, (*drawn, 3), dtype=np.uint8)
        Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC).save(out / f"{i}.png")
    return out


def train(folder, out, resume=False, **values):
    return Run({"data": str(folder), **values}, out, resume=resume, progress=False).train(Console(quiet=True))


def flags(values):
    """The settings as flags of `jfbfast train`."""
    return [
        f"--no-{name}" if value is False else f"--{name.replace('_', '-')}={value}" for name, value in values.items()
    ]


def rows(out):
    """The rows of metrics.csv without the seconds, the one column that differs between equal runs."""
    with (out / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def weights(out):
    return load_checkpoint(out / "model.safetensors")[0].state_dict()


def assert_same(a, b):
    """The two runs wrote the same metrics and the same weights."""
    assert rows(a) == rows(b)
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())
