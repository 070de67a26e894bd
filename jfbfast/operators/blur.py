"""The measurement operator A: a separable blur, its adjoint, and functions of AᵀA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.backends.reference import PADDING_MODES, gaussian_taps
from jfbfast.backends.tensors import compute_dtype
from jfbfast.operators import inverse, ops
from jfbfast.operators.eigenbasis import SeparableBasis
from jfbfast.operators.tables import Taps


def check_fixed(name: str, value: object) -> None:
    """Raise ValueError for a tensor that requires a gradient; a blur's weights would not get one."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} requires a gradient; it takes fixed numbers: a blur to be learnt is a module with an adjoint"
        )


def _filter(name: str, taps: Sequence[float] | Tensor) -> tuple[float, ...]:
    check_fixed(name, taps)
    values = tuple(float(t) for t in taps)
    if len(values) % 2 == 0 or not all(map(math.isfinite, values)):
        raise ValueError(f"{name} is {values}; it takes an odd number of finite weights")
    return values


class SeparableBlur(nn.Module):
    """A: X ↦ B₁ X B₂ᵀ, a correlation with one filter along the columns and one along the rows.

    Images are (…, H, W) with any number of leading dimensions, in float64, float32, bfloat16 or float16, on any
    device. The module has no tensors, so it need not be moved. Every method is differentiable, also twice,
    and works under vmap, autocast (in the dtype of its argument) and torch.compile.

    Args:
        taps_y, taps_x: the filters, of odd length 2r + 1, in correlation order as in conv2d: tap k
            weighs the pixel k − r further down, or to the right.
        padding_mode: "zeros", "reflect", "replicate" or "circular", as in torch.nn.Conv2d; or "valid" for unknown
            surroundings: d = A x is the part of the blurred image that needs nothing beyond x, so x (…, H, W) gives d
            (…, H − 2r_y, W − 2r_x). Images x must have more than r pixels a side for "reflect", at least r for
            "circular", and more than 2r for "valid".

    Raises:
        ValueError: a filter of even length, with a weight that is not finite, or that requires a gradient; another
            padding mode.

    Example:
        >>> import torch, jfbfast
        >>> blur = jfbfast.SeparableBlur([0.25, 0.5, 0.25], [0.5, 0.25, 0.25])
        >>> x, y = torch.rand(2, 4, 3, 8, 9)
        >>> torch.allclose((blur(x) * y).sum(), (x * blur.adjoint(y)).sum(), rtol=1e-4)
        True
        >>> x = blur.solve(y, damping=0.1)
        >>> torch.allclose(blur.normal(x) + 0.1 * x, y, atol=1e-4)
        True
        >>> jfbfast.SeparableBlur([0.25, 0.5, 0.25], [1.0], padding_mode="valid")(x).shape
        torch.Size([4, 3, 6, 9])
    """

    def __init__(
        self, taps_y: Sequence[float] | Tensor, taps_x: Sequence[float] | Tensor, padding_mode: str = "zeros"
    ) -> None:
        super().__init__()
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode is {padding_mode!r}; it takes one of {', '.join(map(repr, PADDING_MODES))}")
        self.taps = Taps(_filter("taps_y", taps_y), _filter("taps_x", taps_x), padding_mode)

    @property
    def padding_mode(self) -> str:
        return self.taps.padding_mode

    @property
    def taps_y(self) -> tuple[float, ...]:
        """The filter along the columns."""
        return self.taps.y

    @property
    def taps_x(self) -> tuple[float, ...]:
        """The filter along the rows."""
        return self.taps.x

    @property
    def kernel_size(self) -> tuple[int, int]:
        """The lengths of the filters, (y, x)."""
        return len(self.taps.y), len(self.taps.x)

    @property
    def margin(self) -> tuple[int, int]:
        """How many pixels x has beyond d = A x on each side, (y, x), which is (r_y, r_x) in "valid", else (0, 0)."""
        return self.taps.margin

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        return ops.blur(x, *self.taps)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, exact in every padding mode."""
        return ops.blur(y, *self.taps, True)

    def normal(self, x: Tensor) -> Tensor:
        """AᵀA x."""
        return ops.gradient(x, None, None, None, *self.taps)

    def gradient(self, x: Tensor, d: Tensor, r: Tensor | None = None) -> Tensor:
        """Aᵀ(A x − d) + r for d of the shape of A x, in one pass over the images; None stands for r = 0."""
        return ops.gradient(x, d, r, None, *self.taps)

    def gradient_step(self, x: Tensor, d: Tensor, r: Tensor | None, step_size: float | Tensor) -> Tensor:
        """x − η(Aᵀ(A x − d) + r), in one pass over the images.

        Args:
            x, d, r: images (…, H, W), d of the shape of A x; None stands for r = 0.
            step_size: η, a number or a tensor of shape ().

        Raises:
            ValueError: images of other shapes, dtypes or devices; a step size of another shape.
        """
        step_size = torch.as_tensor(step_size, dtype=compute_dtype(x.dtype), device=x.device)
        return ops.gradient(x, d, r, step_size, *self.taps)

    def solve(self, b: Tensor, damping: float | Tensor) -> Tensor:
        """(AᵀA + λI)⁻¹ b, exact up to rounding in every padding mode.

        Images of up to 1024 pixels a side are solved through the singular value decompositions of the two band
        matrices. Larger ones are solved by preconditioned conjugate gradients in float64, each to a relative
        residual of 1e-6 (1e-12 for b in float64, as far as rounding allows) in at most 1000 iterations.

        Args:
            b: images (…, H, W) of the shape of x.
            damping: λ > 0, a number or a tensor of shape () or (…, 1, 1) that broadcasts against b; (B, 1, 1, 1)
                is one value for each sample. Differentiable.

        Raises:
            ValueError: a number λ < 0; λ = 0 if A is numerically singular or a side is over 1024; a
                tensor of another shape.

        Warns:
            ConvergenceWarning: conjugate gradients left images above that residual; this happens for λ below about
                1e-5 if A is nearly singular.
        """
        wide = compute_dtype(b.dtype)
        if not isinstance(damping, Tensor):
            checks.non_negative("damping", damping)
            if damping == 0:
                inverse.check_invertible(self.taps, b.shape[-2:], wide)
            damping = torch.tensor(damping, dtype=wide, device=b.device)
        if damping.dim() and damping.shape[-2:] != (1, 1):
            raise ValueError(f"damping has shape {tuple(damping.shape)}; it takes a number, or shape () or (…, 1, 1)")
        return ops.tikhonov(b, damping, *self.taps)

    def eigenbasis(self, shape: Sequence[int]) -> SeparableBasis | None:
        """The basis in which AᵀA is diagonal for images x ``(…, *shape)``; None for sides over 1024 pixels."""
        height, width = shape
        return SeparableBasis(self.taps, (height, width)) if max(shape) <= inverse.SVD_LIMIT else None

    def filter(self, x: Tensor, damping: float | Tensor) -> Tensor:
        """W x with the Tikhonov filter W = AᵀA(AᵀA + δI)⁻¹ = I − δ(AᵀA + δI)⁻¹: the part of x that A preserves.

        Args:
            x: images (…, H, W).
            damping: δ > 0, as in `solve`.
        """
        return (x - damping * self.solve(x, damping)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"taps_y={self.taps.y}, taps_x={self.taps.x}, padding_mode={self.padding_mode!r}"


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, Sequence):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} is {value}; it takes a number or a (y, x) pair")
    return value[0], value[1]


class GaussianBlur(SeparableBlur):
    """The Gaussian blur: taps exp(−t²/2σ²) at t = −r … r, normalised to sum 1.

    Args:
        kernel_size: 2r + 1, an odd number or a (y, x) pair. None takes r = ⌈3σ⌉ on each axis, which leaves out less
            than 0.3% of the weight.
        sigma: σ > 0 in pixels, a number or a (y, x) pair.
        padding_mode: as in `SeparableBlur`.

    Raises:
        ValueError: an even or non-positive kernel size; σ ≤ 0, not finite, or a tensor that requires a gradient;
            another padding mode.

    Example:
        >>> import torch, jfbfast
        >>> blur = jfbfast.GaussianBlur(5, sigma=1.0, padding_mode="reflect")
        >>> blur(torch.ones(1, 3, 8, 8)).sum().round()
        tensor(192.)
        >>> jfbfast.GaussianBlur(sigma=(1.0, 2.5), padding_mode="valid").margin
        (3, 8)
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int] | None = None,
        sigma: float | Sequence[float] = 1.0,
        padding_mode: str = "zeros",
    ) -> None:
        sigmas = _pair("sigma", sigma)
        for s in sigmas:
            check_fixed("sigma", s)
        if not all(0 < s < math.inf for s in sigmas):
            raise ValueError(f"sigma is {sigma}; it takes positive numbers of pixels")
        sizes = _pair("kernel_size", kernel_size)
        if kernel_size is None:
            sizes = tuple(2 * math.ceil(3 * s) + 1 for s in sigmas)
        if any(not checks.is_integer(size) or size < 1 or size % 2 == 0 for size in sizes):
            raise ValueError(f"kernel_size is {kernel_size}; it takes odd positive integers, or None")
        taps_y, taps_x = map(gaussian_taps, sizes, sigmas)
        super().__init__(taps_y, taps_x, padding_mode)
        self.sigma: tuple[float, float] = (float(sigmas[0]), float(sigmas[1]))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, sigma={self.sigma}, padding_mode={self.padding_mode!r}"
