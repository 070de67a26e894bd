"""Training with Lightning: a denoiser on noise, then the implicit network by JFB."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.image import peak_signal_noise_ratio

from jfbfast.degrad import DEGrad
from jfbfast.operators import GaussianBlur
from jfbfast.solvers import ConvergenceWarning


def degrade(x: Tensor, blur: GaussianBlur, noise: float, generator: torch.Generator | None = None) -> Tensor:
    """The measurement d = A x + ε of images x, with white noise ε of standard deviation ``noise``."""
    return blur(x) + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


class _Task(L.LightningModule):
    """Adam with a one-cycle learning rate over the whole run."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DenoiserTask(_Task):
    """Mean squared error of D(x + ς ε) against x, ς uniform in a range.

    Args:
        denoiser: D.
        noise_range: of ς, on [−1, 1].
        learning_rate: the cycle's highest.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        noise_range: tuple[float, float] = (0.01, 0.12),
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(learning_rate)
        self.denoiser = denoiser
        self.noise_range = noise_range

    def training_step(self, x: Tensor, batch_index: int) -> Tensor:
        level = torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(*self.noise_range)
        loss = F.mse_loss(self.denoiser(x + level * torch.randn_like(x)), x)
        self.log("psnr", -10 * torch.log10(loss.detach() / 4), prog_bar=True)
        return loss


class DeblurTask(_Task):
    """Mean squared error of the implicit network's fixed point against x, by the model's gradient method.

    Args:
        model: the DE-GRAD.
        blur: A.
        noise: standard deviation of the noise, on [−1, 1].
        learning_rate: the cycle's highest.
    """

    def __init__(self, model: DEGrad, blur: GaussianBlur, noise: float, learning_rate: float = 3e-4) -> None:
        super().__init__(learning_rate)
        self.model = model
        self.blur = blur
        self.noise = noise

    def training_step(self, x: Tensor, batch_index: int) -> Tensor:
        loss = F.mse_loss(self.model(degrade(x, self.blur, self.noise)), x)
        assert self.model.solution is not None
        self.log("psnr", -10 * torch.log10(loss.detach() / 4), prog_bar=True)
        self.log("evaluations", self.model.solution.iterations.double().mean().float(), prog_bar=True)
        return loss

    def validation_step(self, x: Tensor, batch_index: int) -> None:
        restored = self.model(degrade(x, self.blur, self.noise))
        psnr = peak_signal_noise_ratio(restored, x, data_range=2.0, dim=(1, 2, 3))
        self.log("val_psnr", psnr, prog_bar=True, batch_size=len(x))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice, and without a line for every batch that is still converging."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        yield


def fit(
    task: L.LightningModule,
    train: Dataset[Tensor],
    *,
    steps: int,
    batch_size: int = 16,
    val: Dataset[Tensor] | None = None,
    bf16: bool = False,
    workers: int = 0,
    callbacks: list[Callback] | None = None,
    progress: bool = True,
    **trainer: Any,
) -> L.Trainer:
    """Train a task for ``steps`` batches with Lightning, on whatever device it finds.

    Args:
        task: what to train.
        train, val: datasets of images (3, h, w) in [−1, 1]; train of at least steps · batch_size.
        steps: batches.
        bf16: train under bfloat16 autocast.
        workers: processes that load images.
        callbacks, trainer: passed on to `lightning.Trainer`.
    """

    def loader(dataset: Dataset[Tensor], shuffle: bool) -> DataLoader[Tensor]:
        return DataLoader(
            dataset,
            batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    bar: list[Callback] = [RichProgressBar(refresh_rate=10, leave=True)] if progress else []
    settings = {"logger": False, "enable_checkpointing": False, **trainer}
    with _quiet():
        runner = L.Trainer(
            max_epochs=1,
            limit_train_batches=steps,
            precision="bf16-mixed" if bf16 else "32-true",
            callbacks=[*bar, *(callbacks or [])],
            enable_progress_bar=progress,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            log_every_n_steps=min(50, steps),
            **settings,
        )
        runner.fit(task, loader(train, True), None if val is None else loader(val, False))
    return runner
