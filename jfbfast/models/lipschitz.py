"""Normalised convolutions: the paper's spectral normalisation, and one that bounds the convolution's norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jfbfast.implicit.frozen import NormalisedConv2d, grouped

_SAMPLES_PER_TAP = 12  # frequencies, along each axis
_EPSILON = 1e-12  # the least norm to divide by, as in torch's normalize
_GRAM_STEPS = 6  # the bound at one frequency is its Schatten norm of order 2⁷


class SpectralNormConv2d(NormalisedConv2d):
    """Conv2d with the weight W/σ(W), σ the largest singular value of W as an (out, in·k·k) matrix.

    σ = uᵀWv by power iteration (Miyato et al., 2018): one step in each forward in train(), none in eval().
    It is no bound on the convolution's norm, which can be k times as large. Arguments as in torch.nn.Conv2d.
    """

    u: Tensor
    v: Tensor
    iterated = ("u", "v")

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        matrix = self.weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(matrix.shape[1]), dim=0))
        self.converge()

    def converge(self) -> None:
        """Take many power iterations at once, after the weight was replaced."""
        for _ in range(15):
            self.power_iteration()

    @torch.inference_mode(False)
    @torch.no_grad()
    def power_iteration(self) -> None:
        """One step: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖."""
        with _full_precision(self.weight):
            matrix = self.weight.flatten(1)
            self.u = F.normalize(matrix @ self.v, dim=0)
            self.v = F.normalize(matrix.T @ self.u, dim=0)

    def normalised_weight(self) -> Tensor:
        """W/σ(W), differentiable in W."""
        with _full_precision(self.weight):
            return self.weight / torch.dot(self.u, self.weight.flatten(1) @ self.v)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def power_iterations(cls, convolutions: Sequence[SpectralNormConv2d]) -> None:
        """The `power_iteration` of several, those with weights of one shape in one batch."""
        for group in grouped(convolutions, _kind_of_weight):
            matrices, v = _stacked(group, "weight").flatten(2), _stacked(group, "v")[:, None]
            with _full_precision(v):  # vectors as rows, since products with a column are slow on CPUs
                u = F.normalize(v @ matrices.mT, dim=2)
                v = F.normalize(u @ matrices, dim=2)
            for conv, each_u, each_v in zip(group, u[:, 0], v[:, 0], strict=True):
                conv.u, conv.v = each_u, each_v

    @classmethod
    def normalised_weights(cls, convolutions: Sequence[SpectralNormConv2d]) -> list[Tensor]:
        """The `normalised_weight` of several, those with weights of one shape in one batch."""
        found: dict[SpectralNormConv2d, Tensor] = {}
        for group in grouped(convolutions, _kind_of_weight):
            u, v = _stacked(group, "u")[:, None], _stacked(group, "v")[:, None]
            with _full_precision(u):
                found.update(zip(group, _Quotients.apply(u, v, *[conv.weight for conv in group]), strict=True))
        return [found[conv] for conv in convolutions]


class _Quotients(torch.autograd.Function):
    """W/σ for n weights W of one shape, with σ = uᵀWv for constant u (n, 1, out) and v (n, 1, in·k·k).

    In few passes over the weights, which autograd's own rules for the same formula take many more of.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        quotients = torch.stack(weights)
        norms = u @ quotients.flatten(2) @ v.mT  # (n, 1, 1)
        quotients /= norms[..., None, None]
        ctx.save_for_backward(u, v, norms, quotients)
        ctx.set_materialize_grads(False)  # so that a weight that the layer does not use gets none
        return quotients.unbind()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """(G − ⟨G, W/σ⟩ u vᵀ)/σ for the gradient G of W/σ."""
        u, v, norms, quotients = ctx.saved_tensors
        gradient = torch.stack([torch.zeros_like(quotients[0]) if g is None else g for g in gradients])
        product = (gradient * quotients).flatten(2).sum((1, 2), keepdim=True)
        rank_one = (u * (product / norms)).mT @ v
        found = (gradient / norms[..., None, None]).sub_(rank_one.view_as(gradient)).unbind()
        return None, None, *(None if g is None else each for g, each in zip(gradients, found, strict=True))


def _full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """The context without autocast, which the meta device does not have."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _stacked(convolutions: Sequence[nn.Module], name: str) -> Tensor:
    """The convolutions' tensors of one name as (n, …); a single one without a copy."""
    tensors = [getattr(conv, name) for conv in convolutions]
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _kind_of_weight(conv: nn.Conv2d) -> tuple[object, ...]:
    """What the weights of convolutions must share for one batch."""
    return conv.weight.shape, conv.weight.dtype, conv.weight.device


class NonexpansiveConv2d(NormalisedConv2d):
    """Conv2d with the weight W/σ, σ the `convolution_norm_bound` of W: 1-Lipschitz for images of every size.

    Arguments as in torch.nn.Conv2d, with groups=1 and padding_mode "zeros" or "circular".

    Raises:
        ValueError: several groups, or a padding mode that repeats pixels.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if self.groups != 1:
            raise ValueError(f"groups is {self.groups}; it takes 1")
        if self.padding_mode not in ("zeros", "circular"):
            raise ValueError(f"padding_mode is {self.padding_mode!r}; it takes 'zeros' or 'circular'")

    def normalised_weight(self) -> Tensor:
        """W/σ, differentiable in W."""
        bound = convolution_norm_bound(self.weight)
        return (self.weight / bound.clamp_min(_EPSILON)).to(self.weight.dtype)


class MaxMin(nn.Module):
    """(a, b) ↦ (max(a, b), min(a, b)) for the two halves a, b of the channels (Anil et al., 2019).

    It is 1-Lipschitz, and unlike ReLU it preserves the norm of a gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, C, …), with C even, to the same shape."""
        a, b = x.chunk(2, dim=1)
        return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=1)


def convolution_norm_bound(weight: Tensor) -> Tensor:
    """An upper bound on the norm of the convolution by ``weight``, for images of every size.

    It is too large by at most 2% with one channel and 5% with 64.

    With zero or circular padding, and any stride or dilation, the norm of a convolution is at most
    σ* = max over θ of σ(Ŵ(θ)), where Ŵ(θ) = Σ W[:, :, k] exp(−ikθ) is its (out, in) transfer matrix: zero padding
    makes it a block of the convolution on the infinite grid, and circular padding samples some of the θ.

    *Over the frequencies*: let u, v be the first singular vectors at the maximum θ*. The function
    Re(uᴴŴ(θ)v), with k centred, has degree r = (K − 1)/2 along each axis and its largest value, σ*, at θ*.
    By Riesz's lemma it is at least cos(r(θ − θ*))σ* nearby. One of N points along an axis lies within π/N, so
    σ* ≤ max over the grid of σ(Ŵ(θ)) / (cos(πr_y/N_y) cos(πr_x/N_x)). With N = 12(K − 1) the denominator is
    cos²(π/24) = 0.983.

    *At one frequency*: σ(Ŵ) ≤ ‖(ŴᴴŴ)^(2ᵗ⁻¹)‖_F^(2⁻ᵗ), by t = 6 squarings (Gram iteration, Delattre et
    al., 2023), which is too large by a factor of at most min(in, out)^(1/128), 3% with 64 channels.

    Args:
        weight: (out, in, K_y, K_x).

    Returns:
        The bound, a tensor of shape () in float32 or float64. Its gradient is the one at the largest frequency.
    """
    with _full_precision(weight):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        taps = weight.shape[-2:]
        grid = [max(1, _SAMPLES_PER_TAP * (k - 1)) for k in taps]
        transfer = torch.fft.rfft2(wide, s=grid).flatten(2)  # the other half of the grid is conjugate
        with torch.no_grad():
            largest = _gram_bound(transfer.permute(2, 0, 1)).argmax()
        bound = _gram_bound(transfer.index_select(2, largest[None]).permute(2, 0, 1)).squeeze(0)
        return bound / math.prod(math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(taps, grid, strict=True))


def _gram_bound(matrices: Tensor) -> Tensor:
    """‖(MᴴM)^(2ᵗ⁻¹)‖_F^(2⁻ᵗ) ≥ σ(M) for each matrix M of (F, m, n), as a tensor (F,)."""
    tiny = torch.finfo(matrices.dtype).tiny
    gram = matrices.mH if matrices.shape[-2] < matrices.shape[-1] else matrices
    scale = torch.zeros((), device=matrices.device)  # logarithm of the factors that were divided out
    for _ in range(_GRAM_STEPS):
        norm = torch.linalg.matrix_norm(gram).clamp_min(tiny)
        gram = gram / norm[:, None, None]
        gram = gram.mH @ gram
        scale = 2 * (scale + norm.log())
    norm = torch.linalg.matrix_norm(gram).clamp_min(tiny)
    return torch.exp((scale + norm.log()) / 2**_GRAM_STEPS)
