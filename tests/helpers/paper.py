"""Networks for every role of the paper's tables, small recipes for its figures, and the reader of their CSV files."""

import csv

from rich.console import Console

from jfbfast.benchmarks.paper import figure1
from jfbfast.models.checkpoint import ModelConfig

DNCNN = {"kind": "DnCNN", "features": 4, "depth": 3, "norm": None, "spectral_norm": False, "residual": True}
CONFIGS = {
    "denoiser": ModelConfig("denoiser", DNCNN),
    "feed-forward": ModelConfig("feed-forward", DNCNN, padding_mode="zeros"),
    "unrolled": ModelConfig("preconditioned", DNCNN, padding_mode="zeros", gradient={"kind": "unrolled", "steps": 3}),
    "implicit": ModelConfig("filtered", DNCNN, padding_mode="zeros", gradient={"kind": "implicit"}),
    "paper": ModelConfig("paper", {**DNCNN, "residual": False}, padding_mode="zeros"),
    "ours": ModelConfig("filtered", DNCNN, padding_mode="zeros"),
}
QUIET = Console(quiet=True)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def small_recipes(monkeypatch):
    small = {"denoiser": "DnCNN", "features": 4, "depth": 3, "injection": False}
    recipes = {name: {**recipe, **small} for name, recipe in figure1.RECIPES.items()}
    monkeypatch.setattr(figure1, "RECIPES", recipes)
