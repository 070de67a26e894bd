"""Training one network for a range of measurements: each batch has several blurs and noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jfbfast.experiments.optimization import JacobianPenalty, Optimization
from jfbfast.experiments.trainer import DeblurTask
from jfbfast.imaging.datasets import Sample
from jfbfast.models.conditional import ConditionalDEGrad

BALANCE = 5e-4  # the error at σ = 1 and noise 0.01, where the loss keeps the scale that it has for one setting
ERROR_FLOOR = 1e-5  # 56 dB: below it a batch weighs no more, else noise near 0 would outweigh all


class ConditionalDeblurTask(DeblurTask):
    """As `DeblurTask`, each part of a batch with a random setting of the model's ranges, the same on all processes.

    The loss of a part is its mean squared error over that error, held constant: the gradient is that of the
    logarithm, so every setting counts in dB, though errors differ 30-fold. Validation is on a fixed grid.
    The metrics of a step are those of its last part.

    Args:
        model: the network.
        optimization, seed, in_training: as in `DeblurTask`.
        contraction: the same, its samples those of each part.
        measurements: settings in each batch, which share it out equally.
    """

    model: ConditionalDEGrad

    def __init__(
        self,
        model: ConditionalDEGrad,
        optimization: Optimization,
        seed: int = 0,
        in_training: Mapping[str, Any] | None = None,
        contraction: JacobianPenalty | None = None,
        measurements: int = 4,
    ) -> None:
        super().__init__(model, model.blur, model.measurement[1], optimization, seed, in_training, contraction)
        self.measurements = measurements

    def set_measurement(self, sigma: float, noise: float) -> None:
        """Measure, and restore, at this setting from now on."""
        self.model.set_measurement(sigma, noise)
        self.blur, self.noise = self.model.blur, noise

    def training_step(self, sample: Sample, batch_index: int) -> Tensor:
        if len(sample.x) % self.measurements:
            raise ValueError(
                f"{len(sample.x)} samples of a batch are no multiple of its {self.measurements} measurements"
            )
        generator = np.random.default_rng((self.seed, self.global_step, 0, 1))  # no other stream's key has four parts
        losses = []
        for part in zip(*(values.chunk(self.measurements) for values in sample), strict=True):
            self.set_measurement(*self.model.ranges.draw(generator))
            losses.append(super().training_step(Sample(*part), batch_index))
        return torch.stack(losses).mean()

    def balance(self, error: Tensor) -> Tensor:
        mean = self.all_gather(error)
        assert isinstance(mean, Tensor)
        return BALANCE / (mean.mean() + ERROR_FLOOR)

    def validation_step(self, sample: Sample, batch_index: int) -> None:
        for setting in self.model.ranges.grid():
            self.set_measurement(*setting)
            super().validation_step(sample, batch_index)
