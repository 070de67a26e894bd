"""The measurement d = A x + ν ε of images x in [−1, 1], and how near to x a restoration comes: PSNR and SSIM."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

RANGE = 2.0  # of images in [−1, 1], which PSNR and SSIM are taken at
LEAST_SIDE = 6  # pixels of an image that SSIM is taken of
PAPER_OFFSET = 20 * math.log10(RANGE)  # dB that PSNR reads lower with peak 1 on [−1, 1], as in the paper's code


def measure(x: Tensor, blur: Callable[[Tensor], Tensor], noise: float, white: Tensor) -> Tensor:
    """d = A x + ν ε.

    Args:
        x: images (…, H, W).
        blur: A.
        noise: ν ≥ 0, in x's units.
        white: ε, white noise of standard deviation 1, as x.
    """
    return blur(x) + noise * white


def decibels(error: Tensor) -> Tensor:
    """10 log₁₀(4/e) of mean squared errors e of images in [−1, 1]: their PSNR in dB at the true range, 2."""
    return 10 * torch.log10(RANGE**2 / error)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB of each image (B, …) in [−1, 1], at the true range 2, unclipped: (B,)."""
    return decibels((images - truth).square().flatten(1).mean(1))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """SSIM of each image (B, C, H, W) in [−1, 1], at the true range 2, over all of it by reflection: (B,).

    NaN where a side is below `LEAST_SIDE`, which its window of 11 cannot be reflected at.
    """
    if min(images.shape[-2:]) < LEAST_SIDE:
        return images.new_full((len(images),), math.nan)
    from torchmetrics.functional.image import structural_similarity_index_measure  # the core does without

    found = structural_similarity_index_measure(images, truth, data_range=RANGE, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(-1)
