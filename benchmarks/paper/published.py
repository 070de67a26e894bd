"""DE-GRAD as the paper's code trains it, written anew: a curve of Figure 1.

The recipe is the one of `scripts/script_fixlr.py` of lliu58b/Jacobian-free-Backprop-Implicit-Networks: η = 0.001, a
parameter itself and not by its logarithm, and Adam at a constant rate. Unlike there the solve sees d and not Aᵀd, and
the blur and the crops are those of Figure 1's other curves.
"""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn

from jfbfast import DnCNN
from jfbfast.data import image_files
from jfbfast.datasets import Images, Photographs, RandomCrops, split
from jfbfast.runs import Metrics
from jfbfast.settings import TrainingSettings
from jfbfast.training import DeblurTask, Optimization, fit

from .. import rivals

STEP_SIZE, LEARNING_RATE = 1e-3, 1e-4
MEMORY, TOL, MAX_ITER = 5, 1e-3, 20  # of the solve; the latter for the first 20 epochs
_INTERVAL = 20  # steps between two validations
_STEPS = 10**6  # more than the clock leaves time for


class PublishedDEGrad(nn.Module):
    """T(x) = x − η(Aᵀ(A x − d) + R(x)) where the published loop ends, with the gradient of that one application.

    R is the DnCNN with batch and spectral norms. In training each evaluation moves both, and normalises by the batch.

    Args:
        kernel_size, sigma: of A, a Gaussian blur with zeros beyond the edge.
    """

    def __init__(self, kernel_size: int, sigma: float) -> None:
        super().__init__()
        self.kernel_size, self.sigma = kernel_size, sigma
        self.regularizer = DnCNN(channels=3)
        self.step_size = nn.Parameter(torch.tensor(STEP_SIZE))

    def forward(self, d: Tensor) -> Tensor:
        """Restored images, (B, 3, H, W), of measurements of that shape."""
        blur = rivals.conv2d(self.kernel_size, self.sigma, d)  # A, and Aᵀ

        def layer(x: Tensor) -> Tensor:
            return x - self.step_size * (blur(blur(x) - d) + self.regularizer(x))

        with torch.no_grad():
            x = rivals.gilton_anderson(layer, blur(d), MEMORY, MAX_ITER, TOL)
        return layer(x)


def train(settings: TrainingSettings, minutes: float, out: Path) -> None:
    """Train for so many minutes, or somewhat longer, up to a validation; write ``out``/metrics.csv at the end.

    Args:
        settings: of `jfbfast train`, for the photographs, the crops, the measurements and the seed.
        minutes: by the clock, validations included.
        out: a directory that is not there yet.

    Raises:
        ValueError: a split without photographs to train or validate on.
        ImageError: a photograph that cannot be used.
    """
    kept, held_out, _ = split(image_files(settings.data), settings.train, settings.validation)
    shape = settings.resize, settings.squash
    crops = RandomCrops(
        Photographs(kept, *shape), settings.crop, _STEPS * settings.batch_size, settings.flips, settings.seed
    )
    first = Images(Photographs(held_out[: settings.batch_size], *shape), seed=settings.seed)
    torch.manual_seed(settings.seed)
    setting = settings.model_config()
    task = DeblurTask(
        PublishedDEGrad(setting.kernel_size, setting.sigma),
        setting.blur(),
        setting.noise,
        Optimization(LEARNING_RATE, "constant"),
        settings.seed,
    )
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fit(
        task,
        crops,
        steps=_STEPS,
        batch_size=settings.batch_size,
        val=first,
        interval=_INTERVAL,
        clip=0,
        callbacks=[
            Metrics(partial / "metrics.csv", "training", step=0, every=1),
            Timer(timedelta(minutes=minutes), interval="epoch"),
        ],
    )
    partial.rename(out)
