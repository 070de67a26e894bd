"""The measurement d = A x + ν ε of images x in [−1, 1], and the quality of a restoration: PSNR and SSIM."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jfbfast.operators.frame import cut_to

RANGE = 2.0  # of images in [−1, 1]; PSNR and SSIM are taken at it
LEAST_SIDE = 6  # pixels of an image for SSIM
PAPER_OFFSET = 20 * math.log10(RANGE)  # dB by which PSNR is lower with peak 1 on [−1, 1], as in the paper's code


def measure(x: Tensor, blur: Callable[[Tensor], Tensor], noise: float, white: Tensor) -> Tensor:
    """Return d = A x + ν ε.

    Args:
        x: images (…, H, W).
        blur: A.
        noise: ν ≥ 0, in x's units.
        white: ε, white noise of standard deviation 1, like x. If A x is smaller, with the padding mode "valid", the
            part within its frame is used.
    """
    blurred = blur(x)
    return blurred + noise * cut_to(white, blurred)


def decibels(error: Tensor) -> Tensor:
    """Turn mean squared errors e of images in [−1, 1] into PSNR in dB at the true range 2: 10 log₁₀(4/e)."""
    return 10 * torch.log10(RANGE**2 / error)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the PSNR in dB of each image (B, …) in [−1, 1], at the true range 2, unclipped: (B,).

    Example:
        >>> import torch
        >>> from jfbfast.imaging.quality import psnr
        >>> x = torch.zeros(2, 3, 8, 8)
        >>> [round(value, 1) for value in psnr(x + 0.02, x).tolist()]
        [40.0, 40.0]
    """
    return decibels((images - truth).square().flatten(1).mean(1))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the SSIM of each image (B, C, H, W) in [−1, 1], at the true range 2, with reflected borders: (B,).

    NaN if a side is below `LEAST_SIDE`, which is too short to be reflected for the window of 11 pixels.

    Example:
        >>> import torch
        >>> from jfbfast.imaging.quality import ssim
        >>> x = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
        >>> ssim(x, x).tolist()
        [1.0]
    """
    if min(images.shape[-2:]) < LEAST_SIDE:
        return images.new_full((len(images),), math.nan)
    from torchmetrics.functional.image import structural_similarity_index_measure  # the core does not need torchmetrics

    found = structural_similarity_index_measure(images, truth, data_range=RANGE, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(-1)
