"""(AᵀA + λI)⁻¹ for a convolution: in closed form on the torus, otherwise by conjugate gradients.

**Valid.** Let C be the circular convolution on the torus, and E the restriction to the margin, which is the pixels of
the torus where C x is not measured. Then AᵀA = CᵀC − CᵀEᵀE C, and Woodbury's formula gives, with G = CᵀC + λI,

    (AᵀA + λI)⁻¹ b = G⁻¹(b + CᵀEᵀu),   K u = E C G⁻¹ b,   K = λ E (CCᵀ + λI)⁻¹ Eᵀ.

The unknown u lies on the margin alone, which is a strip of whole rows and a strip of whole columns. Within either, K is
circular along the strip, and so an FFT along it leaves small matrices, which are inverted once. The sum of the two
inverses preconditions K (an additive Schwarz method); only where the strips cross is work left to the iterations. The
residual of the whole system is CᵀEᵀ times that of K, so it is at most ‖C‖ times as large.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from jfbfast.backends.precision import full_precision
from jfbfast.backends.tensors import compute_dtype
from jfbfast.operators.conjugate_gradients import TOLERANCE, conjugate_gradients
from jfbfast.operators.spectral import Kernel, Size, convolve, correlate, fast_size, power, torus_of, transfer

_ROUGH = 1e-3  # from this tolerance on, float32 is accurate enough for conjugate gradients
_ROUGH_VALID = 1e-5  # the same for "valid": u is about as large as C x, and K has no eigenvalue above 1


def tikhonov(b: Tensor, damping: Tensor, kernel: Kernel, tol: float | None, max_iter: int) -> Tensor:
    """(AᵀA + λI)⁻¹ b for b (…, H, W) and λ broadcastable against b; no gradient is recorded."""
    dtype, shape = compute_dtype(b.dtype), (b.shape[-2], b.shape[-1])
    if not b.numel():
        return torch.empty_like(b)
    with full_precision(b.device), torch.no_grad():
        if kernel.padding_mode == "circular":
            spectrum = torch.fft.rfft2(b.to(dtype)) / (power(kernel, shape, dtype, b.device) + damping.to(dtype))
            return torch.fft.irfft2(spectrum, s=shape).to(b.dtype)
        tol = TOLERANCE[dtype] if tol is None else tol
        rough = _ROUGH_VALID if kernel.padding_mode == "valid" else _ROUGH
        wide = dtype if tol >= rough or b.device.type == "mps" else torch.float64
        if kernel.padding_mode != "valid":
            return _by_twin(b.to(wide), damping.to(wide), kernel, tol, max_iter).to(b.dtype)
        planes = b.to(wide).reshape(-1, *shape)
        of_plane = damping.to(torch.float64).expand(*b.shape[:-2], 1, 1).reshape(-1)
        out = torch.empty_like(planes)
        for value in of_plane.unique().tolist():
            same = of_plane == value
            out[same] = _valid(planes[same], value, kernel, tol, max_iter)
        return out.view(b.shape).to(b.dtype)


def _by_twin(b: Tensor, damping: Tensor, kernel: Kernel, tol: float, max_iter: int) -> Tensor:
    """Solve plane by plane, preconditioned by the circular convolution with the same point spread function."""
    shape = (b.shape[-2], b.shape[-1])
    torus = (fast_size(shape[0]), fast_size(shape[1]))
    factor = 1 / (power(kernel, torus, b.dtype, b.device) + damping)

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


def _valid(b: Tensor, damping: float, kernel: Kernel, tol: float, max_iter: int) -> Tensor:
    """Solve for planes (P, H, W) through the margin, as the module's docstring says."""
    shape = (b.shape[-2], b.shape[-1])
    torus, measured = torus_of(kernel, shape), (shape[0] - kernel.size[0] + 1, shape[1] - kernel.size[1] + 1)
    normal = power(kernel, torus, b.dtype, b.device) + damping
    factor = damping / normal
    rows, columns = _strip_inverses(kernel, torus, measured, damping, b.dtype, b.device)

    def on_margin(spectrum: Tensor) -> Tensor:
        out = torch.fft.irfft2(spectrum, s=torus)
        out[..., : measured[0], : measured[1]] = 0
        return out

    def within(strip: Tensor, inverses: Tensor) -> Tensor:
        """Apply the inverses to a strip (P, N, s) of N pixels in length."""
        along = torch.fft.rfft(strip, dim=-2).contiguous()  # else the products take ten times as long
        return torch.fft.irfft(torch.einsum("fst,pft->pfs", inverses, along), n=strip.shape[-2], dim=-2)

    def precondition(r: Tensor) -> Tensor:
        z = torch.zeros_like(r)
        z[:, measured[0] :, :] = within(r[:, measured[0] :, :].mT, rows).mT
        z[:, :, measured[1] :] += within(r[:, :, measured[1] :], columns)
        return z

    c, spectrum = transfer(kernel, torus, b.dtype, b.device), torch.fft.rfft2(b, s=torus)
    u = conjugate_gradients(
        lambda u: on_margin(torch.fft.rfft2(u) * factor),
        on_margin(spectrum * c / normal),
        b.new_zeros(()),
        tol,
        max_iter,
        dims=(-2, -1),
        goal=f"images did not reach a relative residual of {tol:g}",
        precondition=precondition,
        norm=torch.linalg.vector_norm(b, dim=(-2, -1), keepdim=True),
    )
    out = torch.fft.irfft2((spectrum + c.conj() * torch.fft.rfft2(u)) / normal, s=torus)
    return out[..., : shape[0], : shape[1]]


@lru_cache(maxsize=24)  # six dampings of a network, and four shapes of tiles
def _strip_inverses(
    kernel: Kernel, torus: Size, measured: Size, damping: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For the strip of rows and that of columns, the inverses of K at each frequency along it: (F, s, s)."""
    with torch.inference_mode(False), torch.no_grad():
        spectrum = power(kernel, torus, torch.float64, torch.device("cpu"))
        point = torch.fft.irfft2(damping / (spectrum + damping), s=torus)  # K's response to a point
        found = []
        for axis in (0, 1):
            across = torch.fft.rfft(point, dim=1 - axis).movedim(axis, 0)  # (N across the strip, F)
            offsets = torch.arange(torus[axis] - measured[axis])
            blocks = across[(offsets[:, None] - offsets) % torus[axis]].movedim(-1, 0)
            inverse = torch.linalg.inv(blocks)
            found.append(inverse.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64))
        return found[0], found[1]
