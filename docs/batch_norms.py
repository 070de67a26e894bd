"""Make docs/paper/batch-norms.csv and docs/paper/batch-norms.png: what batch norms do to DE-GRAD while it trains.

python docs/batch_norms.py FACES PRETRAINED

FACES is the directory of CelebA's aligned images, and PRETRAINED the ``pretrained.safetensors`` of a run of
docs/training/paper.yaml. Three copies of that network take the same training steps: with statistics that follow the
fixed points, with nothing else than these statistics changing, and with frozen statistics. It takes some minutes.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jfbfast
from jfbfast.imaging.datasets import Images, Photographs, RandomCrops, batches
from jfbfast.imaging.photographs import image_files
from jfbfast.imaging.quality import measure, psnr
from jfbfast.models.checkpoint import load_checkpoint

RUNS = {  # whether the statistics follow the fixed points, and whether the weights are trained
    "statistics follow": (True, True),
    "only statistics change": (True, False),
    "statistics frozen": (False, True),
}
STEPS, BATCH, CROP, RATE = 40, 8, 48, 1e-4
MEASURED = (0, 1, 2, 4, 6, 8, *range(12, STEPS + 1, 4))
OUTPUT = Path(__file__).parent / "paper"


def state(model: jfbfast.DEGrad, x: Tensor, d: Tensor, before: list[Tensor]) -> dict[str, float]:
    """How the model solves for the measurements d of held-out images x, and its Jacobians at these points."""
    model.eval()
    with torch.no_grad():
        restored = model(d)
    assert model.solution is not None
    points = model.solution.value[:2].nan_to_num()
    variances = [norm.running_var / start for norm, start in zip(batch_norms(model), before, strict=True)]
    return {
        "psnr": float(psnr(restored, x).nanmean()),
        "unsolved": float((model.solution.status != jfbfast.Status.CONVERGED).double().mean()),
        "spectral_radius": float(jfbfast.spectrum.contraction_factor(model.layer, points, (d[:2],), steps=20).max()),
        "norm_of_R": float(jfbfast.spectrum.operator_norm(model.regularizer, points, steps=8).max()),
        "variance": float(torch.cat(variances).log().mean().exp()),
        "last_variance": float(variances[-1].log().mean().exp()),
    }


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def run(name: str, pretrained: str, faces: Path) -> Iterator[dict[str, Any]]:
    follow, learn = RUNS[name]
    model, config = load_checkpoint(pretrained)
    assert isinstance(model, jfbfast.DEGrad)
    model.solver = jfbfast.Anderson(tol=1e-3, max_iter=50)
    if not follow:
        jfbfast.freeze_statistics(model)
    files, blur = image_files(faces), config.blur()
    held_out = next(batches(Images(Photographs(files[7500:7504], 128, True), 64), 4))
    d = measure(held_out.x, blur, config.noise, held_out.noise)
    crops = RandomCrops(Photographs(files[:400], 128, True), CROP, STEPS * BATCH)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    before = [norm.running_var.clone() for norm in batch_norms(model)]
    for step, sample in enumerate([None, *batches(crops, BATCH)]):
        if sample is not None:
            solver, model.solver = model.solver, replace(model.solver, max_iter=10)
            restored = model.train()(measure(sample.x, blur, config.noise, sample.noise))
            model.solver = solver
            finite = restored.isfinite().flatten(1).all(1)
            optimizer.zero_grad()
            F.mse_loss(restored[finite], sample.x[finite]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if learn:
                optimizer.step()
        if step in MEASURED:
            yield {"run": name, "step": step, **state(model, held_out.x, d, before)}


def picture(rows: list[dict[str, Any]]) -> None:
    shown = {
        "variance": "running variances, relative to step 0",
        "spectral_radius": "spectral radius of ∂T/∂x",
        "psnr": "PSNR, dB",
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
    for axis, (column, title) in zip(axes, shown.items(), strict=True):
        for name in RUNS:
            curve = [(row["step"], row[column]) for row in rows if row["run"] == name]
            axis.plot(*zip(*curve, strict=True), marker=".", label=name)
        axis.set(title=title, xlabel="step")
    axes[1].axhline(1, color="grey", linewidth=0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(RUNS))
    figure.savefig(OUTPUT / "batch-norms.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path)
    parser.add_argument("pretrained")
    chosen = parser.parse_args()
    jfbfast.keep_freed_memory()
    warnings.simplefilter("ignore", jfbfast.ConvergenceWarning)
    rows: list[dict[str, Any]] = []
    for name in RUNS:
        torch.manual_seed(0)
        for row in run(name, chosen.pretrained, chosen.faces):
            print({key: value if isinstance(value, (str, int)) else f"{value:.4g}" for key, value in row.items()})
            rows.append(row)
    with (OUTPUT / "batch-norms.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    picture(rows)


if __name__ == "__main__":
    main()
