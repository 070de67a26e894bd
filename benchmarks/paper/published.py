"""DE-GRAD as the paper's code trains it, rewritten: a curve of Figure 1.

The recipe follows the first 20 epochs of `scripts/script_fixlr.py` in
lliu58b/Jacobian-free-Backprop-Implicit-Networks (later solves take up to 150 evaluations): η starts at 0.001 and is
itself a parameter, not its logarithm; Adam has a constant rate; validation uses the batch norms' running statistics.
Unlike there, the solve sees d and not Aᵀd, and the blur and the crops are those of Figure 1's other curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Timer
from rich.console import Console
from torch import Tensor, nn

from jfbfast import DEGrad
from jfbfast.experiments.runs import Run
from jfbfast.experiments.tasks import DeblurTask, Optimization
from jfbfast.imaging.datasets import Images, RandomCrops

from .. import rivals

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
STEPS = 10**6  # more than there is time for


class PublishedDEGrad(nn.Module):
    """T(x) = x − η(Aᵀ(A x − d) + R(x)) at the end of the published loop, with the gradient of that one evaluation.

    In training, the spectral norms and batch norms of R advance at each evaluation, and the latter normalise by the
    batch. R, the start of η and the blur, with zero padding, come from ``model``; `gilton_anderson` takes the rest.
    """

    def __init__(self, model: DEGrad, tol: float, max_iter: int) -> None:
        super().__init__()
        assert model.step_size is not None
        self.kernel_size, self.sigma = model.blur.kernel_size[0], model.blur.sigma[0]
        self.regularizer = model.regularizer
        self.step_size = nn.Parameter(model.step_size.detach())
        self.tol, self.max_iter = tol, max_iter

    def forward(self, d: Tensor) -> Tensor:
        """Restore measurements (B, 3, H, W)."""
        blur = rivals.conv2d(self.kernel_size, self.sigma, d)  # A, and also Aᵀ

        def layer(x: Tensor) -> Tensor:
            return x - self.step_size * (blur(blur(x) - d) + self.regularizer(x))

        with torch.no_grad():
            x = rivals.gilton_anderson(layer, blur(d), 5, self.max_iter, self.tol)
        return layer(x)


class PublishedRun(Run):
    """A run of jfbfast train, but with the published network, and for ``minutes``, up to the next validation.

    Raises:
        ValueError: as in `Run`; a padding mode other than zeros.
    """

    def __init__(self, values: Mapping[str, Any], out: Path, minutes: float) -> None:
        super().__init__(values, out, resume=(out / "config.yaml").exists())
        if self.settings.padding_mode != "zeros":
            raise ValueError(f"padding_mode is {self.settings.padding_mode}; the published loop takes zeros")
        self.minutes = minutes

    def _train(self, model: nn.Module, crops: RandomCrops, val: Images | None, console: Console) -> float | None:
        settings, config = self.settings, self.config
        assert isinstance(model, DEGrad)
        assert settings.training_tol is not None and settings.training_max_iter is not None
        assert settings.learning_rate is not None
        network = PublishedDEGrad(model, settings.training_tol, settings.training_max_iter)
        rate = Optimization(settings.learning_rate, settings.schedule)
        task = DeblurTask(network, config.blur(), config.noise, rate, settings.seed)
        clock = Timer(timedelta(minutes=self.minutes), interval="epoch", verbose=False)
        runner = self._fit(task, crops, val, settings.steps, [clock])
        quality = runner.callback_metrics.get("val_psnr")
        return None if quality is None else float(quality)
