"""The basis in which AᵀA is diagonal, for operators that have one in closed form: a separable or a circular blur.

With AᵀA = V diag(s) V*, every function of AᵀA is V (f(s) ⊙ V* x): the Tikhonov inverse with f = 1/(s + λ), the Tikhonov
filter with f = s/(s + δ). A layer that needs several of them computes s and f(s) once, and shares the changes of basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from jfbfast.backends.precision import full_precision
from jfbfast.backends.tensors import compute_dtype
from jfbfast.backends.tracing import untraced
from jfbfast.operators import inverse, ops, spectral
from jfbfast.operators.spectral import Kernel, Size
from jfbfast.operators.tables import Taps


class Eigenbasis(Protocol):
    """V and s with AᵀA = V diag(s) V*, for images of one shape (H, W). It computes in float32 at least."""

    def eigenvalues(self, like: Tensor) -> Tensor:
        """s, broadcastable against the coefficients of images like ``like``, in their computing dtype and device."""

    def coefficients(self, x: Tensor) -> Tensor:
        """V* x for images x (B, C, H, W); differentiable."""

    def image(self, coefficients: Tensor) -> Tensor:
        """V c, not rounded to half precision; differentiable."""


class SeparableBasis(NamedTuple):
    """The right singular vectors of both band matrices of a `SeparableBlur`."""

    taps: Taps
    shape: Size

    @untraced  # its cache is not to be traced
    def eigenvalues(self, like: Tensor) -> Tensor:
        return inverse.eigenvalues(self.taps, self.shape, compute_dtype(like.dtype), like.device)

    def coefficients(self, x: Tensor) -> Tensor:
        return ops.changed_basis(x, False, self.taps)

    def image(self, coefficients: Tensor) -> Tensor:
        return ops.changed_basis(coefficients, True, self.taps)


class FourierBasis(NamedTuple):
    """The Fourier transform, for a circular convolution."""

    kernel: Kernel
    shape: Size

    @untraced
    def eigenvalues(self, like: Tensor) -> Tensor:
        return spectral.power(self.kernel, self.shape, compute_dtype(like.dtype), like.device)

    def coefficients(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            return torch.fft.rfft2(x.to(compute_dtype(x.dtype)))

    def image(self, coefficients: Tensor) -> Tensor:
        with full_precision(coefficients.device):
            return torch.fft.irfft2(coefficients, s=self.shape)


class DiagonalOperator:
    """``eigenbasis``, ``solve`` and ``filter`` for an operator A that is its own `Eigenbasis`; a base beside nn.Module.

    Example:
        >>> import torch
        >>> from jfbfast.operators.eigenbasis import DiagonalOperator
        >>> class Mask(DiagonalOperator, torch.nn.Module):
        ...     mask = torch.tensor([1.0, 0.0])
        ...     def eigenvalues(self, like): return self.mask.square()
        ...     def coefficients(self, x): return x
        ...     def image(self, coefficients): return coefficients
        >>> Mask().solve(torch.ones(1, 1, 1, 2), damping=0.25)
        tensor([[[[0.8000, 4.0000]]]])
    """

    def eigenbasis(self, shape: Sequence[int]) -> Any:
        """The basis for images ``(…, *shape)``."""
        return self

    def solve(self: Any, b: Tensor, damping: float | Tensor) -> Tensor:
        """(AᵀA + λI)⁻¹ b."""
        squares = self.eigenvalues(b)
        return self.image(self.coefficients(b) / (squares + damping)).to(b.dtype)

    def filter(self: Any, x: Tensor, damping: float | Tensor) -> Tensor:
        """W x with W = AᵀA(AᵀA + δI)⁻¹."""
        squares = self.eigenvalues(x)
        return self.image(self.coefficients(x) * (squares / (squares + damping))).to(x.dtype)


def eigenbasis(operator: Any, d: Tensor) -> Eigenbasis | None:
    """The eigenbasis of A for images with the measurements d (B, C, h, w); None where ``solve`` has to iterate."""
    find = getattr(operator, "eigenbasis", None)
    if find is None or d.dim() < 2:
        return None
    y, x = getattr(operator, "margin", (0, 0))
    found: Eigenbasis | None = find((d.shape[-2] + 2 * y, d.shape[-1] + 2 * x))
    return found
