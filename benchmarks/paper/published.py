"""DE-GRAD as the paper's code trains it, written anew: a curve of Figure 1.

The recipe is the one of `scripts/script_fixlr.py` of lliu58b/Jacobian-free-Backprop-Implicit-Networks in its first 20
epochs (later solves take up to 150 evaluations): η = 0.001, a parameter itself and not by its logarithm, Adam at a
constant rate, and a validation by the running statistics of the batch norms. Unlike there the solve sees d and not Aᵀd,
and the blur and the crops are those of Figure 1's other curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from rich.console import Console
from torch import Tensor, nn

from jfbfast import DEGrad
from jfbfast.experiments.runs import Run
from jfbfast.experiments.tasks import DeblurTask, Optimization

from .. import rivals

MEMORY = 5
RECIPE: dict[str, Any] = {
    "form": "paper",
    "gradient": "jfb",
    "padding_mode": "zeros",
    "step_size": 1e-3,
    "training_tol": 1e-3,
    "training_max_iter": 20,
    "learning_rate": 1e-4,
    "schedule": "constant",
    "clip": 0,
}
INTERVAL = 20  # steps between two validations
STEPS = 10**6  # more than the clock leaves time for


class PublishedDEGrad(nn.Module):
    """T(x) = x − η(Aᵀ(A x − d) + R(x)) where the published loop ends, with the gradient of that one application.

    R's batch norms and spectral norms, in training, move at each evaluation, and the former normalise by the batch.

    Args:
        model: the paper's form, whose R and first η it takes; its Gaussian blur, with zeros beyond the edge.
        tol, max_iter: of the loop, as in `gilton_anderson`.
    """

    def __init__(self, model: DEGrad, tol: float, max_iter: int) -> None:
        super().__init__()
        assert model.step_size is not None
        self.kernel_size, self.sigma = model.blur.kernel_size[0], model.blur.sigma[0]
        self.regularizer = model.regularizer
        self.step_size = nn.Parameter(model.step_size.detach())
        self.tol, self.max_iter = tol, max_iter

    def forward(self, d: Tensor) -> Tensor:
        """Restored images, (B, 3, H, W), of measurements of that shape."""
        blur = rivals.conv2d(self.kernel_size, self.sigma, d)  # A, and Aᵀ

        def layer(x: Tensor) -> Tensor:
            return x - self.step_size * (blur(blur(x) - d) + self.regularizer(x))

        with torch.no_grad():
            x = rivals.gilton_anderson(layer, blur(d), MEMORY, self.max_iter, self.tol)
        return layer(x)


class PublishedRun(Run):
    """A run of jfbfast train's in everything but its network and its end, which the clock decides.

    Args:
        values, out: as in `Run`; where the directory holds the run, it goes on.
        minutes: to train for, validations included, and on to the next one.

    Raises:
        ValueError: as in `Run`; another padding mode than zeros.
    """

    def __init__(self, values: Mapping[str, Any], out: Path, minutes: float) -> None:
        super().__init__(values, out, resume=(out / "config.yaml").exists())
        if self.settings.padding_mode != "zeros":
            raise ValueError(f"padding_mode is {self.settings.padding_mode}; the published loop takes zeros")
        self.minutes = minutes

    def train(self, console: Console) -> float | None:
        """Train, or go on training, and write metrics.csv; the last validation's PSNR at the true range, in dB."""
        settings, config = self.settings, self.config
        assert settings.training_tol is not None and settings.training_max_iter is not None
        L.seed_everything(settings.seed, verbose=False)
        crops, val = self._data(console)
        with self._claimed():
            model = config.model()
            assert isinstance(model, DEGrad)
            network = PublishedDEGrad(model, settings.training_tol, settings.training_max_iter)
            rate = Optimization(settings.learning_rate, settings.schedule)
            task = DeblurTask(network, config.blur(), config.noise, rate, settings.seed)
            clock = Timer(timedelta(minutes=self.minutes), interval="epoch", verbose=False)
            runner = self._fit(task, crops, val, settings.steps, [clock])
            quality = runner.callback_metrics.get("val_psnr")
            return None if quality is None else float(quality)
