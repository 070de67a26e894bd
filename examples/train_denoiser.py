"""Train the denoiser of plug-and-play restoration on a directory of photographs: white noise, and no blur.

python examples/train_denoiser.py PHOTOGRAPHS OUT.safetensors --init plug-and-play --minutes 14

goes on from the shipped denoiser. Without --init it starts from the U-Net of "universal". training_loop.py says what
the options do.
"""

from __future__ import annotations

import argparse
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from training_loop import Crops, Step, parser, sent, start, train

import jfbfast
from jfbfast.models.config import ModelConfig
from jfbfast.models.plug_and_play import GaussianDenoiser, PlugAndPlay
from jfbfast.models.pretrained import load_model
from jfbfast.models.universal import describe

WEAKEST, STRONGEST = 0.004, 0.4  # noise levels on [−1, 1]


class Once(nn.Module):
    """The denoiser as a layer, so that its convolutions are those of a solve, which are faster on a CPU."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def layer(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.denoiser(x, noise)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        once, method = jfbfast.Picard(tol=1e-3, max_iter=1), jfbfast.Unrolled(1)
        return jfbfast.fixed_point(self.layer, x, inputs=(noise,), solver=once, gradient=method)


def from_universal(denoiser: GaussianDenoiser) -> None:
    """Copy the weights of "universal", whose first convolution sees five images, a map of ones and three numbers.

    Without a blur the five images are equal, so their weights add up; and the three numbers are nearly linear in the
    logarithm of the noise level.
    """
    universal = jfbfast.UniversalDEGrad.from_pretrained("universal").regularizer.denoiser
    weights = {name: value.detach().clone() for name, value in universal.state_dict().items()}
    head = weights["head.weight"]
    images, ones, numbers = head[:, :60], head[:, 60:64], head[:, 64:]
    noise = torch.logspace(-2.3, -0.7, 30, dtype=torch.float64)
    told = describe(torch.ones(30, 64, 64, dtype=torch.float64), noise)
    line = torch.linalg.lstsq(torch.stack([torch.ones(30), told[:, 0]], 1), told).solution
    slope = (numbers * line[1].view(1, 3, 1, 1)).sum(1, keepdim=True)
    weights["head.weight"] = torch.cat([images.unflatten(1, (5, 12)).sum(1), slope], 1)
    weights["head.bias"] += ones.sum((1, 2, 3)) + (numbers.sum((2, 3)) * line[0]).sum(1)
    denoiser.load_state_dict(weights)


def load(init: str | None) -> tuple[PlugAndPlay, ModelConfig]:
    """The model to start from, and its settings."""
    if init:
        model, config = load_model(init)
    else:
        kind = {"kind": "GaussianDenoiser", "channels": 3, "features": [96, 128, 192], "blocks": [2, 2, 2]}
        config = ModelConfig("plug-and-play", denoiser=kind, padding_mode="valid", noise_range=[0.0, 0.38])
        model = config.model()
        from_universal(model.denoiser)
    if not isinstance(model, PlugAndPlay):
        raise ValueError(f"--init is {init}, a {type(model).__name__}; it takes a PlugAndPlay")
    return model.train(), config


def main(given: argparse.Namespace) -> None:
    device = start(given)
    crops = Crops(given, device)
    model, config = load(given.init)
    once = Once(model.to(device).denoiser)

    def make_batch(g: np.random.Generator, on_device: torch.Generator, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The images, the noisy ones and the noise levels."""
        x = crops.batch(g, given.batch)
        levels = np.exp(g.uniform(math.log(WEAKEST), math.log(STRONGEST), given.batch))
        noise = sent(torch.from_numpy(levels).float(), device)
        white = torch.randn(x.shape, generator=on_device, device=device)
        return x, x + noise.view(-1, 1, 1, 1) * white, noise

    def compute(batch: Any, step: int, done: float) -> Step:
        x, y, noise = batch
        return Step((once(y, noise) - x).square().mean((1, 2, 3)), noise.square())

    train(given, model, config, make_batch, compute, "dB less noise")


if __name__ == "__main__":
    warnings.simplefilter("ignore", jfbfast.ConvergenceWarning)  # one evaluation is no solve
    main(parser(__doc__.splitlines()[0], steps=math.inf, minutes=60, rate=0.006, decay=0.8).parse_args())
