"""The measurement operator A for any point spread function."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.backends.dispatch import DTYPES
from jfbfast.backends.reference import PADDING_MODES
from jfbfast.backends.tensors import compute_dtype
from jfbfast.backends.tracing import untraced
from jfbfast.operators import spectral, spectral_inverse
from jfbfast.operators.blur import SeparableBlur, check_fixed
from jfbfast.operators.eigenbasis import Eigenbasis, FourierBasis
from jfbfast.operators.inverse import scalar_gradient
from jfbfast.operators.spectral import Kernel

_NEGLIGIBLE = 1e-12  # singular values of a point spread function, relative to its norm


class Blur(nn.Module):
    """A: the convolution with a point spread function, which is the image of a point: A δ = psf.

    Images are (…, H, W) with any number of leading dimensions, in float64, float32, bfloat16 or float16, on any
    device, and at least as large as the point spread function. Half precision is computed in float32. The module has
    no tensors in its state_dict and need not be moved. Every method is differentiable, also twice, and works under
    vmap and autocast (in the dtype of its argument).

    A point spread function that is the outer product of two filters (to 1e-12 of its norm) gives their `SeparableBlur`,
    with its kernels and its closed form of ``solve``. Any other is applied by FFT. Then ``solve`` has a closed form
    with the padding mode "circular". It iterates with the others: at λ = 1e-3 and a tol of 1e-6, ten to thirty times
    with "valid", which is solved through the margin alone, but hundreds of times with the rest.

    Args:
        psf: (k_y, k_x) with odd sides; the middle is where the point is. In the correlation order of
            `SeparableBlur` and conv2d this is the flipped psf: ``Blur(torch.outer(u, v))`` is
            ``SeparableBlur(u.flip(0), v.flip(0))``. `jfbfast.point_spread` makes some kinds.
        padding_mode: "zeros", "reflect", "replicate", "circular" or "valid", as in `SeparableBlur`.
        tol: of ``solve`` by conjugate gradients: an image is done where ‖b − (AᵀA + λI) x‖ ≤ tol·‖b‖. None for 1e-6,
            or 1e-12 in float64. They run in float64 unless tol is 1e-3 or more, 1e-5 or more with "valid".
        max_iter: the largest number of their iterations.

    Raises:
        ValueError: a psf with another shape, with values that are not finite, all zero, or that requires a gradient;
            another padding mode; ``tol`` not in (0, 1); ``max_iter`` below 1.

    Example:
        >>> import torch, jfbfast
        >>> psf = jfbfast.point_spread.motion(length=5, angle=30)
        >>> blur = jfbfast.Blur(psf, padding_mode="circular")
        >>> x, y = torch.rand(2, 4, 3, 12, 9)
        >>> torch.allclose((blur(x) * y).sum(), (x * blur.adjoint(y)).sum(), rtol=1e-4)
        True
        >>> x = blur.solve(y, damping=0.1)
        >>> torch.allclose(blur.normal(x) + 0.1 * x, y, atol=1e-4)
        True
    """

    def __init__(
        self, psf: Tensor, padding_mode: str = "circular", tol: float | None = None, max_iter: int = 1000
    ) -> None:
        super().__init__()
        check_fixed("psf", psf)
        values = torch.as_tensor(psf).detach().to("cpu", torch.float64).contiguous()
        if values.dim() != 2 or not all(side % 2 for side in values.shape):
            raise ValueError(f"psf has shape {tuple(values.shape)}; it takes two odd sides")
        if not values.isfinite().all() or not values.any():
            raise ValueError(
                f"psf has values from {values.min()} to {values.max()}; it takes finite ones, not all zero"
            )
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode is {padding_mode!r}; it takes one of {', '.join(map(repr, PADDING_MODES))}")
        if tol is not None:
            checks.number("tol", tol, lambda t: 0 < t < 1, "None or a number in (0, 1)")
        checks.integer("max_iter", max_iter, 1)
        self.tol = tol
        self.max_iter = max_iter
        size = (values.shape[0], values.shape[1])
        self._kernel = Kernel(values.numpy().tobytes(), size, padding_mode)
        self._separable = _separable(values, padding_mode)  # a tuple, so that it is no submodule, and not in the repr

    @property
    def psf(self) -> Tensor:
        """A copy of the point spread function, (k_y, k_x) in float64."""
        return self._kernel.tensor()

    @property
    def padding_mode(self) -> str:
        return self._kernel.padding_mode

    @property
    def kernel_size(self) -> tuple[int, int]:
        """The sides of the point spread function, (k_y, k_x)."""
        return self._kernel.size

    @property
    def margin(self) -> tuple[int, int]:
        """How many pixels x has beyond A x on each side, (y, x), which is the radius in "valid", else 0."""
        return self._kernel.margin

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        self._check("x", x)
        return self._apply_operator(x, adjoint=False)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, exact in every padding mode."""
        self._check("y", y, self.margin)
        return self._apply_operator(y, adjoint=True)

    def normal(self, x: Tensor) -> Tensor:
        """AᵀA x."""
        if self._separable:
            self._check("x", x)
            return self._separable[0].normal(x)
        return self.adjoint(self(x))

    def gradient(self, x: Tensor, d: Tensor, r: Tensor | None = None) -> Tensor:
        """Aᵀ(A x − d) + r for images x and r, and measurements d; None stands for r = 0."""
        if self._separable:
            self._check("x", x)
            return self._separable[0].gradient(x, d, r)
        g = self.adjoint(self(x) - d)
        return g if r is None else g + r

    def gradient_step(self, x: Tensor, d: Tensor, r: Tensor | None, step_size: float | Tensor) -> Tensor:
        """x − η(Aᵀ(A x − d) + r), as `SeparableBlur.gradient_step`."""
        if self._separable:
            self._check("x", x)
            return self._separable[0].gradient_step(x, d, r, step_size)
        return (x - step_size * self.gradient(x, d, r)).to(x.dtype)

    def solve(self, b: Tensor, damping: float | Tensor) -> Tensor:
        """(AᵀA + λI)⁻¹ b: in closed form for a separable or a circular blur, else by conjugate gradients to ``tol``.

        Args:
            b: images (…, H, W) of the shape of x.
            damping: λ > 0, a number or a tensor of shape () or (…, 1, 1) that broadcasts against b; (B, 1, 1, 1)
                is one value for each sample. Differentiable.

        Raises:
            ValueError: a number λ ≤ 0; a tensor of another shape.

        Warns:
            ConvergenceWarning: conjugate gradients left images above ``tol``.
        """
        self._check("b", b)
        if self._separable:
            return self._separable[0].solve(b, damping)
        if not isinstance(damping, Tensor):
            checks.positive("damping", damping)
            damping = torch.tensor(damping, dtype=compute_dtype(b.dtype), device=b.device)
        if damping.dim() and damping.shape[-2:] != (1, 1):
            raise ValueError(f"damping has shape {tuple(damping.shape)}; it takes a number, or shape () or (…, 1, 1)")
        return _tikhonov(b, damping, self._kernel, self.tol, self.max_iter)

    def eigenbasis(self, shape: Sequence[int]) -> Eigenbasis | None:
        """The basis in which AᵀA is diagonal for images x ``(…, *shape)``; None where ``solve`` iterates."""
        if self._separable:
            return self._separable[0].eigenbasis(shape)
        height, width = shape
        return FourierBasis(self._kernel, (height, width)) if self.padding_mode == "circular" else None

    def filter(self, x: Tensor, damping: float | Tensor) -> Tensor:
        """W x with the Tikhonov filter W = AᵀA(AᵀA + δI)⁻¹ = I − δ(AᵀA + δI)⁻¹: the part of x that A preserves."""
        return (x - damping * self.solve(x, damping)).to(x.dtype)

    def extra_repr(self) -> str:
        shape = (self.psf / self.psf.abs().max() * 1e9).round().to(torch.int64)  # without the rounding of a platform
        digest = hashlib.sha256(shape.numpy().tobytes()).hexdigest()[:8]
        return f"kernel_size={self.kernel_size}, psf of digest {digest}, padding_mode={self.padding_mode!r}"

    def _apply_operator(self, x: Tensor, adjoint: bool) -> Tensor:
        if not self._separable:
            return _convolution(x, self._kernel, adjoint)
        return self._separable[0].adjoint(x) if adjoint else self._separable[0](x)

    def _check(self, name: str, x: Tensor, margin: tuple[int, int] = (0, 0)) -> None:
        """Raise ValueError unless x, which lacks ``margin`` pixels on each side, is images that A takes."""
        if x.dim() < 2 or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}; it takes float64, float32, bfloat16 or float16 "
                "images (…, H, W)"
            )
        least = tuple(k - 2 * m for k, m in zip(self.kernel_size, margin, strict=True))
        if x.shape[-2] < least[0] or x.shape[-1] < least[1]:
            raise ValueError(
                f"{name} has {x.shape[-2]} × {x.shape[-1]} pixels; a point spread function of "
                f"{self.kernel_size[0]} × {self.kernel_size[1]} takes at least {least[0]} × {least[1]}"
            )


def _separable(psf: Tensor, padding_mode: str) -> tuple[SeparableBlur, ...]:
    """The separable blur with this point spread function, or none."""
    u, s, vh = torch.linalg.svd(psf)
    if s[1:].norm() > _NEGLIGIBLE * s.norm():
        return ()
    scale = s[0].sqrt() * (-1 if u[:, 0].sum() < 0 else 1)
    return (SeparableBlur((scale * u[:, 0]).flip(0), (scale * vh[0]).flip(0), padding_mode),)


class _Convolution(torch.autograd.Function):
    """A x or Aᵀ x by FFT; the derivative of each is the other."""

    @staticmethod
    def forward(x: Tensor, kernel: Kernel, adjoint: bool) -> Tensor:
        return spectral.correlate(x, kernel) if adjoint else spectral.convolve(x, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.kernel, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _Convolution.apply(g, ctx.kernel, not ctx.adjoint), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, kernel: Kernel, adjoint: bool) -> tuple[Tensor, int]:
        return _Convolution.apply(x.movedim(in_dims[0], 0), kernel, adjoint), 0


class _Tikhonov(torch.autograd.Function):
    """x = P b with P = (AᵀA + λI)⁻¹: for a cotangent g, ∂/∂b is P g and ∂/∂λ is −⟨P g, x⟩."""

    @staticmethod
    def forward(b: Tensor, damping: Tensor, kernel: Kernel, tol: float | None, max_iter: int) -> Tensor:
        return spectral_inverse.tikhonov(b, damping, kernel, tol, max_iter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, damping, *ctx.settings = inputs
        ctx.save_for_backward(damping, output if ctx.needs_input_grad[1] else None)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        damping, x = ctx.saved_tensors
        u = _Tikhonov.apply(g, damping, *ctx.settings)
        return u, scalar_gradient(u, x, damping) if ctx.needs_input_grad[1] else None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, b: Tensor, damping: Tensor, *settings: Any) -> tuple[Tensor, int]:
        b = b.expand(info.batch_size, *b.shape) if in_dims[0] is None else b.movedim(in_dims[0], 0)
        if in_dims[1] is not None:
            damping = damping.movedim(in_dims[1], 0)
            damping = damping.reshape(len(damping), *[1] * (b.dim() - damping.dim()), *damping.shape[1:])
        return _Tikhonov.apply(b, damping, *settings), 0


@untraced  # the caches of `spectral` and the loop of conjugate gradients are not to be traced
def _convolution(x: Tensor, kernel: Kernel, adjoint: bool) -> Tensor:
    return _Convolution.apply(x, kernel, adjoint)


@untraced
def _tikhonov(b: Tensor, damping: Tensor, kernel: Kernel, tol: float | None, max_iter: int) -> Tensor:
    return _Tikhonov.apply(b, damping, kernel, tol, max_iter)
