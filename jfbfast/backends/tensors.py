"""Shapes, dtypes and devices, for every room."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for tensors of ``dtype``: float32 for half precision, otherwise ``dtype`` itself."""
    return dtype if dtype == torch.float64 else torch.float32


def flat(x: Tensor) -> Tensor:
    """Samples (B, …) as rows (B, N), including scalar and empty samples."""
    return x.reshape(len(x), x.shape[1:].numel())


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, …, 1), which broadcasts against ``like`` (B, …)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def margin(x: Tensor, d: Tensor) -> tuple[int, int]:
    """How many pixels images x have beyond the frame of d on each side, (y, x)."""
    return (x.shape[-2] - d.shape[-2]) // 2, (x.shape[-1] - d.shape[-1]) // 2


def padded(d: Tensor, margin: tuple[int, int]) -> Tensor:
    """Return d (…, h, w) with a margin (y, x) of zeros on each side, (…, h + 2y, w + 2x); d itself if it is (0, 0)."""
    y, x = margin
    return F.pad(d, (x, x, y, y)) if y or x else d


def usable_device(name: str) -> torch.device:
    """The device of that name; ValueError if torch cannot use it."""
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name}; it takes cpu or cuda")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA raises the latter
        raise ValueError(f"--device is {name}; it takes cpu or cuda ({str(error).splitlines()[0]})") from error
