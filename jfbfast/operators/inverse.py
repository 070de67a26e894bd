"""Functions of AᵀA for a separable A: the Tikhonov inverse and the direct inverse.

Up to `SVD_LIMIT` pixels a side they are exact in every padding mode, through the singular value
decompositions of the two band matrices, computed once in float64. Larger Tikhonov systems are solved by
conjugate gradients with a circulant preconditioner.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from jfbfast.backends import reference
from jfbfast.backends.dispatch import kernels
from jfbfast.backends.graphs import cached_tensors
from jfbfast.backends.precision import full_precision
from jfbfast.backends.reference import SVD
from jfbfast.backends.tensors import compute_dtype
from jfbfast.operators.conjugate_gradients import TOLERANCE, conjugate_gradients
from jfbfast.operators.tables import Taps, axis_table, bands

SVD_LIMIT = 1024
_CG_MAX_ITER = 1000


@lru_cache(maxsize=32)
def _axis_svd(taps: tuple[float, ...], n: int, padding_mode: str) -> SVD:
    with torch.inference_mode(False), torch.no_grad():
        return reference.svd(axis_table(taps, n, padding_mode), padding_mode == "circular")


@cached_tensors(maxsize=64)
def factors(taps: Taps, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[SVD, SVD]:
    """The SVDs of B₁ and B₂, computed in float64 and rounded to ``dtype``."""
    with torch.inference_mode(False), torch.no_grad():
        pair = [_axis_svd(t, n, taps.padding_mode) for t, n in zip((taps.y, taps.x), shape, strict=True)]
        y, x = (SVD(*(factor.to(device, dtype) for factor in svd)) for svd in pair)
        return y, x


@cached_tensors(maxsize=64)
def eigenvalues(taps: Taps, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eigenvalues of AᵀA in the basis of `change_basis`, (H, W)."""
    with torch.inference_mode(False), torch.no_grad():
        return reference.eigenvalues(*factors(taps, shape, torch.float64, torch.device("cpu"))).to(device, dtype)


def change_basis(x: Tensor, taps: Taps, back: bool) -> Tensor:
    """The coefficients V* x of images x (…, H, W) in the basis where AᵀA is diagonal, or V x if ``back``.

    They have the dtype in which images like x are computed; no gradient is recorded.
    """
    with full_precision(x.device), torch.no_grad():
        return reference.change_basis(x, *factors(taps, x.shape[-2:], compute_dtype(x.dtype), x.device), back)


def check_invertible(taps: Taps, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError if A has no numerical inverse in ``dtype`` for images of this shape."""
    if max(shape) > SVD_LIMIT:
        raise ValueError(
            f"damping is 0; images of {tuple(shape)} pixels take a positive number, since a side is over {SVD_LIMIT}"
        )
    s_y, s_x = (_axis_svd(t, n, taps.padding_mode).s for t, n in zip((taps.y, taps.x), shape, strict=True))
    condition = float(s_y[0] * s_x[0] / (s_y[-1] * s_x[-1]))
    if not condition * max(shape) * torch.finfo(dtype).eps < 1:
        raise ValueError(
            f"the blur is numerically singular for {shape[0]} × {shape[1]} images in {dtype} "
            f"(condition {condition:.1e}); a positive damping makes it solvable"
        )


def tikhonov(b: Tensor, damping: Tensor, taps: Taps) -> Tensor:
    """(AᵀA + λI)⁻¹ b for b (…, H, W) and λ broadcastable against b; no gradient is recorded."""
    dtype, shape, device = compute_dtype(b.dtype), b.shape[-2:], b.device
    with full_precision(device), torch.no_grad():
        if max(shape) <= SVD_LIMIT:
            basis, squares = factors(taps, shape, dtype, device), eigenvalues(taps, shape, dtype, device)
            coefficients = reference.change_basis(b, *basis, back=False) / (squares + damping.to(dtype))
            return reference.change_basis(coefficients, *basis, back=True).to(b.dtype)
        wide = dtype if device.type == "mps" else torch.float64  # in float32 the recurrence's residual drifts
        return _conjugate_gradients(b.to(wide), damping.to(wide), taps, TOLERANCE[dtype]).to(b.dtype)


def scalar_gradient(u: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """−Re⟨u, v⟩ in the shape of ``like``: for u = (AᵀA + λI)⁻¹g and v = (AᵀA + λI)⁻¹b the derivative of ⟨g, v⟩ in λ."""
    wide = compute_dtype(u.dtype)
    product = (u.conj() * v).real if u.is_complex() else u.to(wide) * v.to(wide)
    return -product.sum_to_size(like.shape).to(like.dtype)


def direct(d: Tensor, taps: Taps) -> Tensor:
    """A⁻¹ d = V₁[(U₁ᵀ d U₂) ⊘ (s₁ s₂ᵀ)]V₂ᵀ for d (…, H, W), through the SVD of each B."""
    dtype, shape = compute_dtype(d.dtype), d.shape[-2:]
    check_invertible(taps, shape, dtype)
    with full_precision(d.device):
        y, x = factors(taps, shape, dtype, d.device)
        coefficients = y.u.T @ d.to(dtype) @ x.u / (y.s[:, None] * x.s)
        return (y.v @ coefficients @ x.v.T).to(d.dtype)


def power_spectrum(taps: tuple[float, ...], n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """|â|² of the taps wrapped around a circle of n pixels, at all n frequencies."""
    wrapped = torch.zeros(n, dtype=torch.float64)
    wrapped.index_add_(0, torch.arange(len(taps)) % n, torch.tensor(taps, dtype=torch.float64))
    return torch.fft.fft(wrapped).abs().square().to(device, dtype)


def _conjugate_gradients(b: Tensor, damping: Tensor, taps: Taps, tol: float) -> Tensor:
    """Solve plane by plane, preconditioned by the circulant operator of the same taps."""
    height, width = shape = b.shape[-2:]
    forward, adjoint = (bands(taps, shape, b.dtype, b.device, a) for a in (False, True))
    module = kernels(b.device, "blur", radius=max(len(taps.y), len(taps.x)) // 2)
    power = power_spectrum(taps.y, height, b.device, b.dtype)[:, None]
    power = power * power_spectrum(taps.x, width, b.device, b.dtype)[: width // 2 + 1]

    def normal(x: Tensor) -> Tensor:
        return module.gradient(x, None, None, forward, adjoint)

    def precondition(r: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(r) / (power + damping), s=shape)

    goal = f"images did not reach a relative residual of {tol:g}"
    return conjugate_gradients(
        normal, b, damping, tol, _CG_MAX_ITER, dims=(-2, -1), goal=goal, precondition=precondition
    )
