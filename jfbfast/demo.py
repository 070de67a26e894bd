"""`jfbfast demo`: train on two photographs, restore a third, and compare with other methods."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from skimage import data as photographs
from torch import Tensor

from jfbfast.experiments.tasks import DeblurTask, DenoiserTask, Optimization
from jfbfast.experiments.trainer import fit
from jfbfast.imaging.classical import direct_inverse, gradient_descent, tikhonov
from jfbfast.imaging.datasets import RandomCrops
from jfbfast.imaging.plots import side_by_side
from jfbfast.imaging.quality import measure, psnr, ssim
from jfbfast.models.checkpoint import save_checkpoint
from jfbfast.models.config import ModelConfig
from jfbfast.models.degrad import DEGrad
from jfbfast.solvers import Anderson, ConvergenceWarning

CONFIG = ModelConfig(denoiser={**ModelConfig().denoiser, "features": 32, "depth": 8})
TRAINING, UNSEEN = ("coffee", "chelsea"), "astronaut"
DETAIL = (60, 170, 110)  # top, left and side of the square that the picture shows
PRETRAINING_STEPS, JFB_STEPS, CROP = 300, 450, 48


class Row(NamedTuple):
    """One line of the comparison."""

    method: str
    image: Tensor
    iterations: int | None
    seconds: float


def photograph(name: str) -> Tensor:
    """One of scikit-image's photographs, (3, H, W) in [0, 1]."""
    return torch.from_numpy(getattr(photographs, name)()).permute(2, 0, 1).float() / 255


def train(console: Console, seed: int) -> DEGrad:
    """Train a filtered DE-GRAD: first only its denoiser, then all of it by JFB."""
    model = CONFIG.model()
    assert isinstance(model, DEGrad)
    crops = RandomCrops([photograph(n) for n in TRAINING], CROP, 16 * max(PRETRAINING_STEPS, JFB_STEPS), seed=seed)
    console.print(f"Pretraining the denoiser on crops of {' and '.join(TRAINING)} …")
    denoising = DenoiserTask(model.regularizer.denoiser, optimization=Optimization(2e-3), seed=seed)
    fit(denoising, crops, steps=PRETRAINING_STEPS)
    console.print("Training DE-GRAD by Jacobian-free backpropagation …")
    fit(DeblurTask(model, CONFIG.blur(), CONFIG.noise, Optimization(1e-3), seed), crops, steps=JFB_STEPS)
    return model.eval()


@torch.inference_mode()
def compare(model: DEGrad, x: Tensor, d: Tensor) -> list[Row]:
    """Restore the measurement d (1, 3, H, W) of x by every method; Tikhonov's λ is the best of 30 for this x."""
    blur = CONFIG.blur()
    dampings = torch.logspace(-3.5, -0.5, 30).tolist()
    best = max(dampings, key=lambda damping: float(psnr(tikhonov(blur, d, damping), x)))

    def descend() -> tuple[Tensor, int]:
        descent = gradient_descent(blur, d, noise=CONFIG.noise, max_iter=500)
        return descent.value, int(descent.iterations[0])

    universal = DEGrad.from_pretrained("universal")
    universal.set_measurement(blur, CONFIG.noise)

    def implicit(network: DEGrad, solver: Anderson) -> tuple[Tensor, int]:
        network.solver = solver
        restored = network(d)
        assert network.solution is not None
        return restored, int(network.solution.iterations[0])

    methods: dict[str, Callable[[], tuple[Tensor, int | None]]] = {
        "direct inverse": lambda: (direct_inverse(blur, d), None),
        "gradient descent, stopped early": descend,
        f"Tikhonov at its best λ = {best:.3f}": lambda: (tikhonov(blur, d, best), None),
        "DE-GRAD with JFB": lambda: implicit(model, Anderson()),
        "universal, as it ships": lambda: implicit(universal, Anderson()),
        "DE-GRAD with JFB, run on to 100": lambda: implicit(model, Anderson(tol=0, max_iter=100)),
    }
    rows = [Row("blurred, noisy", d, None, 0.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for method, restore in methods.items():
            start = time.perf_counter()
            image, iterations = restore()
            rows.append(Row(method, image, iterations, time.perf_counter() - start))
    return rows


def table(rows: list[Row], x: Tensor) -> Table:
    """The comparison with the truth x (1, 3, H, W)."""
    printed = Table(title=f"{UNSEEN}, which no network has seen (PSNR at the true range)")
    printed.add_column("method")
    for heading in ("PSNR, dB", "SSIM", "iterations", "seconds"):
        printed.add_column(heading, justify="right")
    for method, image, iterations, seconds in rows:
        quality = f"{float(psnr(image, x)):.2f}", f"{float(ssim(image, x)):.3f}"
        effort = "" if iterations is None else str(iterations), f"{seconds:.2f}" if seconds else ""
        printed.add_row(method, *quality, *effort)
    return printed


def run(directory: Path, seed: int, console: Console) -> list[Row]:
    """Run the whole demo, and write jfbfast-demo.png and jfbfast-demo.safetensors into ``directory``."""
    L.seed_everything(seed, verbose=False)
    x = 2 * photograph(UNSEEN)[None] - 1
    d = measure(x, CONFIG.blur(), CONFIG.noise, torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
    model = train(console, seed)
    console.print(f"Restoring {UNSEEN} …")
    rows = compare(model, x, d)
    console.print(table(rows, x))

    picture, checkpoint = directory / "jfbfast-demo.png", directory / "jfbfast-demo.safetensors"
    shown = {"truth": x[0]}
    for row in rows[:-1]:
        name = row.method.split(",")[0].split(" at")[0]
        shown[f"{name}\n{float(psnr(row.image, x)):.2f} dB"] = row.image[0]
    side_by_side(shown, picture, DETAIL, f"Gaussian blur 5 × 5, σ = {CONFIG.sigma:g}, noise {CONFIG.noise:g}")
    save_checkpoint(checkpoint, model, CONFIG)
    console.print(f"Picture: {picture}\nCheckpoint, for jfbfast restore: {checkpoint}")
    return rows
