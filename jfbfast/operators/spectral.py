"""A convolution with any point spread function, and its adjoint, by FFT on a torus.

A x is part of the circular convolution C of an image that lies on a torus (of period N_y × N_x):

| padding mode | what lies on the torus | N at least |
| --- | --- | --- |
| circular | x | H, and exactly that |
| zeros | x, with zeros around it | H + r |
| valid | x, whose surroundings are not used | H |
| reflect, replicate | x, extended by r pixels on each side | H + 2r |
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast.backends.graphs import cached_tensors
from jfbfast.backends.tensors import compute_dtype

Size = tuple[int, int]
_EXTENDED = ("reflect", "replicate")


class Kernel(NamedTuple):
    """A point spread function of ``size`` (k_y, k_x), as the bytes of its float64 values, and the padding mode."""

    values: bytes
    size: Size
    padding_mode: str

    @property
    def radius(self) -> Size:
        return self.size[0] // 2, self.size[1] // 2

    @property
    def margin(self) -> Size:
        """How many pixels x has beyond A x on each side."""
        return self.radius if self.padding_mode == "valid" else (0, 0)

    def tensor(self) -> Tensor:
        return torch.frombuffer(bytearray(self.values), dtype=torch.float64).view(self.size)


def convolve(x: Tensor, kernel: Kernel) -> Tensor:
    """A x for x (…, H, W); no gradient is recorded."""
    (m_y, m_x), (r_y, r_x), (height, width) = kernel.margin, kernel.radius, x.shape[-2:]
    torus = torus_of(kernel, (height, width))
    wide = x.detach().to(compute_dtype(x.dtype))
    if kernel.padding_mode in _EXTENDED:
        planes = F.pad(wide.reshape(-1, 1, height, width), (r_x, r_x, r_y, r_y), mode=kernel.padding_mode)
        wide = planes.view(*x.shape[:-2], height + 2 * r_y, width + 2 * r_x)
    out = _filtered(wide, transfer(kernel, torus, wide.dtype, x.device), torus)
    return out[..., : height - 2 * m_y, : width - 2 * m_x].to(x.dtype).contiguous()


def correlate(y: Tensor, kernel: Kernel) -> Tensor:
    """Aᵀ y for y of the shape of A x; no gradient is recorded."""
    (m_y, m_x), (r_y, r_x) = kernel.margin, kernel.radius
    height, width = y.shape[-2] + 2 * m_y, y.shape[-1] + 2 * m_x
    torus = torus_of(kernel, (height, width))
    wide = y.detach().to(compute_dtype(y.dtype))
    out = _filtered(wide, transfer(kernel, torus, wide.dtype, y.device).conj(), torus)
    if kernel.padding_mode in _EXTENDED:
        out = out[..., : height + 2 * r_y, : width + 2 * r_x]
        out = _fold(_fold(out, r_y, kernel.padding_mode, -2), r_x, kernel.padding_mode, -1)
    return out[..., :height, :width].to(y.dtype).contiguous()


def _filtered(x: Tensor, spectrum: Tensor, torus: Size) -> Tensor:
    if not x.numel():  # which MKL refuses
        return x.new_empty((*x.shape[:-2], *torus))
    return torch.fft.irfft2(torch.fft.rfft2(x, s=torus) * spectrum, s=torus)


def _fold(x: Tensor, radius: int, padding_mode: str, dim: int) -> Tensor:
    """The adjoint of an extension by ``radius`` pixels along ``dim``: add each pixel of the margin to its source."""
    n = x.shape[dim] - 2 * radius
    out = x.narrow(dim, radius, n).clone()
    before, after = x.narrow(dim, 0, radius), x.narrow(dim, radius + n, radius)
    if padding_mode == "reflect":
        out.narrow(dim, 1, radius).add_(before.flip(dim))
        out.narrow(dim, n - 1 - radius, radius).add_(after.flip(dim))
    else:
        out.narrow(dim, 0, 1).add_(before.sum(dim, keepdim=True))
        out.narrow(dim, n - 1, 1).add_(after.sum(dim, keepdim=True))
    return out


@lru_cache(maxsize=1024)
def fast_size(least: int) -> int:
    """The smallest even number from ``least`` on without a prime factor over 7; FFTs of other sizes can be slow."""
    n = least + least % 2
    while True:
        rest = n
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n
        n += 2


def torus_of(kernel: Kernel, shape: Size) -> Size:
    """The period of the torus for images of this shape."""
    if kernel.padding_mode == "circular":
        return shape
    beyond = {"zeros": 1, "valid": 0}.get(kernel.padding_mode, 2)
    h, w = (fast_size(n + beyond * r) for n, r in zip(shape, kernel.radius, strict=True))
    return h, w


@cached_tensors(maxsize=64)
def transfer(kernel: Kernel, torus: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """C's spectrum ĥ on the torus, (N_y, N_x // 2 + 1), such that A x begins at pixel (0, 0) of C's output."""
    with torch.inference_mode(False), torch.no_grad():
        placed = torch.zeros(torus, dtype=torch.float64)
        placed[: kernel.size[0], : kernel.size[1]] = kernel.tensor()
        steps = 1 if kernel.padding_mode in ("circular", "zeros") else 2
        placed = placed.roll((-steps * kernel.radius[0], -steps * kernel.radius[1]), (0, 1))
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.fft.rfft2(placed).to(device, complex_dtype)


@cached_tensors(maxsize=64)
def power(kernel: Kernel, torus: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """|ĥ|², (N_y, N_x // 2 + 1)."""
    with torch.inference_mode(False), torch.no_grad():
        return transfer(kernel, torus, torch.float64, torch.device("cpu")).abs().square().to(device, dtype)
