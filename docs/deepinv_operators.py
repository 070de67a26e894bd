"""Make the table of docs/deepinv.md: a fixed point against one pass of a network, on operators not trained on.

python docs/deepinv_operators.py PHOTOGRAPHS [--seconds 50]

PHOTOGRAPHS is a directory of JPEGs; the last 32 by name are for the test. Both networks of an operator train for equal
processor time, on the same images and one kind of measurement.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import deepinv
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import jfbfast

TRAIN, TEST, NOISE, BATCH = 64, 128, 0.01, 8
physics, generators = deepinv.physics, deepinv.physics.generator
Physics = Callable[[int, int], physics.LinearPhysics]  # of a batch and the side of its images


def inpainting(kept: float) -> Physics:
    return lambda batch, n: physics.Inpainting((1, n, n), mask=(torch.rand(batch, 1, n, n) < kept).float())


def holes(side: int) -> Physics:
    """Half the squares of a grid are missing."""

    def make(batch: int, n: int) -> physics.LinearPhysics:
        mask = (torch.rand(batch, 1, n // side, n // side) < 0.5).float()
        return physics.Inpainting((1, n, n), mask=F.interpolate(mask, scale_factor=side))

    return make


def downsampling(factor: int, kernel: str) -> Physics:
    return lambda batch, n: physics.Downsampling((1, n, n), filter=kernel, factor=factor)


def mri(generator: type, acceleration: int) -> Physics:
    def make(batch: int, n: int) -> physics.LinearPhysics:
        mask = generator((2, n, n), acceleration=acceleration).step(batch)["mask"]
        return physics.MRI(mask=mask, img_size=(2, n, n))

    return make


# Of each kind, the measurement that is trained on, and then those that are not.
KINDS: dict[str, tuple[int, dict[str, Physics]]] = {
    "inpainting": (
        1,
        {"50% kept": inpainting(0.5), "30%": inpainting(0.3), "15%": inpainting(0.15), "holes of 4 × 4": holes(4)},
    ),
    "downsampling": (
        1,
        {
            f"{factor} ×, {kernel}": downsampling(factor, kernel)
            for kernel in ("gaussian", "bicubic")
            for factor in (2, 4)
        },
    ),
    "MRI": (
        2,
        {
            "Gaussian, 4 ×": mri(generators.GaussianMaskGenerator, 4),
            "8 ×": mri(generators.GaussianMaskGenerator, 8),
            "uniform, 4 ×": mri(generators.RandomMaskGenerator, 4),
            "equispaced, 4 ×": mri(generators.EquispacedMaskGenerator, 4),
        },
    ),
}


class OnePass(nn.Module):
    """D((AᵀA + λI)⁻¹Aᵀy): the network applied once, to Tikhonov's restoration."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.log_weight = denoiser, nn.Parameter(torch.tensor(0.05).log())

    def forward(self, y: Tensor, operator: physics.LinearPhysics) -> Tensor:
        solver = jfbfast.IterativeOperator(operator)
        return self.denoiser(solver.solve(solver.adjoint(y), self.log_weight.exp()))


def network(arm: str, channels: int) -> nn.Module:
    denoiser = jfbfast.UNet(channels, features=(16, 32, 64), blocks=(1, 1, 1), injection=arm == "fixed point")
    if arm == "one pass":
        return OnePass(denoiser)
    red = jfbfast.RED(denoiser, filter_damping="weight")
    return jfbfast.DEGrad(None, red, preconditioner="exact", solver=jfbfast.Anderson(tol=1e-2, max_iter=15))


def measured(images: Tensor, channels: int, make: Physics) -> tuple[Tensor, Tensor, physics.LinearPhysics]:
    """The images with their channels (the imaginary part is zero), their measurements, and the operator."""
    x = torch.cat([images, torch.zeros_like(images)], 1)[:, :channels]
    operator = make(len(x), x.shape[-1])
    y = operator.A(x)
    noise = NOISE * torch.randn_like(y)
    return x, y + (operator.A(operator.A_adjoint(noise)) if channels == 2 else noise), operator  # no noise off a mask


def train(model: nn.Module, photographs: list[Tensor], channels: int, make: Physics, seconds: float) -> int:
    torch.manual_seed(0)
    optimizer, start, steps = torch.optim.Adam(model.parameters(), lr=1e-3), time.process_time(), 0
    while (spent := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.5 + 0.5 * math.cos(math.pi * spent))
        batch = []
        for i in torch.randint(len(photographs), (BATCH,)):
            top, left = (int(torch.randint(n - TRAIN + 1, ())) for n in photographs[i].shape[-2:])
            batch.append(photographs[i][:, top : top + TRAIN, left : left + TRAIN])
        x, y, operator = measured(torch.stack(batch), channels, make)
        optimizer.zero_grad()
        F.mse_loss(model(y, operator), x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


@torch.no_grad()
def quality(model: nn.Module, images: Tensor, channels: int, make: Physics) -> Tensor:
    """PSNR of each image, on the same measurements for every model."""
    torch.manual_seed(1)
    x, y, operator = measured(images, channels, make)
    return -10 * (model.eval()(y, operator) - x)[:, :1].square().mean((1, 2, 3)).log10()


def grey(path: Path) -> Tensor:
    with Image.open(path) as image:
        scale = 256 / min(image.size)
        small = image.convert("L").resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(1, small.height, small.width) / 255


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--seconds", type=float, default=50)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", jfbfast.ConvergenceWarning)
    photographs = [grey(path) for path in sorted(arguments.photographs.glob("*.jpg"))]
    held = min(32, len(photographs) // 2)
    images = torch.stack([photograph[:, 64 : 64 + TEST, 64 : 64 + TEST] for photograph in photographs[-held:]])
    print("| operator | fixed point | one pass | difference |\n| --- | --- | --- | --- |")
    for kind, (channels, settings) in KINDS.items():
        models, steps = {}, []
        for arm in ("fixed point", "one pass"):
            torch.manual_seed(0)
            models[arm] = network(arm, channels)
            trained = next(iter(settings.values()))
            steps.append(train(models[arm], photographs[:-held], channels, trained, arguments.seconds))
        print(f"| **{kind}** | {steps[0]} steps | {steps[1]} steps | |", flush=True)
        for name, make in settings.items():
            fixed, once = (quality(model, images, channels, make) for model in models.values())
            difference = fixed - once
            error = 1.96 * float(difference.std()) / math.sqrt(held)
            told = f"{fixed.mean():.2f} | {once.mean():.2f} | {difference.mean():+.2f} ± {error:.2f}"
            print(f"| {name} | {told} |", flush=True)


if __name__ == "__main__":
    main()
