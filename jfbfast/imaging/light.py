"""Linear light and encoded values: the transfer function of sRGB (IEC 61966-2-1), both ways.

A camera's optics blur linear light, which counts photons. Files hold encoded values, which are about even steps for the
eye. Both are given on [−1, 1] here: −1 is black and 1 is white.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIGHTS = ("linear", "encoded")

_OFFSET, _GAMMA, _SLOPE = 0.055, 2.4, 12.92
_ENCODED_KNEE, _LINEAR_KNEE = 0.04045, 0.0031308


def to_linear(x: Tensor) -> Tensor:
    """Turn encoded values into linear light.

    Values above white go on by the same formula. Values below black are extended by oddness about black, so that the
    function stays increasing and `to_encoded` is its inverse everywhere.

    Args:
        x: any shape, on [−1, 1].

    Example:
        >>> import torch
        >>> from jfbfast.imaging.light import to_encoded, to_linear
        >>> x = torch.tensor([-1.1, -1.0, 0.0, 1.0, 1.2], dtype=torch.float64)
        >>> to_linear(x).mul(1000).round().tolist()
        [-1008.0, -1000.0, -572.0, 1000.0, 1486.0]
        >>> torch.allclose(to_encoded(to_linear(x)), x, atol=1e-6)
        True
    """
    value = (x + 1) / 2
    size = value.abs()
    curve = ((size.clamp_min(_ENCODED_KNEE) + _OFFSET) / (1 + _OFFSET)) ** _GAMMA
    return 2 * value.sign() * torch.where(size <= _ENCODED_KNEE, size / _SLOPE, curve) - 1


def to_encoded(x: Tensor) -> Tensor:
    """Turn linear light into encoded values: the inverse of `to_linear`, up to the 1e-7 that sRGB's constants leave.

    Args:
        x: any shape, on [−1, 1]; values beyond are extended as in `to_linear`.

    Example:
        >>> import torch
        >>> from jfbfast.imaging.light import to_encoded
        >>> to_encoded(torch.tensor([-1.0, 0.0, 1.0])).mul(100).round().tolist()  # half of the light looks bright
        [-100.0, 47.0, 100.0]
    """
    value = (x + 1) / 2
    size = value.abs()
    curve = (1 + _OFFSET) * size.clamp_min(_LINEAR_KNEE) ** (1 / _GAMMA) - _OFFSET
    return 2 * value.sign() * torch.where(size <= _LINEAR_KNEE, size * _SLOPE, curve) - 1


def linear_noise(d: Tensor, noise: float) -> float:
    """The noise level in linear light that white noise of encoded values becomes: ν times the mean slope.

    In linear light the noise depends on brightness: it is ν · d linear/d encoded, which goes from 0.08 ν in black to
    2.3 ν in white. This is its root mean square over the image.

    Args:
        d: encoded values on [−1, 1], any shape.
        noise: ν ≥ 0, the standard deviation of the noise of d.

    Example:
        >>> import torch
        >>> from jfbfast.imaging.light import linear_noise
        >>> [round(linear_noise(torch.full((3, 8, 8), value), 0.01), 4) for value in (-1.0, 0.0, 1.0)]
        [0.0008, 0.0093, 0.0227]
    """
    value = ((d + 1) / 2).clamp(0, 1)
    curve = _GAMMA / (1 + _OFFSET) * ((value + _OFFSET) / (1 + _OFFSET)) ** (_GAMMA - 1)
    slope = torch.where(value <= _ENCODED_KNEE, torch.full_like(value, 1 / _SLOPE), curve)
    return noise * float(slope.square().mean().sqrt())
