"""Train the denoiser of plug-and-play restoration on a directory of photographs: white noise, and no blur.

python examples/train_denoiser.py PHOTOGRAPHS OUT.safetensors [--init FILE] [--minutes 60]

It starts from the U-Net of "universal", or from another such denoiser.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from train_universal import SIDE, SUFFIXES, Measurements

import jfbfast
from jfbfast.experiments.muon import Muon
from jfbfast.imaging.datasets import Photographs
from jfbfast.models.checkpoint import load_checkpoint, save_checkpoint
from jfbfast.models.config import ModelConfig
from jfbfast.models.plug_and_play import GaussianDenoiser, PlugAndPlay
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
    weights = {
        name: value.detach().clone()
        for name, value in jfbfast.UniversalDEGrad.from_pretrained("universal")
        .regularizer.denoiser.state_dict()
        .items()
    }
    head = weights["head.weight"]
    images, ones, numbers = head[:, :60], head[:, 60:64], head[:, 64:]
    noise = torch.logspace(-2.3, -0.7, 30, dtype=torch.float64)
    told = describe(torch.ones(30, 64, 64, dtype=torch.float64), noise)
    line = torch.linalg.lstsq(torch.stack([torch.ones(30), told[:, 0]], 1), told).solution
    slope = (numbers * line[1].view(1, 3, 1, 1)).sum(1, keepdim=True)
    weights["head.weight"] = torch.cat([images.unflatten(1, (5, 12)).sum(1), slope], 1)
    weights["head.bias"] += ones.sum((1, 2, 3)) + (numbers.sum((2, 3)) * line[0]).sum(1)
    denoiser.load_state_dict(weights)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path, help="directory of photographs")
    parser.add_argument("out", type=Path, help="file of the trained network")
    parser.add_argument("--held-out", type=int, default=15, help="photographs, the last by name, to leave out")
    parser.add_argument("--init", type=Path, help="a file to start from (default: the U-Net of universal)")
    parser.add_argument("--minutes", type=float, default=60, help="of processor time")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--decay", type=float, default=0.8, help="share of the time in which the rate falls to 0")
    parser.add_argument("--rate", type=float, default=0.006, help="learning rate of Muon")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(given: argparse.Namespace) -> None:
    jfbfast.keep_freed_memory()
    torch.manual_seed(given.seed)
    files = sorted(file for file in given.photographs.rglob("*") if file.suffix.lower() in SUFFIXES)
    photographs = Photographs(
        files[: len(files) - given.held_out], least=2 * SIDE, purpose="a crop that is shrunk by two"
    )
    images = Measurements(photographs, given.seed + 1)

    if given.init:
        model, config = load_checkpoint(given.init)
        model.train()
    else:
        kind = {"kind": "GaussianDenoiser", "channels": 3, "features": [96, 128, 192], "blocks": [2, 2, 2]}
        config = ModelConfig("plug-and-play", denoiser=kind, padding_mode="valid", noise_range=[0.0, 0.38])
        model = config.model()
        from_universal(model.denoiser)
    assert isinstance(model, PlugAndPlay)
    once, average = Once(model.denoiser), copy.deepcopy(model)  # exponential moving average of the weights
    optimizer = Muon(model, learning_rate=given.rate)
    rates = [group["lr"] for group in optimizer.param_groups]

    started, step, done = time.process_time(), 0, 0.0
    while done < 1:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 100, (1 - done) / given.decay)
        x = torch.stack([images.image() for _ in range(given.batch)])
        noise = torch.empty(given.batch).uniform_(math.log(WEAKEST), math.log(STRONGEST)).exp()
        y = x + noise.view(-1, 1, 1, 1) * torch.randn_like(x)
        error = (once(y, noise) - x).square().mean((1, 2, 3))
        loss = (error * (5e-4 / (error.detach() + 1e-5))).mean()  # its gradient is that of the error in dB
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - min(0.998, (1 + step) / (10 + step)))
        step += 1
        done = (time.process_time() - started) / (60 * given.minutes)
        if step % 100 == 0 or done >= 1:
            gain = float((10 * torch.log10(noise.square() / error.detach())).mean())
            print(f"step {step}: {gain:.2f} dB less noise", flush=True)
        if step % 500 == 0 or done >= 1:
            save_checkpoint(given.out, average, config, half=True)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore", jfbfast.ConvergenceWarning)  # one evaluation is no solve
    main(arguments())
