"""Inference with a fixed number of evaluations in plain PyTorch, for torch.export, ONNX and other runtimes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.backends import reference
from jfbfast.implicit.frozen import NormalisedConv2d
from jfbfast.models.deadmm import DEADMM
from jfbfast.models.implicit_network import ImplicitNetwork
from jfbfast.operators.blur import SeparableBlur
from jfbfast.operators.convolution import Blur
from jfbfast.operators.data_fidelity import LeastSquares
from jfbfast.operators.eigenbasis import DiagonalOperator

_REGULARISATION = 1e-6  # relative to the squared norm of a difference of residuals, for float32
_LARGEST_SIDE = 1024  # of images that are solved for by singular value decompositions


class PlainBlur(DiagonalOperator, nn.Module):
    """A `SeparableBlur` or a `Blur` by convolutions and matrix products of PyTorch, with its methods for a layer.

    ``forward`` and ``adjoint`` take images of any size. ``solve`` and ``filter`` take images of one size, because they
    use singular value decompositions (a separable blur) or the Fourier transform (a circular one) of that size.

    Args:
        blur: A.
        size: (H, W) of the images x, for ``solve`` and ``filter``; None for neither.
    """

    psf: Tensor
    power: Tensor
    v_y: Tensor | None
    v_x: Tensor

    def __init__(self, blur: SeparableBlur | Blur, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        if isinstance(blur, Blur):
            psf = blur.psf.flip(0, 1)  # in correlation order
        else:
            psf = torch.outer(*(torch.tensor(taps, dtype=torch.float64) for taps in (blur.taps_y, blur.taps_x)))
        self.register_buffer("psf", psf[None, None])
        self.mode = blur.padding_mode
        self.margin = blur.margin
        self.radius = (psf.shape[0] // 2, psf.shape[1] // 2)
        self.described = repr(blur)
        self.size = size
        if size is None:
            return
        separable: Any = blur._separable[0] if isinstance(blur, Blur) and blur._separable else blur
        if isinstance(separable, SeparableBlur):
            taps = separable.taps
            tables = [reference.band_table(t, n, self.mode) for t, n in zip((taps.y, taps.x), size, strict=True)]
            svds = [reference.svd(table, self.mode == "circular") for table in tables]
            for name, value in (("v_y", svds[0].v), ("v_x", svds[1].v), ("power", _outer(svds[0].s, svds[1].s))):
                self.register_buffer(name, value)
        else:
            placed = torch.zeros(size, dtype=torch.float64)
            placed[: psf.shape[0], : psf.shape[1]] = psf
            self.register_buffer("power", torch.fft.rfft2(placed).abs().square())
            self.register_buffer("v_y", None)

    def forward(self, x: Tensor) -> Tensor:
        """A x for x (B, C, H, W)."""
        r_y, r_x = self.radius
        if self.mode != "valid":
            mode = "constant" if self.mode == "zeros" else self.mode
            x = F.pad(x, (r_x, r_x, r_y, r_y), mode=mode)
        return self._correlate(x, self.psf)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y for y of the shape of A x."""
        r_y, r_x = self.radius
        out = self._correlate(F.pad(y, (2 * r_x, 2 * r_x, 2 * r_y, 2 * r_y)), self.psf.flip(2, 3))
        if self.mode == "valid":
            return out
        return _fold(_fold(out, r_y, self.mode, -2), r_x, self.mode, -1)

    def normal(self, x: Tensor) -> Tensor:
        """AᵀA x."""
        return self.adjoint(self(x))

    def gradient(self, x: Tensor, d: Tensor, r: Tensor | None = None) -> Tensor:
        """Aᵀ(A x − d) + r."""
        g = self.adjoint(self(x) - d)
        return g if r is None else g + r

    def gradient_step(self, x: Tensor, d: Tensor, r: Tensor | None, step_size: float | Tensor) -> Tensor:
        """x − η(Aᵀ(A x − d) + r)."""
        return x - step_size * self.gradient(x, d, r)

    def eigenvalues(self, like: Tensor) -> Tensor:
        """The eigenvalues of AᵀA."""
        if self.size is None:
            raise ValueError("size is None; the layer solves with AᵀA + λI, so it takes the (H, W) of d")
        return self.power

    def coefficients(self, x: Tensor) -> Tensor:
        """V* x for x (B, C, H, W)."""
        if x.shape[-2:] != self.size:
            raise ValueError(f"x has shape {tuple(x.shape)}; it takes images of the size {self.size}")
        return torch.fft.rfft2(x) if self.v_y is None else self.v_y.T @ x @ self.v_x

    def image(self, coefficients: Tensor) -> Tensor:
        """V c."""
        if self.v_y is None:
            return torch.fft.irfft2(coefficients, s=self.size)
        return self.v_y @ coefficients @ self.v_x.T

    def _correlate(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Correlate every channel of x (B, C, H, W) with the kernel (1, 1, k_y, k_x), without padding."""
        channels = x.shape[1]
        return F.conv2d(x, kernel.expand(channels, -1, -1, -1), groups=channels)

    def extra_repr(self) -> str:
        return f"{self.described}, size={self.size}"


def _outer(s_y: Tensor, s_x: Tensor) -> Tensor:
    return s_y.square()[:, None] * s_x.square()


def _fold(x: Tensor, radius: int, mode: str, dim: int) -> Tensor:
    """The adjoint of padding by ``radius`` pixels along ``dim``: add each pixel of the margins to its source."""
    n = x.shape[dim] - 2 * radius
    out = x.narrow(dim, radius, n)
    if mode == "zeros" or not radius:
        return out
    before, after = x.narrow(dim, 0, radius), x.narrow(dim, radius + n, radius)
    if mode == "circular":
        first, last = after, before
    elif mode == "reflect":
        zero = torch.zeros_like(before.narrow(dim, 0, 1))
        first = torch.cat([zero, before.flip(dim)], dim)
        last = torch.cat([after.flip(dim), zero], dim)
    else:
        first, last = before.sum(dim, keepdim=True), after.sum(dim, keepdim=True)
    return out + _placed(first, n, dim, at_end=False) + _placed(last, n, dim, at_end=True)


def _placed(part: Tensor, n: int, dim: int, at_end: bool) -> Tensor:
    """``part`` at the beginning or the end of n zeros along ``dim``."""
    rest = n - part.shape[dim]
    sides = (rest, 0) if at_end else (0, rest)
    return F.pad(part, sides if dim == -1 else (0, 0, *sides))


class InferenceModule(nn.Module):
    """A trained implicit network as a plain one: a start, and a fixed number of evaluations of its layer.

    The iteration is Anderson acceleration without a safeguard, over all earlier evaluations, by Gram and Schmidt's
    orthogonalisation: sums and products only. Made by `inference_module`.
    """

    def __init__(self, model: ImplicitNetwork, evaluations: int) -> None:
        super().__init__()
        self.model = model
        self.evaluations = evaluations

    def forward(self, d: Tensor) -> Tensor:
        """The restored images for the measurements d (B, C, H, W), in the shape of Aᵀd."""
        injected = self.model.injected(d)
        x = self.model.start(d, *injected)
        shape = x.shape
        f = self.model.layer(x, d, *injected)
        directions: list[tuple[Tensor, Tensor, Tensor]] = []  # of residuals, of images, and the norms of the former
        earlier: tuple[Tensor, Tensor] | None = None
        for _ in range(self.evaluations - 1):
            image, residual = f.flatten(1), (f - x).flatten(1)
            if earlier is not None:
                q, p = residual - earlier[0], image - earlier[1]
                norm = q.square().sum(1, keepdim=True)
                for other, moved, size in directions:
                    share = (other * q).sum(1, keepdim=True) / size
                    q, p = q - share * other, p - share * moved
                size = q.square().sum(1, keepdim=True) + _REGULARISATION * norm + torch.finfo(q.dtype).tiny
                directions.append((q, p, size))
            earlier = residual, image
            following = image
            for q, p, size in directions:
                following = following - (q * residual).sum(1, keepdim=True) / size * p
            x = following.view(shape)
            f = self.model.layer(x, d, *injected)
        return self.model.image(f, d, *injected)


def inference_module(
    model: ImplicitNetwork, evaluations: int = 8, *, size: tuple[int, int] | None = None
) -> InferenceModule:
    """A copy of a trained model for other runtimes: ``evaluations`` of its layer in plain PyTorch, and no solver.

    torch.export, ``torch.onnx.export(module, (d,), "model.onnx", dynamo=True)`` and torch.compile take it. It has no
    custom kernels and no decisions that depend on values: each sample takes the same number of evaluations, and nothing
    checks that it converged. So choose ``evaluations`` by what the model needs (``model.solution.iterations``).

    Args:
        model: an `ImplicitNetwork` such as `DEGrad`, whose operator is a `SeparableBlur`, or a `Blur` that is separable
            or has the padding mode "circular" (a layer without preconditioner, filter and injection takes any `Blur`).
        evaluations: of the layer, at least 1.
        size: (H, W) of the measurements d. A layer with preconditioner, filter or injection needs it, and its module
            takes images of this size only, of at most 1024 pixels a side. Others take images of any size.

    Returns:
        A module in eval() that maps d (B, C, H, W) to the restored images; nothing in it is trained.

    Raises:
        TypeError: a model that is not an `ImplicitNetwork`, or another operator.
        ValueError: a value out of its range; no size where the layer needs one; a blur without a closed form there;
            another data fidelity than `LeastSquares`.

    Example:
        >>> import torch, jfbfast
        >>> model = jfbfast.DEGrad.from_pretrained("gaussian5-sigma1")
        >>> module = jfbfast.inference_module(model, evaluations=5, size=(32, 32))
        >>> program = torch.export.export(module, (torch.rand(1, 3, 32, 32),))
        >>> d = model.blur(torch.rand(1, 3, 32, 32))
        >>> torch.allclose(program.module()(d), module(d), atol=1e-5)
        True
    """
    if not isinstance(model, ImplicitNetwork):
        raise TypeError(f"model is a {type(model).__name__}; it takes an ImplicitNetwork, such as a DEGrad")
    checks.integer("evaluations", evaluations, 1)
    blur = model.blur
    if not isinstance(blur, (SeparableBlur, Blur)):
        raise TypeError(f"the model's operator is a {type(blur).__name__}; it takes a SeparableBlur or a Blur")
    fidelity = getattr(model, "data_fidelity", None)
    if not isinstance(fidelity, LeastSquares | None):
        kind = type(fidelity).__name__
        raise ValueError(f"data_fidelity is {kind}, which cannot be exported; it takes LeastSquares")
    inner = None
    if size is None and _solves(model):
        raise ValueError(
            "size is None; this model has a preconditioner, filter or injection, so inference_module takes "
            "size=(H, W) of d"
        )
    if size is not None:
        if not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"size is {size!r}; it takes (H, W)")
        for side in size:
            checks.integer("each side of size", side, 1, _LARGEST_SIDE)
        inner = (size[0] + 2 * blur.margin[0], size[1] + 2 * blur.margin[1])
        if isinstance(blur, Blur) and not blur._separable and blur.padding_mode != "circular":
            raise ValueError(
                f"padding_mode is {blur.padding_mode!r} and the blur is not separable, so (AᵀA + λI)⁻¹ has no closed "
                "form; it takes a separable blur or 'circular'"
            )
    like = next(model.parameters(), torch.empty(()))
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    copied.blur = PlainBlur(blur, inner).to(like.device, like.dtype)
    _fix_weights(copied)
    return InferenceModule(copied, evaluations).eval()


def _solves(model: ImplicitNetwork) -> bool:
    """Whether the layer solves with AᵀA + λI; only for the networks of this package is that known before a call."""
    needs = getattr(getattr(model, "regularizer", None), "needs", ())
    return bool({"solve", "filter"} & set(needs) or getattr(model, "preconditioner", None)) or isinstance(model, DEADMM)


def _fix_weights(model: nn.Module) -> None:
    """Replace every convolution whose weight is normalised by one with that weight."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, NormalisedConv2d):
                plain = nn.Conv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size,  # type: ignore[arg-type]
                    child.stride,  # type: ignore[arg-type]
                    child.padding,  # type: ignore[arg-type]
                    child.dilation,  # type: ignore[arg-type]
                    child.groups,
                    child.bias is not None,
                    child.padding_mode,
                )
                plain.weight = nn.Parameter(child.normalised_weight().detach(), requires_grad=False)
                plain.bias = child.bias
                setattr(parent, name, plain)
