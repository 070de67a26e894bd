"""A convolution with any point spread function, its adjoint and (AᵀA + λI)⁻¹, by FFT on a torus.

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

from jfbfast.backends.precision import full_precision
from jfbfast.backends.tensors import compute_dtype
from jfbfast.operators.conjugate_gradients import TOLERANCE, conjugate_gradients

Size = tuple[int, int]
_EXTENDED = ("reflect", "replicate")
_ROUGH = 1e-3  # from this tolerance on, float32 is accurate enough for conjugate gradients


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
    shape = (x.shape[-2], x.shape[-1])
    wide = x.detach().to(compute_dtype(x.dtype))
    if kernel.padding_mode in _EXTENDED:
        (r_y, r_x), planes = kernel.radius, wide.reshape(-1, 1, *shape)
        wide = F.pad(planes, (r_x, r_x, r_y, r_y), mode=kernel.padding_mode).view(
            *x.shape[:-2], shape[0] + 2 * r_y, shape[1] + 2 * r_x
        )
    torus = _torus(kernel, shape)
    spectrum = torch.fft.rfft2(wide, s=torus) * transfer(kernel, torus, wide.dtype, x.device)
    (m_y, m_x), out = kernel.margin, torch.fft.irfft2(spectrum, s=torus)
    return out[..., : shape[0] - 2 * m_y, : shape[1] - 2 * m_x].to(x.dtype).contiguous()


def correlate(y: Tensor, kernel: Kernel) -> Tensor:
    """Aᵀ y for y of the shape of A x; no gradient is recorded."""
    (m_y, m_x), (r_y, r_x) = kernel.margin, kernel.radius
    shape = (y.shape[-2] + 2 * m_y, y.shape[-1] + 2 * m_x)
    torus = _torus(kernel, shape)
    wide = y.detach().to(compute_dtype(y.dtype))
    spectrum = torch.fft.rfft2(wide, s=torus) * transfer(kernel, torus, wide.dtype, y.device).conj()
    out = torch.fft.irfft2(spectrum, s=torus)
    if kernel.padding_mode in _EXTENDED:
        out = out[..., : shape[0] + 2 * r_y, : shape[1] + 2 * r_x]
        out = _fold(_fold(out, r_y, kernel.padding_mode, -2), r_x, kernel.padding_mode, -1)
    return out[..., : shape[0], : shape[1]].to(y.dtype).contiguous()


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
def _fast_size(least: int) -> int:
    """The smallest even number from ``least`` on without a prime factor over 5; FFTs of other sizes can be slow."""
    for n in range(least + least % 2, 2 * least + 2, 2):
        rest = n
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n
    raise AssertionError("a power of two lies between any number and its double")


def _torus(kernel: Kernel, shape: Size) -> Size:
    """The period of the torus for images of this shape."""
    if kernel.padding_mode == "circular":
        return shape
    beyond = {"zeros": 1, "valid": 0}.get(kernel.padding_mode, 2)
    h, w = (_fast_size(n + beyond * r) for n, r in zip(shape, kernel.radius, strict=True))
    return h, w


@lru_cache(maxsize=64)
def transfer(kernel: Kernel, torus: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """C's spectrum ĥ on the torus, (N_y, N_x // 2 + 1), such that A x begins at pixel (0, 0) of C's output."""
    with torch.inference_mode(False), torch.no_grad():
        placed = torch.zeros(torus, dtype=torch.float64)
        placed[: kernel.size[0], : kernel.size[1]] = kernel.tensor()
        steps = 1 if kernel.padding_mode in ("circular", "zeros") else 2
        placed = placed.roll((-steps * kernel.radius[0], -steps * kernel.radius[1]), (0, 1))
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.fft.rfft2(placed).to(device, complex_dtype)


@lru_cache(maxsize=64)
def _power(kernel: Kernel, torus: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return transfer(kernel, torus, torch.float64, torch.device("cpu")).abs().square().to(device, dtype)


def tikhonov(b: Tensor, damping: Tensor, kernel: Kernel, tol: float | None, max_iter: int) -> Tensor:
    """(AᵀA + λI)⁻¹ b for b (…, H, W) and λ broadcastable against b; no gradient is recorded."""
    dtype, shape = compute_dtype(b.dtype), (b.shape[-2], b.shape[-1])
    with full_precision(b.device), torch.no_grad():
        if kernel.padding_mode == "circular":
            power = _power(kernel, shape, dtype, b.device)
            spectrum = torch.fft.rfft2(b.to(dtype)) / (power + damping.to(dtype))
            return torch.fft.irfft2(spectrum, s=shape).to(b.dtype)
        tol = TOLERANCE[dtype] if tol is None else tol
        wide = dtype if tol >= _ROUGH or b.device.type == "mps" else torch.float64
        return _iterated(b.to(wide), damping.to(wide), kernel, tol, max_iter).to(b.dtype)


def _iterated(b: Tensor, damping: Tensor, kernel: Kernel, tol: float, max_iter: int) -> Tensor:
    """Solve plane by plane by conjugate gradients, preconditioned by the circulant twin of A."""
    shape = (b.shape[-2], b.shape[-1])
    torus = (_fast_size(shape[0]), _fast_size(shape[1]))
    factor = 1 / (_power(kernel, torus, b.dtype, b.device) + damping)

    def precondition(r: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(r, s=torus) * factor, s=torus)[..., : shape[0], : shape[1]]

    return conjugate_gradients(
        lambda x: correlate(convolve(x, kernel), kernel),
        b,
        damping,
        tol,
        max_iter,
        dims=(-2, -1),
        goal=f"images did not reach a relative residual of {tol:g}",
        precondition=precondition,
    )
