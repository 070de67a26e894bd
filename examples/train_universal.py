"""Train the universal network on a directory of photographs, from random weights or from those of another.

python examples/train_universal.py PHOTOGRAPHS OUT.safetensors --init universal --minutes 14

goes on from the shipped network. training_loop.py says what the options do.

Each sample of a batch has a blur and a noise level of its own. So A is not one of the library's operators here, but a
module that holds a blur for each sample, and the basis in which AᵀA is diagonal. A `DEGrad` needs no more.
"""

from __future__ import annotations

import argparse
import io
import math
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from training_loop import SIDE, Crops, Step, parser, sent, start, train

import jfbfast
from jfbfast import UniversalDEGrad, point_spread
from jfbfast.experiments.training_settings import parse_kind
from jfbfast.models.config import ModelConfig
from jfbfast.models.pretrained import load_model
from jfbfast.models.universal import describe
from jfbfast.operators.eigenbasis import DiagonalOperator
from jfbfast.operators.inverse import power_spectrum

LARGEST_NOISE = 0.2
PENALTY_INTERVAL = 6  # steps
SIGMAS = np.geomspace(0.3, 5, 240)


def exactly(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Method decorator: computes in float32 under autocast too, since A is to be exact."""

    @wraps(method)
    def computed(self: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x.float(), *rest)

    return computed


class Axes:
    """Gaussian blurs along one axis of `SIDE` pixels with unknown surroundings, one for each of `SIGMAS`.

    Attributes:
        radii: of the filters.
        matrix, s, v, power: (240, …) on the device: the matrices, their SVDs and their power spectra.
    """

    def __init__(self, device: torch.device) -> None:
        taps = [torch.tensor(jfbfast.GaussianBlur(None, sigma).taps.x, dtype=torch.float64) for sigma in SIGMAS]
        self.radii = [len(each) // 2 for each in taps]
        matrix = torch.zeros(len(taps), SIDE, SIDE, dtype=torch.float64)
        for i, r in enumerate(self.radii):
            for row in range(r, SIDE - r):
                matrix[i, row, row - r : row + r + 1] = taps[i]
        _, s, vh = torch.linalg.svd(matrix)
        self.matrix, self.s, self.v = (each.float().to(device) for each in (matrix, s, vh.mT))
        power = [power_spectrum(tuple(each.tolist()), 64, each.device, each.dtype) for each in taps]
        self.power = torch.stack(power).to(device)


class Gaussians(DiagonalOperator, nn.Module):
    """A Gaussian blur for each sample, with unknown surroundings; d has zeros where nothing was measured.

    Args:
        axes: the blurs along an axis.
        y, x: of each sample, the numbers of its blurs down and across.

    Attributes:
        frames: where d is measured: its first and last row and column of each sample.
        measured: 1 where d is measured, else 0, (B, 1, SIDE, SIDE).
        scored: 1 where the loss counts, else 0.
        power: |a|² of each sample's blur, (B, 64, 64).
    """

    def __init__(self, axes: Axes, y: np.ndarray, x: np.ndarray) -> None:
        super().__init__()
        device = axes.matrix.device
        on_y, on_x = (sent(torch.from_numpy(each), device) for each in (y, x))
        self.b_y, self.b_x, self.v_y, self.v_x = (
            bank[on_axis, None] for bank in (axes.matrix, axes.v) for on_axis in (on_y, on_x)
        )
        self.squares = axes.s[on_y, None, :, None].square() * axes.s[on_x, None, None, :].square()
        self.power = axes.power[on_y, :, None] * axes.power[on_x, None, :]
        radii = [(axes.radii[i], axes.radii[j]) for i, j in zip(y, x, strict=True)]
        self.frames = [(r_y, SIDE - r_y, r_x, SIDE - r_x) for r_y, r_x in radii]
        self.measured = self.scored = sent(_inside(self.frames), device)

    @exactly
    def forward(self, x: Tensor) -> Tensor:
        return self.b_y @ x @ self.b_x.mT

    @exactly
    def adjoint(self, y: Tensor) -> Tensor:
        return self.b_y.mT @ y @ self.b_x

    def normal(self, x: Tensor) -> Tensor:
        return self.adjoint(self(x))

    def eigenvalues(self, like: Tensor) -> Tensor:
        return self.squares

    @exactly
    def coefficients(self, x: Tensor) -> Tensor:
        return self.v_y.mT @ x @ self.v_x

    @exactly
    def image(self, coefficients: Tensor) -> Tensor:
        return self.v_y @ coefficients @ self.v_x.mT


class Circular(DiagonalOperator, nn.Module):
    """A point spread function for each sample, by FFT; the loss leaves out the border, where the image wraps around.

    The attributes are those of `Gaussians`.
    """

    def __init__(self, psfs: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()
        borders = [min(max(psf.shape) // 2 + 1, 14) for psf in psfs]
        kernels = torch.zeros(len(psfs), 1, SIDE, SIDE, dtype=torch.float64)
        for i, psf in enumerate(psfs):
            kernels[i, 0, : psf.shape[0], : psf.shape[1]] = psf
            kernels[i, 0] = kernels[i, 0].roll((-(psf.shape[0] // 2), -(psf.shape[1] // 2)), (0, 1))
        kernels = sent(kernels, device)
        self.power = torch.fft.fft2(kernels[:, 0]).abs().square()
        self.gain = torch.fft.rfft2(kernels.float())
        self.squares = self.gain.abs().square()
        self.frames = [(0, SIDE, 0, SIDE)] * len(psfs)
        self.measured = torch.ones(len(psfs), 1, SIDE, SIDE, device=device)
        self.scored = sent(_inside([(r, SIDE - r, r, SIDE - r) for r in borders]), device)

    @exactly
    def _scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * factors, s=(SIDE, SIDE))

    def forward(self, x: Tensor) -> Tensor:
        return self._scaled(x, self.gain)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._scaled(y, self.gain.conj())

    def normal(self, x: Tensor) -> Tensor:
        return self._scaled(x, self.squares)

    def eigenvalues(self, like: Tensor) -> Tensor:
        return self.squares

    @exactly
    def coefficients(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x)

    def image(self, coefficients: Tensor) -> Tensor:
        return torch.fft.irfft2(coefficients, s=(SIDE, SIDE))


def _inside(frames: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """Ones inside each frame, else zeros, (B, 1, SIDE, SIDE)."""
    mask = torch.zeros(len(frames), 1, SIDE, SIDE)
    for i, (top, bottom, left, right) in enumerate(frames):
        mask[i, :, top:bottom, left:right] = 1
    return mask


def few_points(g: np.random.Generator) -> Tensor:
    """Two to six points of random weights, up to 17 pixels apart."""
    radius = int(g.integers(2, 9))
    weights = np.zeros((2 * radius + 1, 2 * radius + 1))
    for _ in range(g.integers(2, 7)):
        weights[tuple(g.integers(2 * radius + 1, size=2))] += g.uniform(0.2, 1)
    return torch.from_numpy(weights / weights.sum())


def rectangle(width: float, height: float, angle: float) -> Tensor:
    """A rotated rectangle of uniform weight, sampled at 6 × 6 points of each pixel."""
    radius = math.ceil(math.hypot(width, height) / 2) + 1
    side = 2 * radius + 1
    t = (np.arange(6 * side) + 0.5) / 6 - radius - 0.5
    y, x = np.meshgrid(t, t, indexing="ij")
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    inside = (abs(along) <= width / 2) & (abs(across) <= height / 2)
    weights = inside.reshape(side, 6, side, 6).mean((1, 3))
    return torch.from_numpy(weights / weights.sum())


def speckle(g: np.random.Generator) -> Tensor:
    """Random weights under a Gaussian window."""
    radius = int(g.integers(2, 8))
    t = np.arange(2 * radius + 1) - radius
    window = np.exp(-(t[:, None] ** 2 + t**2) / (2 * (radius * g.uniform(0.3, 0.8)) ** 2))
    weights = g.random(window.shape) ** g.uniform(1, 6) * window
    return torch.from_numpy(weights / weights.sum())


def random_psf(g: np.random.Generator) -> Tensor:
    """A random point spread function; one in ten is the convolution of two of the others."""
    kind = g.integers(10)
    if kind < 2:
        return point_spread.motion(g.uniform(2, 20), g.uniform(0, 180))
    if kind < 4:
        return point_spread.trajectory(g.uniform(5, 21), g)
    if kind == 4:
        return point_spread.defocus(g.uniform(0.7, 5))
    if kind == 5:
        sigma = math.exp(g.uniform(math.log(0.5), math.log(4)))
        return point_spread.gaussian((sigma, sigma * g.uniform(0.3, 1)), g.uniform(0, 180))
    if kind == 6:
        return few_points(g)
    if kind == 7:
        return rectangle(g.uniform(1, 11), g.uniform(1, 11), g.uniform(0, math.pi))
    if kind == 8:
        return speckle(g)
    while True:
        p, q = random_psf(g), random_psf(g)
        size = [a + b - 1 for a, b in zip(p.shape, q.shape, strict=True)]
        if max(size) <= 33:
            both = torch.fft.irfft2(torch.fft.rfft2(p, s=size) * torch.fft.rfft2(q, s=size), s=size).clamp_min(0)
            return both / both.sum()


class Measurements(NamedTuple):
    """A batch: images x, their blurs, and measurements d with white noise of the levels ``noise``, (B,)."""

    x: Tensor
    blur: Gaussians | Circular
    d: Tensor
    noise: Tensor


class Batches:
    """Random crops, blurs and noise levels."""

    def __init__(self, given: argparse.Namespace, device: torch.device) -> None:
        self.crops, self.axes, self.device = Crops(given, device), Axes(device), device
        self.size, self.gaussians_only = given.batch, given.gaussians_only

    def __call__(self, g: np.random.Generator, on_device: torch.Generator, step: int) -> Measurements:
        x, blur = self.crops.batch(g, self.size), self._blur(g, step)
        levels = self._levels(g)
        compressed = np.flatnonzero(g.random(self.size) < 0.08)  # by JPEG: one in twelve
        white = torch.randn(x.shape, generator=on_device, device=self.device)
        grey = (x == x[:, :1]).flatten(1).all(1).view(-1, 1, 1, 1)
        white = torch.where(grey, white[:, :1], white)  # a grey photograph has the same noise in its three channels
        noise = sent(torch.from_numpy(levels).float(), self.device)
        d = (blur(x) + noise.view(-1, 1, 1, 1) * white) * blur.measured
        if len(compressed):
            d, noise = _compress(g, compressed, d, noise, blur)
        return Measurements(x, blur, d, noise)

    def _blur(self, g: np.random.Generator, step: int) -> Gaussians | Circular:
        """Gaussians with unknown surroundings in three steps of five, and any point spread functions in the others."""
        if step % 5 >= 3 and not self.gaussians_only:
            return Circular([random_psf(g) for _ in range(self.size)], self.device)
        y, x = g.integers(len(SIGMAS), size=(2, self.size))  # their logarithms are evenly spaced
        return Gaussians(self.axes, y, np.where(g.random(self.size) < 0.7, y, x))

    def _levels(self, g: np.random.Generator) -> np.ndarray:
        """Random noise levels: most below 0.1 and rather low, one in twelve to 0.2, one in twelve to 0.002."""
        kind, share = g.random(self.size), g.random(self.size)
        return np.select([kind < 1 / 12, kind < 1 / 6], [0.002 * share, 0.1 + 0.1 * share], 0.1 * share**2)


def _compress(
    g: np.random.Generator, chosen: np.ndarray, d: Tensor, noise: Tensor, blur: Gaussians | Circular
) -> tuple[Tensor, Tensor]:
    """Compress the chosen measurements as JPEG, and add what that changes to their noise levels."""
    numbers = torch.from_numpy(chosen).to(d.device)
    parts, levels = d[numbers].cpu(), noise[numbers].cpu()
    for i, number in enumerate(chosen):
        top, bottom, left, right = blur.frames[number]
        part = parts[i, :, top:bottom, left:right]  # a view into parts
        grey_levels = ((part + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        quality, subsampling = int(g.integers(75, 99)), int(g.choice([0, 2]))
        Image.fromarray(grey_levels).save(file, "JPEG", quality=quality, subsampling=subsampling)
        changed = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 127.5 - 1
        levels[i] = (levels[i] ** 2 + F.mse_loss(changed, part)).sqrt().clamp_max(LARGEST_NOISE)
        part.copy_(changed)
    parts, levels = (sent(each, d.device) for each in (parts, levels))
    return d.index_copy(0, numbers, parts), noise.index_copy(0, numbers, levels)


def load(given: argparse.Namespace) -> tuple[UniversalDEGrad, ModelConfig]:
    """The model to start from, and its settings."""
    if given.init:
        if given.features or given.gradient:
            raise ValueError(
                f"--features or --gradient is given; with --init {given.init} they are those of the network"
            )
        model, config = load_model(given.init)
    else:
        features = given.features or [96, 128, 192]
        denoiser = {"kind": "UNet", "channels": 3, "features": features, "blocks": [2] * len(features)}
        config = ModelConfig(
            form="universal",
            denoiser=denoiser | {"conditions": 3, "injection": 13},
            padding_mode="valid",
            noise_range=[0.0, LARGEST_NOISE],
            gradient=parse_kind("gradient", given.gradient or "jfb"),
        )
        model = config.model()
    if not isinstance(model, UniversalDEGrad):
        raise ValueError(f"--init is {given.init}, a {type(model).__name__}; it takes a UniversalDEGrad")
    return model.train(), config


def main(given: argparse.Namespace) -> None:
    device = start(given)
    batches = Batches(given, device)
    model, config = load(given)
    model.to(device)

    def compute(batch: Any, step: int, done: float) -> Step:
        x, blur, d, noise = batch
        count = given.evaluations if done < 0.5 else given.later or given.evaluations
        model.solver = jfbfast.Picard(tol=1e-3, max_iter=count)
        model.blur = blur
        model.regularizer.condition = describe(blur.power, noise.double())
        error = ((model(d) - x).square() * blur.scored).sum((1, 2, 3)) / (3 * blur.scored.sum((1, 2, 3)))
        if not given.penalty or step % PENALTY_INTERVAL:
            return Step(error, 4)
        penalty = jfbfast.jacobian_penalty(model, d, x=model.solution.value, bound=0.5, iterations=2)
        return Step(error, 4, given.penalty * PENALTY_INTERVAL * penalty)  # so that the layer contracts

    train(given, model, config, batches, compute, "dB")


def options() -> argparse.ArgumentParser:
    options = parser(__doc__.splitlines()[0], steps=6000, minutes=math.inf, rate=0.01, decay=0.75)
    options.add_argument("--gaussians-only", action="store_true", help="train on no other kind of blur")
    options.add_argument("--evaluations", type=int, default=1, help="of the layer in a solve, before the last one")
    options.add_argument("--later", type=int, help="the same in the second half of the training (default: as many)")
    options.add_argument("--penalty", type=float, default=2e-3, help="weight of the Jacobian penalty; 0 for none")
    options.add_argument("--gradient", help="as in jfbfast train, for example unrolled:steps=4 (default: jfb)")
    options.add_argument("--features", type=int, nargs="+", help="of the U-Net (default: 96 128 192)")
    return options


if __name__ == "__main__":
    warnings.simplefilter("ignore", jfbfast.ConvergenceWarning)  # training solves with few evaluations
    main(options().parse_args())
