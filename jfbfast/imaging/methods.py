"""Tikhonov regularisation of the tiles of a photograph, and the extension of a photograph beyond its edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast.imaging.blurs import AnyBlur
from jfbfast.imaging.classical import tikhonov

EXTENSIONS: dict[str, Any] = {"replicate": "edge", "reflect": "reflect", "circular": "wrap"}  # modes of numpy.pad
ALIGNMENT = 16  # pixels; extensions are multiples of it


def extension_width(blur: AnyBlur) -> int:
    """By how many pixels a photograph is extended: 24 more than the blur's kernel, rounded up.

    Wider extensions changed the border by less than 0.05 dB.
    """
    return -(-(24 + max(blur.kernel_size)) // ALIGNMENT) * ALIGNMENT


def extend(d: Tensor, width: int, padding_mode: str) -> Tensor:
    """Extend an image (C, H, W) by ``width`` pixels on every side, as the padding mode continues it."""
    sides = ((0, 0), (width, width), (width, width))
    return torch.from_numpy(np.pad(d.numpy(), sides, mode=EXTENSIONS[padding_mode]))


class Tikhonov:
    """Tikhonov regularisation about a smooth image c: x = c + (AᵀA + λI)⁻¹Aᵀ(d − A c).

    c is the measurement, continued by its edge pixels, and blurred once more. So x stays close to what is known where d
    says little, as beyond its edges: about a constant, 10 pixels along the border were 1 to 1.7 dB worse.

    Args:
        blur: A.
        smooth: A with padding_mode="valid".
        damping: λ > 0.
    """

    def __init__(self, blur: AnyBlur, smooth: AnyBlur, damping: float) -> None:
        self.blur, self.smooth, self.damping = blur, smooth, damping

    def __call__(self, d: Tensor, start: Tensor | None = None) -> Tensor:
        """Restore a measurement (1, C, h, w); ``start`` is not used."""
        (y, x), (r_y, r_x) = self.blur.margin, self.smooth.margin
        height, width = d.shape[-2] + 2 * y, d.shape[-1] + 2 * x
        unit = self.blur(d.new_ones(1, 1, height, width)).clamp_min(1e-3)  # A1 is below 1 if A sees zeros beyond edges
        sides = (r_x + x, r_x + x, r_y + y, r_y + y)
        about = self.smooth(F.pad(d / unit, sides, mode="replicate"))
        return about + tikhonov(self.blur, d - self.blur(about), self.damping)
