"""What is trained, and on which loss: a denoiser, a network that undoes one blur, or one for all blurs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import _enable_get_lr_call

from jfbfast.experiments.muon import Muon
from jfbfast.imaging.datasets import Sample
from jfbfast.imaging.quality import decibels, measure, psnr
from jfbfast.models.degrad import DEGrad
from jfbfast.models.penalty import jacobian_penalty
from jfbfast.models.universal import UniversalDEGrad
from jfbfast.operators.blur import GaussianBlur
from jfbfast.operators.frame import cut_to
from jfbfast.solvers import Status

BALANCE = 5e-4  # mean squared error at σ = 1 and noise 0.01, at which `UniversalTask`'s loss equals the error
ERROR_FLOOR = 1e-5  # 56 dB: without it, batches with almost no noise would outweigh all others


@dataclass(frozen=True)
class Optimization:
    """The optimizer and the schedule of its learning rate.

    Attributes:
        learning_rate: the highest of the schedule.
        schedule: "onecycle", "cosine" (down to zero), "linear" (constant, then down to zero over the last half) or
            "constant".
        warmup: steps of linear warm-up in all schedules but the first.
        beta2: β₂ of Adam.
        optimizer: "adam", or "muon" for `Muon`, where Adam's learning rate is a tenth of Muon's.
    """

    learning_rate: float
    schedule: str = "onecycle"
    warmup: int = 0
    beta2: float = 0.999
    optimizer: str = "adam"

    def factor(self, step: int, steps: int) -> float:
        """The share of the highest learning rate that a step has, in all schedules but the first."""
        left = 1 - step / steps
        decay = {"cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))), "linear": min(1, 2 * left)}
        return min(1, (step + 1) / max(1, self.warmup)) * decay.get(self.schedule, 1)


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
        # The schedule is the one of `steps`, of which the saved run may have had fewer.
        for schedule in checkpoint["lr_schedulers"]:
            for name in ("total_steps", "_schedule_phases"):
                schedule.pop(name, None)
        progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        progress.optimizer.step.total.completed = checkpoint["global_step"]

    def on_train_start(self) -> None:
        # The learning rate of the next step follows from its number and `steps`, also in a run that was made longer.
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            with _enable_get_lr_call(scheduler):
                rates = scheduler.get_lr()
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

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
        rate, betas = chosen.learning_rate, (0.9, chosen.beta2)
        muon = chosen.optimizer == "muon"
        optimizer: Any = Muon(self, learning_rate=rate, betas=betas) if muon else None
        optimizer = optimizer or torch.optim.Adam(self.parameters(), lr=rate, betas=betas)
        schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: chosen.factor(step, steps))
        if chosen.schedule == "onecycle":
            rates = [group["lr"] for group in optimizer.param_groups]
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, cycle_momentum=not muon)
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


@dataclass(frozen=True)
class Measurements:
    """The Gaussian blurs and noise levels that a universal network is trained on.

    Attributes:
        sigma: least and largest σ > 0, in pixels.
        noise: least and largest noise level ν ≥ 0.
        kernel_size, padding_mode: arguments of `GaussianBlur`.
    """

    sigma: Sequence[float] = (0.3, 5.0)
    noise: Sequence[float] = (0.0, 0.1)
    kernel_size: int | None = None
    padding_mode: str = "valid"

    def draw(self, generator: np.random.Generator) -> tuple[GaussianBlur, float]:
        """Draw a random pair (A, ν): log σ is uniform, and so is √ν, so that weak noise is not rare."""
        return self._at(*generator.random(2).tolist())

    def grid(self) -> list[tuple[GaussianBlur, float]]:
        """The pairs to validate on: the middle and the four corners."""
        return [self._at(0.5, 0.5), *(self._at(*corner) for corner in product((0.0, 1.0), repeat=2))]

    def _at(self, s: float, n: float) -> tuple[GaussianBlur, float]:
        """The pair at the fractions s and n (in [0, 1]) of the ranges of log σ and √ν."""
        sigma = math.exp((1 - s) * math.log(self.sigma[0]) + s * math.log(self.sigma[1]))
        noise = ((1 - n) * math.sqrt(self.noise[0]) + n * math.sqrt(self.noise[1])) ** 2
        within = min(max(noise, self.noise[0]), self.noise[1])  # rounding could leave the range
        return GaussianBlur(self.kernel_size, sigma, self.padding_mode), within


class UniversalTask(DeblurTask):
    """Train one network for many blurs and noise levels; each part of a batch gets a random pair of them.

    All processes use the same pairs. The loss of a part is its mean squared error e, divided by the value of e, which
    is held constant. Its gradient is that of log e, so that every pair counts equally in dB, although the errors differ
    30-fold. Validation uses a fixed grid of pairs. The metrics of a step are those of its last part.

    Args:
        model: the network.
        measurements: the blurs and noise levels.
        optimization, options: as in `DeblurTask`; the samples of ``contraction`` are counted in each part.
        parts: the number of pairs in a batch; each gets an equal part of it.
    """

    model: UniversalDEGrad

    def __init__(
        self,
        model: UniversalDEGrad,
        measurements: Measurements,
        optimization: Optimization,
        *,
        parts: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(model, model.blur, model.noise, optimization, **options)
        self.measurements, self.parts = measurements, parts

    def set_measurement(self, blur: GaussianBlur, noise: float) -> None:
        """Measure, and restore, with this blur and noise from now on."""
        self.model.set_measurement(blur, noise)
        self.blur, self.noise = blur, noise

    def training_step(self, sample: Sample, batch_index: int) -> Tensor:
        if len(sample.x) % self.parts:
            raise ValueError(f"{len(sample.x)} samples of a batch are no multiple of its {self.parts} measurements")
        generator = np.random.default_rng((self.seed, self.global_step, 0, 1))  # no other stream has a key of four
        losses = []
        for part in zip(*(values.chunk(self.parts) for values in sample), strict=True):
            self.set_measurement(*self.measurements.draw(generator))
            losses.append(super().training_step(Sample(*part), batch_index))
        return torch.stack(losses).mean()

    def loss(self, error: Tensor, sample: Sample) -> Tensor:
        mean = self.all_gather(error.detach())  # the errors of all processes
        assert isinstance(mean, Tensor)
        return super().loss(error * (BALANCE / (mean.mean() + ERROR_FLOOR)), sample)

    def validation_step(self, sample: Sample, batch_index: int) -> None:
        for pair in self.measurements.grid():
            self.set_measurement(*pair)
            super().validation_step(sample, batch_index)
