"""The frame of a measurement d within x, which has a margin of (y, x) more pixels on each side."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jfbfast.backends import tensors


def cut(x: Tensor, margin: tuple[int, int]) -> Tensor:
    """Return the part of x (…, H, W) within the frame, (…, H − 2y, W − 2x); x itself without a margin."""
    (y, x_), (height, width) = margin, x.shape[-2:]
    return x[..., y : height - y, x_ : width - x_] if y or x_ else x


def cut_to(x: Tensor, like: Tensor) -> Tensor:
    """Return the part of x within the frame of ``like``, a measurement or an image of its size."""
    return cut(x, tensors.margin(x, like))


def inner_shape(shape: Sequence[int], margin: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a measurement d of images x of ``shape``."""
    return (*shape[:-2], shape[-2] - 2 * margin[0], shape[-1] - 2 * margin[1])
