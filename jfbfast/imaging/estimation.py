"""Estimate a photograph's Gaussian blur and noise level from its power spectra and its edges."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast.models.pretrained import WEIGHTS
from jfbfast.operators.blur import GaussianBlur

PATCH = 64  # pixels of a side
PATCHES = 400  # of a photograph, about; those of a larger one overlap less or leave gaps
CLIPPED = 0.99  # values beyond ±this count as clipped
LEAST_NOISE = 5e-4  # on [−1, 1]; the least that is told apart from none
SMOOTHED = (0.0, 0.7, 1.0, 2.0, 4.0)  # σ of the blurs before the gradients; 0 is none
PAIRS = ((0, 2), (1, 2), (2, 3), (3, 4))  # of these blurs, whose gradients are compared


class Estimate(NamedTuple):
    """What a photograph shows of its blur and noise.

    Attributes:
        sigma: the Gaussian blur's standard deviation in pixels, from 0.3 (none that shows) to about 4.
        noise: the standard deviation of the noise on [−1, 1]. Rounding to 8 bits (0.0023) and JPEG's errors count.
        sigma_range: σ is between these two with a probability of 80%.
        noise_range: the same of the noise.

    Example:
        >>> from jfbfast import Estimate
        >>> Estimate(1.5, 0.01, (1.4, 1.7), (0.009, 0.011)).sigma
        1.5
    """

    sigma: float
    noise: float
    sigma_range: tuple[float, float]
    noise_range: tuple[float, float]


@functools.cache
def _rings() -> tuple[Tensor, Tensor]:
    """The window of a patch (64, 64), and the matrix (64 · 33, 35) that takes the mean power on rings |ω| ≈ constant.

    The rings are one frequency wide up to the Nyquist frequency, and wider in the corners.
    """
    hann = torch.hann_window(PATCH + 2, periodic=False)[1:-1]
    window = hann[:, None] * hann
    y, x = PATCH * torch.fft.fftfreq(PATCH), torch.arange(PATCH // 2 + 1)
    bounds = torch.tensor([*(0.5 + i for i in range(PATCH // 2)), 34.5, 37.5, 41.5, 46.0])
    ring = torch.bucketize(torch.hypot(y[:, None], x), bounds).flatten()  # 0 is the mean
    twice = torch.ones(PATCH, PATCH // 2 + 1)
    twice[:, 1:-1] = 2  # rfft2 leaves out their mirror images
    matrix = F.one_hot(ring, len(bounds))[:, 1:] * twice.flatten()[:, None]
    return window / window.square().sum().sqrt(), matrix / matrix.sum(0)


def _patches(photo: Tensor) -> Tensor:
    """Patches (N, C, 64, 64) on a regular grid, without those that are clipped in large part."""
    step = max(PATCH // 2, math.ceil(math.sqrt(photo.shape[1] * photo.shape[2] / PATCHES)))
    found = photo.unfold(1, PATCH, step).unfold(2, PATCH, step).permute(1, 2, 0, 3, 4).flatten(0, 1)
    kept = (found.abs() > CLIPPED).float().mean((1, 2, 3)) < 0.2
    return found[kept] if kept.sum() >= 4 else found


def _quantiles(values: Tensor, *shares: float) -> Tensor:
    """Of (N, …) over the first axis, as one vector."""
    return values.quantile(torch.tensor(shares), 0).flatten()


def _edges(grey: Tensor) -> list[Tensor]:
    """How the steepest gradients shrink from one blur to the next; an edge of width σ resists blurs below σ."""
    margin, lengths = math.ceil(3 * SMOOTHED[-1]), []
    for sigma in SMOOTHED:
        smooth = grey if sigma == 0 else GaussianBlur(sigma=sigma, padding_mode="valid")(grey[None, None])[0, 0]
        crop = margin - (grey.shape[0] - smooth.shape[0]) // 2
        smooth = smooth[crop : smooth.shape[0] - crop, crop : smooth.shape[1] - crop]
        corner = smooth[:-1, :-1]
        lengths.append(torch.hypot(smooth[1:, :-1] - corner, smooth[:-1, 1:] - corner).flatten())
    found = []
    for fine, coarse in PAIRS:
        steepest, where = lengths[coarse].topk(max(20, lengths[coarse].numel() // 100))
        ratio = (lengths[fine][where] / (steepest + 1e-4) + 1e-4).log()
        found += [_quantiles(ratio, 0.25, 0.5, 0.75, 0.9, 0.97), (steepest.median() + 1e-4).log()[None]]
    return found


def features(photo: Tensor) -> Tensor:
    """Describe a photograph by the numbers that the estimator reads.

    These are quantiles over patches of the log power on each ring of frequencies (Welch, "The use of fast Fourier
    transform for the estimation of power spectra", 1967), and of the same relative to the low frequencies; the
    spectral lines of JPEG's 8 × 8 blocks; the gradients of edges under further blurs (Zhuo and Sim, "Defocus map
    estimation from a single image", 2011); and whether values are clipped or rounded to 8 bits.

    Args:
        photo: (C, H, W) in [−1, 1], float32, both sides at least 64.

    Returns:
        A vector of 416 values.

    Example:
        >>> import torch
        >>> from jfbfast.imaging.estimation import features
        >>> features(torch.rand(3, 80, 100)).shape
        torch.Size([416])
    """
    window, rings = _rings()
    patches = _patches(photo)
    centred = patches - patches.mean((2, 3), keepdim=True)
    power = torch.fft.rfft2(centred * window).abs().square().mean(1)  # of white noise: its variance
    on_rings = (power.flatten(1) @ rings + 1e-7).log()
    axes = torch.cat((power[:, 0], power[:, : PATCH // 2 + 1, 0])).add(1e-7).log().mean(0)
    lines = [axes[k] - (axes[k - 2] + axes[k + 2]) / 2 for k in (8, 16, 24)] + [axes[32] - axes[29:31].mean()]
    levels = (photo + 1) * 127.5
    return torch.cat(
        [
            _quantiles(on_rings, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98),
            _quantiles(on_rings - on_rings[:, 1:4].mean(1, keepdim=True), 0.1, 0.5, 0.9, 0.98),
            torch.stack(lines),
            *_edges(photo.mean(0)),
            (photo.abs() > CLIPPED).float().mean()[None],
            ((levels - levels.round()).abs().max() < 0.01).float()[None],
            torch.tensor([float(len(photo) == 3)]),
        ]
    )


def predict(weights: dict[str, Tensor], read: Tensor, dropout: float = 0.0) -> Tensor:
    """Apply the estimator, which is a few small networks, to features.

    Args:
        weights: ``mean`` and ``scale`` of the features (n,); ``weight0``, ``bias0``, … of the layers, with a first axis
            for the networks.
        read: features, (B, n).
        dropout: share of the hidden values to set to zero, in training.

    Returns:
        Of each network, (networks, B, 2, 3): the 10%, 50% and 90% quantiles of log σ and of log noise.

    Example:
        >>> import torch
        >>> from jfbfast.imaging.estimation import estimator, predict
        >>> predict(estimator(), torch.zeros(2, 416)).shape
        torch.Size([3, 2, 2, 3])
    """
    x = ((read - weights["mean"]) / weights["scale"]).clamp(-5, 5)[None]
    for i in range(3):
        x = x @ weights[f"weight{i}"].mT + weights[f"bias{i}"][:, None]
        x = F.dropout(F.gelu(x), dropout, training=dropout > 0) if i < 2 else x
    low, middle, high = x.unflatten(2, (2, 3)).unbind(3)
    return torch.stack((middle - F.softplus(low), middle, middle + F.softplus(high)), 3)


@functools.cache
def estimator() -> dict[str, Tensor]:
    """The weights that ship with the package, for `predict`.

    Example:
        >>> from jfbfast.imaging.estimation import estimator
        >>> sorted(estimator())
        ['bias0', 'bias1', 'bias2', 'mean', 'scale', 'weight0', 'weight1', 'weight2']
    """
    with np.load(WEIGHTS / "estimator.npz") as file:
        return {name: torch.from_numpy(file[name]).float() for name in file.files}


def _read(path: str | Path) -> Tensor:
    from jfbfast.imaging.photographs import read_photograph  # its packages take long to import

    return 2 * read_photograph(path).pixels - 1


def estimate(photo: Tensor | str | Path) -> Estimate:
    """Estimate the Gaussian blur and the noise level of a photograph, each with a range.

    The estimator was trained on sharp photographs with a known blur and noise: see jfbfast/weights/estimator.md and
    docs/estimating.md. σ is the blur that was added to a sharp photograph, whether it acted on encoded values or in
    linear light. A wide range means that the photograph does not show its blur: a sky, a JPEG of low quality, or
    noise that hides the edges.

    Args:
        photo: (C, H, W) or (1, C, H, W) with 1 or 3 channels, in [−1, 1], both sides at least 64; or an image file.

    Raises:
        ValueError: another shape, integers, values that are not finite or far from [−1, 1].
        ImageError: a file that cannot be read.
        ModuleNotFoundError: for a file, without the extra ``train``.

    Example:
        >>> import torch, jfbfast
        >>> blocks = torch.randn(1, 3, 40, 40).clamp(-1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
        >>> blurred = jfbfast.GaussianBlur(sigma=2.0, padding_mode="valid")(0.8 * blocks)
        >>> found = jfbfast.estimate(blurred + 0.01 * torch.randn_like(blurred))
        >>> 1.5 < found.sigma < 2.5, 0.007 < found.noise < 0.014
        (True, True)
    """
    if isinstance(photo, (str, Path)):
        photo = _read(photo)
    pixels = photo[0] if photo.ndim == 4 and len(photo) == 1 else photo
    if pixels.ndim != 3 or len(pixels) not in (1, 3) or min(pixels.shape[1:]) < PATCH:
        takes = f"one photograph (C, H, W) or (1, C, H, W) with 1 or 3 channels and sides of at least {PATCH}"
        raise ValueError(f"photo has shape {tuple(photo.shape)}; it takes {takes}")
    if not pixels.is_floating_point():
        raise ValueError(f"photo is of {photo.dtype}; it takes floating-point values in [-1, 1]")
    least, most = float(pixels.min()), float(pixels.max())
    if not -2 <= least <= most <= 2:
        raise ValueError(f"photo has values from {least:g} to {most:g}; it takes values in [-1, 1]")
    read = features(pixels.detach().float().cpu())
    found = predict(estimator(), read[None]).mean((0, 1)).exp().tolist()
    (low, sigma, high), (quiet, noise, loud) = found
    return Estimate(sigma, noise, (low, high), (quiet, loud))
