"""Training with Lightning: a denoiser on noise, then the implicit network by its gradient method."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, RichProgressBar, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from jfbfast.experiments.optimization import JacobianPenalty, Optimization
from jfbfast.experiments.processes import distributed
from jfbfast.experiments.stopping import leave_signals_to_parent
from jfbfast.imaging.datasets import Sample, batches
from jfbfast.imaging.quality import decibels, measure, psnr
from jfbfast.models.degrad import DEGrad
from jfbfast.models.lipschitz import SpectralNormConv2d
from jfbfast.models.penalty import jacobian_penalty
from jfbfast.operators.blur import GaussianBlur
from jfbfast.solvers import ConvergenceWarning, Status

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class _Task(L.LightningModule):
    """Mean squared error of what the task restores; every random number is a function of the seed and the step."""

    def __init__(self, optimization: Optimization, seed: int) -> None:
        super().__init__()
        self.optimization, self.seed = optimization, seed
        self.steps = 1  # of the run, as `fit` knows

    def restore(self, sample: Sample) -> Tensor:
        """The images that the loss compares with ``sample.x``."""
        raise NotImplementedError

    def penalty(self, sample: Sample) -> Tensor | float:
        """What is added to the loss after `restore`."""
        return 0.0

    def balance(self, error: Tensor) -> Tensor | float:
        """What a batch of this mean squared error is weighted with."""
        return 1.0

    def report(self, bar: bool = False, batch_size: int | None = None, **values: Tensor) -> None:
        """Metrics for the progress bar and for `Metrics` of jfbfast.experiments.runs, which writes them."""
        self.log_dict(values, prog_bar=bar, logger=False, batch_size=batch_size, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What goes on begins an epoch where this stops: Lightning's own place in one is left out."""
        del checkpoint["loops"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        progress.optimizer.step.total.completed = checkpoint["global_step"]

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        generator = np.random.default_rng((self.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(generator.integers(2**63)))

    def training_step(self, sample: Sample, batch_index: int) -> Tensor:
        error = F.mse_loss(self.restore(sample).to(sample.x.dtype), sample.x)
        self.report(loss=error.detach())
        self.report(True, psnr=decibels(error.detach()))
        return error * self.balance(error.detach()) + self.penalty(sample)

    def validation_step(self, sample: Sample, batch_index: int) -> None:
        restored = self.restore(sample).to(sample.x.dtype)
        self.report(True, len(sample.x), val_psnr=psnr(restored, sample.x).mean())
        self.report(False, len(sample.x), val_loss=F.mse_loss(restored, sample.x))

    def configure_optimizers(self) -> Any:
        rate = self.optimization.learning_rate
        optimizer = torch.optim.Adam(self.parameters(), lr=rate, betas=(0.9, self.optimization.beta2))
        steps = self.steps
        schedule: torch.optim.lr_scheduler.LRScheduler
        if self.optimization.schedule == "onecycle":
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        else:
            cosine, warmup = self.optimization.schedule == "cosine", max(1, self.optimization.warmup)

            def factor(step: int) -> float:
                return min(1, (step + 1) / warmup) * (0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else 1)

            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DenoiserTask(_Task):
    """Mean squared error of D(x + ν ε) against x, ν uniform in a range.

    Args:
        denoiser: D.
        noise_range: of ν, on [−1, 1].
        optimization: how to train it.
        seed: of what the samples do not decide.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        noise_range: tuple[float, float] = (0.01, 0.12),
        optimization: Optimization = Optimization(1e-3),
        seed: int = 0,
    ) -> None:
        super().__init__(optimization, seed)
        self.denoiser = denoiser
        self.noise_range = noise_range

    def restore(self, sample: Sample) -> Tensor:
        low, high = self.noise_range
        level = low + (high - low) * sample.level.view(-1, 1, 1, 1)
        restored: Tensor = self.denoiser(sample.x + level * sample.noise)
        return restored


class DeblurTask(_Task):
    """Mean squared error of the network's restoration against x; of a `DEGrad`, by its gradient method.

    Args:
        model: maps d to x.
        blur: A.
        noise: standard deviation of the noise, on [−1, 1].
        optimization: how to train it.
        seed: of what the samples do not decide.
        in_training: attributes of a `DEGrad` that it has in training alone, such as ``solver`` or ``solve_dtype``.
        contraction: the penalty that trains a `DEGrad` to contract, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        blur: GaussianBlur,
        noise: float,
        optimization: Optimization = Optimization(3e-4),
        seed: int = 0,
        in_training: Mapping[str, Any] | None = None,
        contraction: JacobianPenalty | None = None,
    ) -> None:
        super().__init__(optimization, seed)
        self.model = model
        self.blur = blur
        self.noise = noise
        self.in_training = dict(in_training or {})
        self.contraction = contraction

    def measure(self, sample: Sample) -> Tensor:
        """d of a sample, by `measure` of jfbfast.imaging.quality."""
        return measure(sample.x, self.blur, self.noise, sample.noise)

    def restore(self, sample: Sample) -> Tensor:
        d = self.measure(sample)
        if not isinstance(self.model, DEGrad):
            restored: Tensor = self.model(d)
            return restored
        own = {name: getattr(self.model, name) for name in self.in_training}
        try:
            for name, value in self.in_training.items() if self.training else ():
                setattr(self.model, name, value)
            restored = self.model(d)
        finally:
            for name, value in own.items():
                setattr(self.model, name, value)
        assert self.model.solution is not None
        prefix = "" if self.training else "val_"
        iterations, status = self.model.solution.iterations, self.model.solution.status
        self.report(True, len(d), **{f"{prefix}evaluations": iterations.double().mean().float()})
        self.report(False, len(d), **{f"{prefix}diverged": (status == Status.DIVERGED).float().mean()})
        return restored

    def penalty(self, sample: Sample) -> Tensor | float:
        if self.contraction is None or self.global_step % self.contraction.interval:
            return 0.0
        assert isinstance(self.model, DEGrad) and self.model.solution is not None
        solution = self.model.solution
        kept = torch.nonzero(solution.status != Status.DIVERGED)[: self.contraction.samples, 0]
        penalty: Tensor = jacobian_penalty(
            self.model, self.measure(sample)[kept], x=solution.value[kept], bound=self.contraction.bound
        )
        self.report(jacobian_penalty=penalty.detach())
        return self.contraction.weight * self.contraction.interval * penalty


class MovingAverage(WeightAveraging):
    """Exponential moving average of the parameters, decay min(decay, (n + 1)/(n + 10)) after n steps.

    Validation and the trained network use it. Buffers are those of the last step, but the spectral
    norms' singular vectors, which are iterated to the averaged weights'.
    """

    def __init__(self, decay: float) -> None:
        def average(mean: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
            return mean.lerp(value, 1 - min(decay, (1 + float(count)) / (10 + float(count))))

        super().__init__(use_buffers=False, avg_fn=average)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)  # here, since a run that is resumed at its end trains no more
        for module in pl_module.modules():
            if isinstance(module, SpectralNormConv2d):
                for _ in range(15):
                    module.power_iteration()


class _Batches(Sampler[list[int]]):
    """This process's share of the batches from ``start`` on: batch k has the samples k·B … (k + 1)·B − 1."""

    def __init__(self, start: int, steps: int, batch_size: int, rank: int, world: int) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size is {batch_size}; it takes a multiple of the {world} processes")
        self.start, self.steps, self.batch_size, self.rank, self.world = start, steps, batch_size, rank, world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.start + self.steps):
            yield list(range(step * self.batch_size, (step + 1) * self.batch_size))[self.rank :: self.world]


class _OneSize(IterableDataset[Sample]):
    """The `batches` of samples that may differ in size."""

    def __init__(self, samples: Dataset[Sample], batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size

    def __iter__(self) -> Iterator[Sample]:
        return batches(self.samples, self.batch_size)


class _Data(L.LightningDataModule):
    """The training batches, an epoch up to the next multiple of the interval, always from the trainer's step on."""

    def __init__(
        self,
        train: Dataset[Sample],
        val: Dataset[Sample] | None,
        steps: int,
        interval: int,
        batch_size: int,
        workers: int,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.steps, self.interval, self.batch_size, self.workers = steps, interval, batch_size, workers

    def train_dataloader(self) -> DataLoader[Sample]:
        assert self.trainer is not None
        step = self.trainer.global_step
        batches = _Batches(
            step,
            max(1, min(self.interval - step % self.interval, self.steps - step)),
            self.batch_size,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        pinned = torch.cuda.is_available()
        return DataLoader(
            self.train,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=pinned,
            worker_init_fn=leave_signals_to_parent,
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        assert self.val is not None  # else Lightning is told to make no validation
        return DataLoader(_OneSize(self.val, self.batch_size), batch_size=None)


class _Bar(RichProgressBar):
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice, and without a line for every batch that is still converging."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", message="The dirpath has changed from")
            warnings.filterwarnings("ignore", category=ConvergenceWarning)
            yield
    finally:
        logger.setLevel(level)


def _processes() -> dict[str, Any]:
    """Lightning's settings for the processes that torchrun started, or for this one alone."""
    if not distributed():
        return {"devices": 1}
    world, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return {"devices": local, "num_nodes": world // local, "strategy": "ddp"}


def fit(
    task: _Task,
    train: Dataset[Sample],
    *,
    steps: int,
    batch_size: int = 16,
    val: Dataset[Sample] | None = None,
    interval: int | None = None,
    precision: str = "32",
    clip: float = 1.0,
    workers: int = 0,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    resume: str | None = None,
    **trainer: Any,
) -> L.Trainer:
    """Train a task for ``steps`` batches with Lightning, on whatever device it finds.

    Batch k holds the samples k·batch_size … (k + 1)·batch_size − 1 of ``train``. Under torchrun its
    processes share them out, and the gradient is that of one process with the whole batch.

    Args:
        task: what to train.
        train: of at least steps · batch_size samples.
        steps: batches.
        batch_size: samples a batch, over all processes together.
        val: validated on as a whole after every interval.
        interval: batches between two validations, and checkpoints where a callback writes them; None for ``steps``.
        precision: "32", "bf16" or "fp16".
        clip: largest norm of a gradient; 0 for any.
        workers: processes that load images.
        resume: a checkpoint to go on from.
        callbacks, trainer: passed on to `lightning.Trainer`.

    Raises:
        ValueError: a batch that the processes cannot share out evenly, or too few samples.
    """
    interval = steps if interval is None else interval
    samples = len(train)  # type: ignore[arg-type]
    if samples < steps * batch_size:
        raise ValueError(f"train has {samples} samples; {steps} batches of {batch_size} take {steps * batch_size}")
    bar: list[Callback] = [_Bar(refresh_rate=10, leave=True)] if progress else []
    settings = {"logger": False, "enable_checkpointing": False, **_processes(), **trainer}
    if not distributed():  # a scheduler's variables say nothing of this process
        settings["plugins"] = [*settings.get("plugins", ()), LightningEnvironment()]
    with _quiet():
        runner = L.Trainer(
            max_steps=steps,
            max_epochs=-(-steps // interval),
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            limit_val_batches=None if val is not None else 0,
            precision=PRECISIONS[precision],  # type: ignore[arg-type]
            callbacks=[*bar, *callbacks],
            enable_progress_bar=progress,
            enable_model_summary=False,
            gradient_clip_val=clip or None,
            **settings,
        )
        data = _Data(train, val, steps, interval, batch_size, workers)
        task.steps = steps
        runner.fit(task, datamodule=data, ckpt_path=resume)
    return runner
