"""What is trained, and on which loss: a denoiser, a network that undoes one blur, or one for a range of blurs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jfbfast.imaging.datasets import Sample
from jfbfast.imaging.quality import decibels, measure, psnr
from jfbfast.models.conditional import ConditionalDEGrad
from jfbfast.models.degrad import DEGrad
from jfbfast.models.penalty import jacobian_penalty
from jfbfast.operators.blur import GaussianBlur
from jfbfast.operators.frame import cut_to
from jfbfast.solvers import Status

BALANCE = 5e-4  # mean squared error at σ = 1 and noise 0.01, at which `ConditionalDeblurTask`'s loss equals the error
ERROR_FLOOR = 1e-5  # 56 dB: without it, batches with almost no noise would outweigh all others


@dataclass(frozen=True)
class Optimization:
    """Adam and the schedule of its learning rate.

    Attributes:
        learning_rate: the highest of the schedule.
        schedule: "onecycle", "cosine" (down to zero) or "constant".
        warmup: steps of linear warm-up in the last two schedules.
        beta2: β₂ of Adam.
    """

    learning_rate: float
    schedule: str = "onecycle"
    warmup: int = 0
    beta2: float = 0.999


@dataclass(frozen=True)
class JacobianPenalty:
    """The term weight · `jacobian_penalty` in the loss of a `DEGrad`.

    Attributes:
        weight: of the term.
        bound: the one of `jacobian_penalty`.
        interval: the term is computed in every interval-th step, and counts interval times.
        samples: how many samples of a process's batch it is computed on; None for all.
    """

    weight: float
    bound: float = 0.7
    interval: int = 1
    samples: int | None = None


class Task(L.LightningModule):
    """A network and its loss, the mean squared error of `restore`. All random numbers depend only on seed and step.

    With the padding mode "valid", images are compared within the frame of the measurement.
    """

    phase = "training"  # the name in messages, and of the checkpoint's file

    def __init__(self, optimization: Optimization, seed: int) -> None:
        super().__init__()
        self.optimization, self.seed = optimization, seed
        self.steps = 1  # the steps of the whole training; `fit` sets them

    def restore(self, sample: Sample) -> Tensor:
        """The images that the loss compares with ``sample.x``, or with the part of it within their frame."""
        raise NotImplementedError

    def loss(self, error: Tensor, sample: Sample) -> Tensor:
        """The loss of a batch that was just restored with this mean squared error."""
        return error

    def report(self, batch_size: int | None = None, **values: Tensor) -> None:
        """Report metrics, which the `Metrics` callback writes, and the progress bar shows in part."""
        for name, value in values.items():
            shown = name.removeprefix("val_") in ("psnr", "evaluations")
            self.log(name, value, prog_bar=shown, logger=False, batch_size=batch_size, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Without Lightning's place in the old epoch, a resumed run starts a new epoch at its step.
        del checkpoint["loops"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        progress.optimizer.step.total.completed = checkpoint["global_step"]

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        generator = np.random.default_rng((self.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(generator.integers(2**63)))

    def training_step(self, sample: Sample, batch_index: int) -> Tensor:
        restored = self.restore(sample).to(sample.x.dtype)
        error = F.mse_loss(restored, cut_to(sample.x, restored))
        self.report(loss=error.detach(), psnr=decibels(error.detach()))
        return self.loss(error, sample)

    def validation_step(self, sample: Sample, batch_index: int) -> None:
        restored = self.restore(sample).to(sample.x.dtype)
        x = cut_to(sample.x, restored)
        self.report(len(x), val_psnr=psnr(restored, x).mean(), val_loss=F.mse_loss(restored, x))

    def configure_optimizers(self) -> Any:
        chosen, steps = self.optimization, self.steps
        rate = chosen.learning_rate
        optimizer = torch.optim.Adam(self.parameters(), lr=rate, betas=(0.9, chosen.beta2))

        def factor(step: int) -> float:
            decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if chosen.schedule == "cosine" else 1
            return min(1, (step + 1) / max(1, chosen.warmup)) * decay

        schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        if chosen.schedule == "onecycle":
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DenoiserTask(Task):
    """Train a denoiser D: the mean squared error of D(x + ν ε) against x in [−1, 1], ν uniform in ``noise_range``."""

    phase = "pretraining"

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
        return self.denoiser(sample.x + level * sample.noise)


class DeblurTask(Task):
    """Train a network that undoes a blur; a `DEGrad` by its own gradient method.

    Args:
        model: maps measurements d = A x + ν ε (B, C, H, W) to images x in [−1, 1].
        blur, noise: A and ν.
        optimization, seed: of the training's random numbers other than those of the samples.
        in_training: attributes that a `DEGrad` has in training only, such as ``solver`` or ``solve_dtype``.
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
        self.model, self.blur, self.noise = model, blur, noise
        self.in_training = dict(in_training or {})
        self.contraction = contraction

    def measure(self, sample: Sample) -> Tensor:
        """The measurement d = A x + ν ε of a sample."""
        return measure(sample.x, self.blur, self.noise, sample.noise)

    def restore(self, sample: Sample) -> Tensor:
        d, model = self.measure(sample), self.model
        if not isinstance(model, DEGrad):
            return cut_to(model(d), d)
        before = {name: getattr(model, name) for name in self.in_training}
        try:
            for name, value in self.in_training.items() if self.training else ():
                setattr(model, name, value)
            restored = model(d)
        finally:
            for name, value in before.items():
                setattr(model, name, value)
        assert model.solution is not None
        evaluations = model.solution.iterations.double().mean().float()
        diverged = (model.solution.status == Status.DIVERGED).float().mean()
        prefix = "" if self.training else "val_"
        self.report(len(d), **{f"{prefix}evaluations": evaluations, f"{prefix}diverged": diverged})
        return cut_to(restored, d)

    def loss(self, error: Tensor, sample: Sample) -> Tensor:
        chosen = self.contraction
        if chosen is None or self.global_step % chosen.interval:
            return error
        assert isinstance(self.model, DEGrad) and self.model.solution is not None
        solution = self.model.solution
        kept = torch.nonzero(solution.status != Status.DIVERGED)[: chosen.samples, 0]
        d = self.measure(sample)[kept]
        penalty: Tensor = jacobian_penalty(self.model, d, x=solution.value[kept], bound=chosen.bound)
        self.report(jacobian_penalty=penalty.detach())
        return error + chosen.weight * chosen.interval * penalty


class ConditionalDeblurTask(DeblurTask):
    """Train one network for a range of blurs and noise levels; each part of a batch gets a random pair of them.

    All processes use the same pairs. The loss of a part is its mean squared error e, divided by the value of e, which
    is held constant. Its gradient is that of log e, so that every pair counts equally in dB, although the errors differ
    30-fold. Validation uses a fixed grid of pairs. The metrics of a step are those of its last part.

    Args:
        model: the network.
        optimization, options: as in `DeblurTask`; the samples of ``contraction`` are counted in each part.
        measurements: the number of pairs in a batch; each gets an equal part of it.
    """

    model: ConditionalDEGrad

    def __init__(
        self, model: ConditionalDEGrad, optimization: Optimization, *, measurements: int = 4, **options: Any
    ) -> None:
        super().__init__(model, model.blur, model.measurement[1], optimization, **options)
        self.measurements = measurements

    def set_measurement(self, sigma: float, noise: float) -> None:
        """Measure, and restore, with this blur and noise from now on."""
        self.model.set_measurement(sigma, noise)
        self.blur, self.noise = self.model.blur, noise

    def training_step(self, sample: Sample, batch_index: int) -> Tensor:
        if len(sample.x) % self.measurements:
            raise ValueError(
                f"{len(sample.x)} samples of a batch are no multiple of its {self.measurements} measurements"
            )
        generator = np.random.default_rng((self.seed, self.global_step, 0, 1))  # no other stream has a key of four
        losses = []
        for part in zip(*(values.chunk(self.measurements) for values in sample), strict=True):
            self.set_measurement(*self.model.ranges.draw(generator))
            losses.append(super().training_step(Sample(*part), batch_index))
        return torch.stack(losses).mean()

    def loss(self, error: Tensor, sample: Sample) -> Tensor:
        mean = self.all_gather(error.detach())  # the errors of all processes
        assert isinstance(mean, Tensor)
        return super().loss(error * (BALANCE / (mean.mean() + ERROR_FLOOR)), sample)

    def validation_step(self, sample: Sample, batch_index: int) -> None:
        for pair in self.model.ranges.grid():
            self.set_measurement(*pair)
            super().validation_step(sample, batch_index)
