"""Train the universal network on a directory of photographs, from random weights or from a file.

python examples/train_universal.py PHOTOS OUT.safetensors [--steps N] [--init FILE] [--help]

Each sample of a batch has a blur and a noise level of its own. So A is not one of the library's operators here, but a
module that holds a blur for each sample, and the basis in which AᵀA is diagonal. A `DEGrad` needs no more.
"""

import argparse
import copy
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import jfbfast
from jfbfast import point_spread
from jfbfast.experiments.muon import Muon
from jfbfast.experiments.training_settings import parse_kind
from jfbfast.imaging.datasets import Photographs
from jfbfast.imaging.light import to_linear
from jfbfast.models.checkpoint import save_checkpoint
from jfbfast.models.config import ModelConfig
from jfbfast.models.universal import describe
from jfbfast.operators.eigenbasis import DiagonalOperator
from jfbfast.operators.inverse import power_spectrum

SIDE = 80  # pixels of x
LARGEST_NOISE = 0.2
PENALTY_INTERVAL = 6  # steps
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")


class Axis:
    """A Gaussian blur along one axis of `SIDE` pixels with unknown surroundings: its matrix, SVD and power spectrum."""

    def __init__(self, sigma: float) -> None:
        taps = torch.tensor(jfbfast.GaussianBlur(None, sigma).taps.x, dtype=torch.float64)
        self.radius = r = len(taps) // 2
        matrix = torch.zeros(SIDE, SIDE, dtype=torch.float64)
        for row in range(r, SIDE - r):
            matrix[row, row - r : row + r + 1] = taps
        _, s, vh = torch.linalg.svd(matrix)
        self.matrix, self.s, self.v = matrix.float(), s.float(), vh.T.float()
        self.power = power_spectrum(tuple(taps.tolist()), 64, taps.device, taps.dtype)


class Gaussians(DiagonalOperator, nn.Module):
    """A Gaussian blur for each sample, with unknown surroundings; d has zeros where nothing was measured.

    Attributes:
        measured: 1 where d is measured, else 0, (B, 1, SIDE, SIDE).
        scored: 1 where the loss counts, else 0.
        power: |a|² of each sample's blur, (B, 64, 64).
    """

    def __init__(self, pairs: Sequence[tuple[Axis, Axis]]) -> None:
        super().__init__()
        (self.b_y, self.b_x), (self.v_y, self.v_x), (s_y, s_x) = (
            [torch.stack([getattr(pair[axis], name) for pair in pairs])[:, None] for axis in (0, 1)]
            for name in ("matrix", "v", "s")
        )
        self.squares = s_y.mT.square().mT[..., :, None] * s_x[..., None, :].square()
        self.power = torch.stack([torch.outer(y.power, x.power) for y, x in pairs])
        self.measured = torch.zeros(len(pairs), 1, SIDE, SIDE)
        for i, (y, x) in enumerate(pairs):
            self.measured[i, :, y.radius : SIDE - y.radius, x.radius : SIDE - x.radius] = 1
        self.scored = self.measured

    def forward(self, x: Tensor) -> Tensor:
        return self.b_y @ x @ self.b_x.mT

    def adjoint(self, y: Tensor) -> Tensor:
        return self.b_y.mT @ y @ self.b_x

    def normal(self, x: Tensor) -> Tensor:
        return self.adjoint(self(x))

    def eigenvalues(self, like: Tensor) -> Tensor:
        return self.squares

    def coefficients(self, x: Tensor) -> Tensor:
        return self.v_y.mT @ x @ self.v_x

    def image(self, coefficients: Tensor) -> Tensor:
        return self.v_y @ coefficients @ self.v_x.mT


class Circular(DiagonalOperator, nn.Module):
    """A point spread function for each sample, by FFT; the loss leaves out the border, where the image wraps around."""

    def __init__(self, psfs: Sequence[Tensor]) -> None:
        super().__init__()
        self.measured = torch.ones(len(psfs), 1, SIDE, SIDE)
        self.scored = torch.zeros_like(self.measured)
        kernels = torch.zeros(len(psfs), 1, SIDE, SIDE, dtype=torch.float64)
        for i, psf in enumerate(psfs):
            r = min(max(psf.shape) // 2 + 1, 14)
            self.scored[i, :, r : SIDE - r, r : SIDE - r] = 1
            kernels[i, 0, : psf.shape[0], : psf.shape[1]] = psf
            kernels[i, 0] = kernels[i, 0].roll((-(psf.shape[0] // 2), -(psf.shape[1] // 2)), (0, 1))
        self.power = torch.fft.fft2(kernels[:, 0]).abs().square()
        self.gain = torch.fft.rfft2(kernels.float())
        self.squares = self.gain.abs().square()

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

    def coefficients(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x)

    def image(self, coefficients: Tensor) -> Tensor:
        return torch.fft.irfft2(coefficients, s=(SIDE, SIDE))


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


class Measurements:
    """Random crops of photographs, random blurs and random noise levels."""

    def __init__(self, photographs: Photographs, seed: int, gaussians_only: bool = False) -> None:
        self.photographs, self.random = photographs, np.random.default_rng(seed)
        self.gaussians_only = gaussians_only
        areas = np.array([height * width for height, width in photographs.sizes], float)
        self.share = areas / areas.sum()
        self.sigmas = np.geomspace(0.3, 5, 240)
        self.axes = [Axis(sigma) for sigma in self.sigmas]

    def image(self) -> Tensor:
        """An image on [−1, 1]: a crop in nine of ten; one in twenty is flat areas, and one in twenty is a grey crop."""
        kind = self.random.random()
        if kind < 0.05:
            return self.flat_areas()
        x = self.crop()
        return x.mean(0, keepdim=True).expand_as(x) if kind < 0.1 else x

    def flat_areas(self) -> Tensor:
        """Up to three straight edges between colours, of which about half are black or white in each channel."""
        g = self.random
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        image = torch.zeros(3, SIDE, SIDE)
        for part in range(int(g.integers(1, 5))):
            colour = torch.from_numpy((3 * g.random(3) - 1.5).clip(-1, 1)).float()
            if g.random() < 0.3:
                colour = colour[:1].expand(3)
            angle, offset = g.uniform(0, 2 * math.pi), g.uniform(0, SIDE)
            beyond = (math.cos(angle) * (x - SIDE / 2) + math.sin(angle) * (y - SIDE / 2) > offset - SIDE / 2) | (
                part == 0
            )
            image[:, beyond] = colour[:, None]
        return image

    def crop(self) -> Tensor:
        """A crop on [−1, 1]: half are shrunk by up to two, half are mirrored or turned, and 15% are linear light."""
        g = self.random
        photograph = self.photographs[int(g.choice(len(self.photographs), p=self.share))]
        if photograph.dtype != torch.uint8:  # of more than 8 bits
            photograph = 255 * photograph
        side = SIDE if g.random() < 0.5 else round(SIDE * g.uniform(1, 2))
        top, left = (int(g.integers(n - side + 1)) for n in photograph.shape[1:])
        x = photograph[None, :, top : top + side, left : left + side].float()
        if side != SIDE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True).round()
        x = x.flip(-1) if g.random() < 0.5 else x
        x = x.mT if g.random() < 0.5 else x
        x = x[0] / 127.5 - 1
        return to_linear(x) if g.random() < 0.15 else x

    def axis(self) -> Axis:
        sigma = math.exp(self.random.uniform(math.log(0.3), math.log(5)))
        return self.axes[int(np.abs(np.log(self.sigmas / sigma)).argmin())]

    def psf(self) -> Tensor:
        """A random point spread function; one in ten is the convolution of two of the others."""
        g = self.random
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
            p, q = self.psf(), self.psf()
            size = [a + b - 1 for a, b in zip(p.shape, q.shape, strict=True)]
            if max(size) <= 33:
                both = torch.fft.irfft2(torch.fft.rfft2(p, s=size) * torch.fft.rfft2(q, s=size), s=size).clamp_min(0)
                return both / both.sum()

    def operator(self, count: int, step: int) -> Gaussians | Circular:
        """Gaussians with unknown surroundings in three steps of five, and any point spread functions in the others."""
        if step % 5 >= 3 and not self.gaussians_only:
            return Circular([self.psf() for _ in range(count)])
        pairs = []
        for _ in range(count):
            axis = self.axis()
            pairs.append((axis, axis if self.random.random() < 0.7 else self.axis()))
        return Gaussians(pairs)

    def noise(self, count: int) -> np.ndarray:
        """Random noise levels: most below 0.1 and rather low, one in twelve to 0.2, one in twelve to 0.002."""
        g = self.random
        kind, share = g.random(count), g.random(count)
        return np.select([kind < 1 / 12, kind < 1 / 6], [0.002 * share, 0.1 + 0.1 * share], 0.1 * share**2)

    def measure(self, x: Tensor, blur: Gaussians | Circular) -> tuple[Tensor, Tensor]:
        """The measurements d of x, and the noise levels (B,); one in twelve is compressed as JPEG."""
        noise = torch.from_numpy(self.noise(len(x))).float()
        white = torch.randn_like(x)
        grey = (x == x[:, :1]).flatten(1).all(1)
        white[grey] = white[grey, :1]  # a grey photograph has the same noise in its three channels
        d = (blur(x) + noise.view(-1, 1, 1, 1) * white) * blur.measured
        for i in np.flatnonzero(self.random.random(len(x)) < 0.08):
            rows, columns = (torch.nonzero(blur.measured[i, 0].amax(dim))[:, 0] for dim in (1, 0))
            part = d[i, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # a view into d
            compressed = self.compressed(part)
            noise[i] = (noise[i] ** 2 + F.mse_loss(compressed, part)).sqrt().clamp_max(LARGEST_NOISE)
            part.copy_(compressed)
        return d, noise

    def compressed(self, d: Tensor) -> Tensor:
        grey_levels = ((d + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        quality, subsampling = int(self.random.integers(75, 99)), int(self.random.choice([0, 2]))
        Image.fromarray(grey_levels).save(file, "JPEG", quality=quality, subsampling=subsampling)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 127.5 - 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path, help="directory of photographs")
    parser.add_argument("out", type=Path, help="file of the trained network")
    parser.add_argument("--held-out", type=int, default=15, help="photographs, the last by name, to leave out")
    parser.add_argument("--init", help="a shipped network or a file to start from (default: random weights)")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of processor time, after which training ends")
    parser.add_argument("--gaussians-only", action="store_true", help="train on no other kind of blur")
    parser.add_argument("--evaluations", type=int, default=1, help="of the layer in a solve, before the last one")
    parser.add_argument("--later", type=int, help="the same in the second half of the steps (default: as many)")
    parser.add_argument("--decay", type=float, default=0.75, help="share of the steps in which the rate falls to 0")
    parser.add_argument("--penalty", type=float, default=2e-3, help="weight of the Jacobian penalty; 0 for none")
    parser.add_argument("--gradient", default="jfb", help="as in jfbfast train, for example unrolled:steps=4")
    parser.add_argument("--features", type=int, nargs="+", default=[96, 128, 192])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of Muon")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(given: argparse.Namespace) -> None:
    jfbfast.keep_freed_memory()
    torch.manual_seed(given.seed)
    files = sorted(file for file in given.photographs.rglob("*") if file.suffix.lower() in SUFFIXES)
    photographs = Photographs(
        files[: len(files) - given.held_out], least=2 * SIDE, purpose="a crop that is shrunk by two"
    )
    measurements = Measurements(photographs, given.seed + 1, given.gaussians_only)

    denoiser = {"kind": "UNet", "channels": 3, "features": given.features, "blocks": [2] * len(given.features)}
    denoiser |= {"conditions": 3, "injection": 13}
    config = ModelConfig(
        form="universal",
        denoiser=denoiser,
        padding_mode="valid",
        noise_range=[0.0, LARGEST_NOISE],
        gradient=parse_kind("gradient", given.gradient),
    )
    model = jfbfast.UniversalDEGrad.from_pretrained(given.init).train() if given.init else config.model()
    average = copy.deepcopy(model)  # exponential moving average of the weights
    optimizer = Muon(model, learning_rate=given.rate)
    rates = [group["lr"] for group in optimizer.param_groups]

    started, step, done = time.process_time(), 0, 0.0
    while done < 1:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 100, (1 - done) / given.decay)
        count = given.evaluations if done < 0.5 else given.later or given.evaluations
        model.solver = jfbfast.Picard(tol=1e-3, max_iter=count)

        x = torch.stack([measurements.image() for _ in range(given.batch)])
        blur = measurements.operator(given.batch, step)
        d, noise = measurements.measure(x, blur)
        model.blur = blur
        model.regularizer.condition = describe(blur.power, noise.double())
        error = ((model(d) - x).square() * blur.scored).sum((1, 2, 3)) / (3 * blur.scored.sum((1, 2, 3)))
        loss = (error * (5e-4 / (error.detach() + 1e-5))).mean()  # its gradient is that of the error in dB
        if given.penalty and step % PENALTY_INTERVAL == 0:  # so that the layer contracts
            penalty = jfbfast.jacobian_penalty(model, d, x=model.solution.value, bound=0.5, iterations=2)
            loss = loss + given.penalty * PENALTY_INTERVAL * penalty
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - min(0.998, (1 + step) / (10 + step)))
        step += 1
        seconds = time.process_time() - started
        done = max(step / given.steps, seconds / (60 * given.minutes))
        if step % 20 == 0 or done >= 1:
            decibels = float((10 * torch.log10(4 / error.detach())).mean())
            print(f"step {step}, {seconds:.0f} s: {decibels:.2f} dB", flush=True)
        if step % 500 == 0 or done >= 1:
            average.set_measurement(config.blur(), config.noise)
            save_checkpoint(given.out, average, config, half=True)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore", jfbfast.ConvergenceWarning)  # training solves with few evaluations
    main(arguments())
