"""Small photographs, and training runs on them."""

import csv

import numpy as np
from PIL import Image
from rich.console import Console

from jfbfast.experiments.runs import Run


def write_photographs(out, count, drawn=(6, 7), size=(30, 24)):
    """So many smooth photographs in a new directory, from noise of ``drawn`` pixels (height, width)."""
    out.mkdir()
    for i in range(count):
        rgb = np.random.default_rng(i).integers(0, 256, (*drawn, 3), dtype=np.uint8)
        Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC).save(out / f"{i}.png")
    return out


def train(folder, out, resume=False, **values):
    return Run({"data": str(folder), **values}, out, resume=resume, progress=False).train(Console(quiet=True))


def rows(out):
    """Of metrics.csv, without the seconds, the one column that no two runs share."""
    with (out / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
