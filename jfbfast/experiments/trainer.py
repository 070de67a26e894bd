"""`fit`: the training loop, on Lightning, for one process or for those of torchrun."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, RichProgressBar, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from jfbfast.experiments.processes import distributed, ignore_signals
from jfbfast.experiments.tasks import Task
from jfbfast.imaging.datasets import Sample, batches
from jfbfast.implicit.frozen import grouped
from jfbfast.models.lipschitz import SpectralNormConv2d
from jfbfast.solvers import ConvergenceWarning

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_IGNORED = (  # Lightning's advice about what is intended here
    ".*does not have many workers.*",
    "You defined a `validation_step` but have no",
    "Checkpoint directory .* exists and is not empty",
    "The dirpath has changed from",
)


class TrainingError(ValueError):
    """The training cannot go on: its loss or its gradient is not finite, or its gradient stays 0."""


class SoundSteps(Callback):
    """Clip the gradient, and end a training before a step that would spoil its weights.

    Such a step has a loss or a gradient that is not finite. With float16, whose loss scaling skips such steps, the
    training ends after 20 in a row; so it does after 20 gradients of 0 in a row. It ends with a `TrainingError`.

    Args:
        clip: the largest norm of a gradient; 0 for any.
    """

    def __init__(self, clip: float = 0.0) -> None:
        self.clip = clip
        self.loss = torch.zeros(())
        self.count = 0

    def on_before_backward(self, trainer: L.Trainer, task: L.LightningModule, loss: Tensor) -> None:
        self.loss = loss.detach()

    def on_before_optimizer_step(self, trainer: L.Trainer, task: Any, *args: Any) -> None:
        total = torch.nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None])
        loss, norm = float(self.loss), float(total)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and self.clip:
            torch.nn.utils.clip_grads_with_norm_(task.parameters(), self.clip, total)
        if not trainer.strategy.reduce_boolean_decision(not finite or norm == 0, all=False):
            self.count = 0
            return
        self.count += 1
        patient = trainer.precision == "16-mixed" or (finite and norm == 0)
        if self.count == 20 or not patient:
            if not finite:
                problem = f"the loss is {loss:g} and the gradient's norm {norm:g}"
            elif norm == 0:
                problem = "the gradient was 0 in 20 steps in a row, for example because every solve diverges,"
            else:
                problem = "the loss of another process is not finite"
            raise TrainingError(f"{problem} at step {trainer.global_step + 1} of {task.phase}")


class _Average(AveragedModel):
    """A copy of a model whose parameters follow the model's, in few operations and without waiting for a device.

    Its count of the steps stays on the CPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        steps = int(self.n_averaged)
        change = 1 - min(self.decay, (1 + steps) / (10 + steps)) if steps else 1.0
        for means, values in _by_dtype(self.module.parameters(), model.parameters()):
            torch._foreach_lerp_(means, values, change)
        for copies, values in _by_dtype(self.module.buffers(), model.buffers()):
            torch._foreach_copy_(copies, values)
        self.n_averaged += 1


def _by_dtype(left: Iterable[Tensor], right: Iterable[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Pairs of lists of the tensors, one pair for each dtype, as torch's operations on lists need for one kernel."""
    for group in grouped(zip(left, right, strict=True), lambda pair: pair[0].dtype):
        yield [first for first, _ in group], [second for _, second in group]


class MovingAverage(WeightAveraging):
    """Exponential moving average of the parameters, with decay min(decay, (n + 1)/(n + 10)) after n steps.

    Validation and the trained network use the average. Buffers are those of the last step, except the singular
    vectors of spectral norms, which are computed for the averaged weights.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False)
        self.decay = decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._average_model = _Average(pl_module, self.decay)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)  # where the model is only now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # In this hook, because a run that is resumed at its end does not train.
        super().on_train_end(trainer, pl_module)
        for module in pl_module.modules():
            if isinstance(module, SpectralNormConv2d):
                module.converge()


def shared_batches(start: int, steps: int, batch_size: int, rank: int, world: int) -> list[range]:
    """One process's share of the next batches: batch k has the samples k·batch_size … (k + 1)·batch_size − 1."""
    if batch_size % world:
        raise ValueError(f"batch_size is {batch_size}; it takes a multiple of the {world} processes")
    return [range(k * batch_size + rank, (k + 1) * batch_size, world) for k in range(start, start + steps)]


@dataclass(eq=False)
class _Data(L.LightningDataModule):
    """The data of one epoch, which goes from the trainer's step to the next multiple of the interval."""

    train: Dataset[Sample]
    val: Dataset[Sample] | None
    steps: int
    interval: int
    batch_size: int
    workers: int

    def __post_init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> DataLoader[Sample]:
        trainer = self.trainer
        assert trainer is not None
        start = trainer.global_step
        count = max(1, min(self.interval - start % self.interval, self.steps - start))
        shares = shared_batches(start, count, self.batch_size, trainer.global_rank, trainer.world_size)
        return DataLoader(
            self.train,
            batch_sampler=shares,  # type: ignore[arg-type]  # ranges instead of lists, which would take memory
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
        )

    def val_dataloader(self) -> Iterator[Sample]:
        assert self.val is not None  # otherwise Lightning is told not to validate
        return batches(self.val, self.batch_size)


class _Bar(RichProgressBar):
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's advice, and the warning for every batch in which a solve does not converge yet."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            warnings.filterwarnings("ignore", category=ConvergenceWarning)
            for message in _IGNORED:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)


def fit(
    task: Task,
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
    """Train a task for ``steps`` batches with Lightning, on the accelerator that it finds, or else the CPU.

    Batch k has the samples k·batch_size … (k + 1)·batch_size − 1 of ``train``. Under torchrun its processes share each
    batch, and the gradient is the same as that of one process with the whole batch.

    Args:
        task: the network and its loss.
        train: at least steps · batch_size samples.
        steps: number of batches.
        batch_size: samples in a batch, over all processes together.
        val: the samples of the validation after every interval; None for no validation.
        interval: batches from one validation to the next; None for ``steps``.
        precision: "32", "bf16" or "fp16".
        clip: the norm to which a larger gradient is scaled down; 0 for never.
        workers: processes that load images.
        progress: whether to show a bar.
        resume: the path of a checkpoint to go on from.
        callbacks, trainer: passed on to `lightning.Trainer`.

    Raises:
        ValueError: too few samples, or a batch that the processes cannot share equally.
        TrainingError: the loss or the gradient is not finite, or the gradient stays 0.

    Example:
        >>> import torch
        >>> from jfbfast.experiments.tasks import DenoiserTask
        >>> from jfbfast.experiments.trainer import fit
        >>> from jfbfast.imaging.datasets import RandomCrops
        >>> task = DenoiserTask(torch.nn.Conv2d(3, 3, 3, padding=1))
        >>> crops = RandomCrops([torch.rand(3, 16, 16)], crop=8, length=4)
        >>> fit(task, crops, steps=2, batch_size=2, progress=False).global_step
        2
    """
    interval = steps if interval is None else interval
    samples = len(train)  # type: ignore[arg-type]
    if samples < steps * batch_size:
        raise ValueError(f"train has {samples} samples; {steps} batches of {batch_size} take {steps * batch_size}")
    bar: list[Callback] = [_Bar(refresh_rate=10, leave=True)] if progress else []
    settings = {"logger": False, "enable_checkpointing": False, "devices": 1, **trainer}
    if distributed():
        world, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        settings |= {"devices": local, "num_nodes": world // local, "strategy": "ddp"}
    else:  # ignore a scheduler's variables, which say nothing about this process
        settings["plugins"] = [*settings.get("plugins", ()), LightningEnvironment()]
    task.steps = steps
    with _quiet():
        runner = L.Trainer(
            max_steps=steps,
            max_epochs=-(-steps // interval),
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            limit_val_batches=None if val is not None else 0,
            precision=_PRECISIONS[precision],  # type: ignore[arg-type]
            callbacks=[*bar, *callbacks, SoundSteps(clip)],
            enable_progress_bar=progress,
            enable_model_summary=False,
            **settings,
        )
        data = _Data(train, val, steps, interval, batch_size, workers)
        runner.fit(task, datamodule=data, ckpt_path=resume)
    return runner
