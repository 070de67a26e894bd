"""What a camera does to a blurred scene: it encodes the light, and clips what is too bright or too dark.

Restorations are made for a measurement d = A x + noise of encoded values. A camera measures d = F(x) + noise, where F
blurs linear light and encodes it again. The measurement that A alone would have made of the scene is d + A x − F(x). It
depends on x, so it is found by turns: restore, correct the measurement, restore again.

So the noise stays as white as it is in the file, and networks see encoded values, as in training. A restoration in
linear light would amplify its errors in the shadows when it is encoded again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast.imaging.blurs import AnyBlur
from jfbfast.imaging.light import to_encoded, to_linear

WHITEST, BLACKEST = 2 * 253.5 / 255 - 1, 2 * 1.5 / 255 - 1  # from 254 and up to 1 of 255, a value may be clipped
CLIPPED_SHARE = 1e-3  # of the values; so few clipped ones are trusted
ROUGH_TURNS = 2  # before a network, 1 was 0.3 dB less where much is clipped, and 3 gained nothing
TURNS = 3  # of a network: 1 was 0.4 dB less, 2 was 0.2 dB less

Solve = Callable[[Tensor, Tensor | None], Tensor]  # a measurement (1, C, h, w), and a first x or None, to the scene x


class Camera(NamedTuple):
    """F: a blur, in linear light or of encoded values.

    Attributes:
        blur: A, from the scene x (…, H, W) to the measurement, (…, H − 2r_y, W − 2r_x) for the margins r.
        light: "linear" or "encoded", what A blurs.
    """

    blur: AnyBlur
    light: str

    def record(self, x: Tensor) -> Tensor:
        """F(x), in encoded values."""
        return to_encoded(self.blur(to_linear(x))) if self.light == "linear" else self.blur(x)

    def corrected(self, d: Tensor, x: Tensor) -> Tensor:
        """The measurement that A would have made of x where the camera made d: d + A x − F(x).

        A clipped value of d says only that the scene was at least so bright, or so dark. Where it is and F(x) lies
        beyond it, x explains d, and the corrected measurement is A x.
        """
        blurred, recorded = self.blur(x), self.record(x)
        beyond = ((d >= WHITEST) & (recorded > d)) | ((d <= BLACKEST) & (recorded < d))
        return torch.where(beyond, blurred, d + blurred - recorded)

    def restore(self, d: Tensor, first: Callable[[Tensor], Tensor], rough: Solve, solve: Solve | None) -> Tensor:
        """Find the scene x by turns.

        Args:
            d: the measurement, (1, C, h, w).
            first: from d to a first x.
            rough: a cheap method, which restores `ROUGH_TURNS` times.
            solve: the method, which then restores `TURNS` times, each time from the last x; None if it is ``rough``.
        """
        x = first(d)
        for _ in range(ROUGH_TURNS):
            x = rough(self.corrected(d, x), None)
        for _ in range(TURNS if solve is not None else 0):
            assert solve is not None
            x = solve(self.corrected(d, x), x)
        return x


def clipped(d: Tensor) -> Tensor:
    """Which values of d may be clipped, at black or at white."""
    return (d >= WHITEST) | (d <= BLACKEST)
