"""The definition of every kernel in plain PyTorch, for any dtype and device.

A separable operator is A: X ↦ B₁ X B₂ᵀ. Each B is an n × n band matrix, stored as a table
``band[n, 2r + 1]``: row i holds the weights of the inputs i − r … i + r (correlation order, as
in conv2d). A padding mode only changes the table, and the adjoint has the transposed table.

Images of half precision are computed in float32, and all others in their own dtype. The tables have
the dtype of the computation (`compute_dtype`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast.backends.tensors import compute_dtype, margin, padded

PADDING_MODES = ("zeros", "reflect", "replicate", "circular", "valid")


class Bands(NamedTuple):
    """The contiguous tables of X ↦ B₁ X B₂ᵀ: ``y`` is [H, 2·r_y + 1], ``x`` is [W, 2·r_x + 1].

    The indices of a circular table wrap around modulo n, so several slots mean the same pixel if n < 2r + 1.
    In any other table the weight of an index outside [0, n) is zero.
    """

    y: Tensor
    x: Tensor
    circular: bool


def gaussian_taps(kernel_size: int, sigma: float) -> tuple[float, ...]:
    """The normalised samples exp(−t²/2σ²) at t = −r … r, with kernel_size = 2r + 1."""
    radius = kernel_size // 2
    weights = [math.exp(-0.5 * (t / sigma) ** 2) for t in range(-radius, radius + 1)]
    total = math.fsum(weights)
    return tuple(w / total for w in weights)


def band_table(taps: Sequence[float], n: int, padding_mode: str) -> Tensor:
    """The float64 table [n, 2r + 1] of a correlation with ``taps`` in one of the `PADDING_MODES`."""
    radius = len(taps) // 2
    weights = torch.tensor(taps, dtype=torch.float64).repeat(n, 1)
    if padding_mode == "circular":
        return weights
    rows = torch.arange(n)[:, None]
    target = rows + torch.arange(-radius, radius + 1)
    inside = (target >= 0) & (target < n)
    if padding_mode in ("zeros", "valid"):
        return weights * (inside if padding_mode == "zeros" else inside.all(1, keepdim=True))
    mirrored = (n - 1) - ((n - 1) - target.abs()).abs()
    source = mirrored if padding_mode == "reflect" else target.clamp(0, n - 1)
    return torch.zeros_like(weights).scatter_add_(1, source - rows + radius, weights)


def transpose_table(band: Tensor, circular: bool) -> Tensor:
    """The table of Bᵀ: bandᵀ[j, s] = band[j + s, −s]."""
    n, width = band.shape
    slots = torch.arange(-(width // 2), width // 2 + 1, device=band.device)
    rows = torch.arange(n, device=band.device)[:, None] + slots
    inside = torch.full_like(rows, True, dtype=torch.bool) if circular else (rows >= 0) & (rows < n)
    return band[rows % n, width // 2 - slots] * inside


def transpose(bands: Bands) -> Bands:
    """The tables of Aᵀ: X ↦ B₁ᵀ X B₂."""
    circular = bands.circular
    return Bands(transpose_table(bands.y, circular), transpose_table(bands.x, circular), circular)


def band_matrix(band: Tensor, circular: bool) -> Tensor:
    """The dense n × n matrix B of a table."""
    n, width = band.shape
    columns = torch.arange(n)[:, None] + torch.arange(-(width // 2), width // 2 + 1)
    if not circular:
        columns = columns.clamp(0, n - 1)  # the weights of the clamped indices are zero
    return torch.zeros(n, n, dtype=band.dtype).scatter_add_(1, columns % n, band)


def _correlate(x: Tensor, band: Tensor, circular: bool, dim: int) -> Tensor:
    """Σₛ band[i, s] · x[i + s] along ``dim``, −2 or −1."""
    n, width = band.shape
    radius = width // 2
    if circular:
        x = x.index_select(dim, torch.arange(-radius, n + radius, device=x.device) % n)
    else:
        x = F.pad(x, (radius, radius) if dim == -1 else (0, 0, radius, radius))
    weights = band if dim == -1 else band[..., None]
    terms = (weights[:, s] * x.narrow(dim, s, n) for s in range(width))
    return sum(terms, start=next(terms))


def blur(x: Tensor, bands: Bands) -> Tensor:
    """B₁ X B₂ᵀ for x (…, H, W)."""
    wide = x.to(bands.y.dtype)
    wide = _correlate(wide, bands.y, bands.circular, -2)
    return _correlate(wide, bands.x, bands.circular, -1).to(x.dtype)


def gradient(
    x: Tensor, d: Tensor | None, r: Tensor | None, bands: Bands, adjoint: Bands, step_size: Tensor | None = None
) -> Tensor:
    """g = Aᵀ(A x − d) + r for x, d, r (…, H, W), where None stands for zero; x − ηg if there is a step size η ().

    d may be smaller than x; it then lacks a margin of zeros on each side.
    """
    g = blur(x.to(bands.y.dtype), bands)
    g = blur(g if d is None else g - padded(d, margin(x, d)), adjoint)
    g = g if r is None else g + r
    return (g if step_size is None else x.to(g.dtype) - step_size * g).to(x.dtype)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    transformed: Tensor | None = None,
    adjoint: bool = False,
) -> Tensor:
    """Σ weight[o, c, i, j] · x[c, y + i − 1, z + j − 1] + bias[o], followed by a ReLU if ``relu``.

    Args:
        x: [B, C, H, W], padded with zeros.
        weight: [O, C, 3, 3].
        bias: [O].
        transformed: the weight as transformed for the C++ kernel; it is ignored here.
        adjoint: whether the weight is [C, O, 3, 3], that of the convolution whose adjoint is to be computed.
    """
    weight = weight.transpose(0, 1).flip(2, 3) if adjoint else weight
    out = F.conv2d(x, weight, bias, padding=1)
    return out.relu_() if relu else out


def conv3x3_weight_gradient(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `conv3x3`'s weight [O, C, 3, 3] and bias [O] from ``gradient`` [B, O, H, W], without ReLU."""
    weight = x.new_empty(gradient.shape[1], x.shape[1], 3, 3)
    _, to_weight, to_bias = torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, True)
    )
    return to_weight, to_bias


def add_relu(out: Tensor, bias: Tensor | None, addend: Tensor | None, relu: bool) -> Tensor:
    """out + bias + addend and a ReLU, written over ``out`` (B, C, H, W); bias (C,), and an addend like ``out``."""
    if bias is not None:
        out.add_(bias[:, None, None])
    if addend is not None:
        out.add_(addend)
    return out.relu_() if relu else out


class SVD(NamedTuple):
    """B = U diag(s) Vᵀ, each factor [n, n] or [n]."""

    u: Tensor
    s: Tensor
    v: Tensor


def svd(band: Tensor, circular: bool) -> SVD:
    """The float64 factors of one band matrix.

    A symmetric filter maps even vectors to even ones, and odd to odd, in every padding mode. Two decompositions of half
    the size then take a quarter of the time.
    """
    matrix = band_matrix(band, circular)
    n, half = len(matrix), len(matrix) // 2
    if n == 1 or not torch.equal(matrix, matrix.flip(0, 1)):
        u, s, vh = torch.linalg.svd(matrix)
        return SVD(u, s, vh.T.contiguous())
    # In the basis of (eᵢ ± eₙ₋₁₋ᵢ)/√2, and the middle pixel of an odd n, which is even.
    upper, mirrored, root = matrix[:half], matrix[:half].flip(1), math.sqrt(0.5)
    even = matrix.new_empty(n - half, n - half)
    even[:half, :half] = upper[:, :half] + mirrored[:, :half]
    even[half:, half:] = matrix[half : n - half, half : n - half]
    even[:half, half:] = upper[:, half : n - half] / root
    even[half:, :half] = matrix[half : n - half, :half] / root
    factors = torch.linalg.svd(even), torch.linalg.svd(upper[:, :half] - mirrored[:, :half])
    s, order = torch.cat([factors[0].S, factors[1].S]).sort(descending=True)

    def vectors(even: Tensor, odd: Tensor) -> Tensor:
        found = matrix.new_zeros(n, n)
        found[:half, : n - half], found[n - half :, : n - half] = root * even[:half], root * even[:half].flip(0)
        found[half : n - half, : n - half] = even[half:]
        found[:half, n - half :], found[n - half :, n - half :] = root * odd, -root * odd.flip(0)
        return found[:, order]

    return SVD(vectors(factors[0].U, factors[1].U), s, vectors(factors[0].Vh.T, factors[1].Vh.T))


def change_basis(x: Tensor, svd_y: SVD, svd_x: SVD, back: bool) -> Tensor:
    """V₁ᵀ x V₂ for x (…, H, W), or V₁ x V₂ᵀ if ``back``, in the dtype of the factors."""
    v_y, v_x = svd_y.v, svd_x.v
    x = x.to(v_y.dtype)
    return v_y @ x @ v_x.T if back else v_y.T @ x @ v_x


def eigenvalues(svd_y: SVD, svd_x: SVD) -> Tensor:
    """s₁² s₂²ᵀ, the eigenvalues of AᵀA, [H, W]."""
    return svd_y.s[:, None] ** 2 * svd_x.s**2


def tikhonov(b: Tensor, damping: Tensor, svd_y: SVD, svd_x: SVD) -> Tensor:
    """(AᵀA + λI)⁻¹ b = V₁[(V₁ᵀ b V₂) ⊘ (s₁² s₂²ᵀ + λ)]V₂ᵀ for b (…, H, W)."""
    coefficients = change_basis(b, svd_y, svd_x, back=False) / (eigenvalues(svd_y, svd_x) + damping)
    return change_basis(coefficients, svd_y, svd_x, back=True).to(b.dtype)


def anderson_append(x: Tensor, f: Tensor, residuals: Tensor, gram: Tensor, slot: int, filled: int) -> Tensor:
    """Add the newest pair (x, f = T(x)) to the history, in one pass over the residuals.

    Writes ``residuals[slot] = f − x`` and the Gram row and column ``gram[:, slot]``.

    Args:
        x, f: [B, N].
        residuals: [m, B, N], in the dtype of x or in bfloat16; the first ``filled`` slots are in use,
            including the newest, ``slot``.
        gram: [B, m, m] in float64, ⟨gᵢ, gⱼ⟩ of the stored residuals.

    Returns:
        ‖f − x‖ and ‖f‖ of each sample, [B, 2] in float64, before the residual is rounded for the history.
    """
    wide = compute_dtype(x.dtype)
    g = f.to(wide) - x.to(wide)
    residuals[slot] = g
    row = torch.einsum("bn,mbn->bm", residuals[slot].double(), residuals[:filled].double())
    gram[:, slot, :filled] = row
    gram[:, :filled, slot] = row
    return torch.stack((g.double().square().sum(1), f.double().square().sum(1)), dim=1).sqrt()


def anderson_weights(gram: Tensor, valid: Tensor, regularization: float) -> Tensor:
    """argmin_α ‖Σ αᵢ gᵢ‖² + ε Σ αᵢ²‖gᵢ‖² with Σ αᵢ = 1, over the valid pairs of each sample.

    Args:
        gram: [B, m, m] in float64.
        valid: [B, m], bool; at least one True for each sample.

    Returns:
        α, [B, m] in float64, zero where not valid.
    """
    norm = gram.diagonal(dim1=1, dim2=2).sqrt()
    inverse = torch.where(valid & (norm > 0), 1 / norm, 0)
    cosines = gram * inverse[:, :, None] * inverse[:, None, :]
    cosines = cosines.where(valid[:, :, None] & valid[:, None, :], 0)
    system = cosines + torch.diag_embed(torch.where(inverse > 0, regularization, 1.0))
    alpha = torch.linalg.solve_ex(system, inverse)[0] * inverse
    return alpha / alpha.sum(1, keepdim=True)


def anderson_mix(alpha: Tensor, images: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Σ αᵢ fᵢ, the next iterate, for α [B, m] and m images [B, N]; it is written to ``out`` if given."""
    wide = compute_dtype(images[0].dtype)
    mixed = torch.zeros_like(images[0], dtype=wide)
    for weight, image in zip(alpha.T.to(wide), images, strict=True):
        mixed.addcmul_(weight[:, None], image.to(wide))
    return mixed.to(images[0].dtype) if out is None else out.copy_(mixed)


def anderson_mix_differences(
    alpha: Tensor, f: Tensor, previous: Tensor | None, differences: Tensor, slot: int, out: Tensor | None = None
) -> Tensor:
    """Σ αᵢ fᵢ = f − Σⱼ cⱼ (fⱼ − fⱼ₋₁), cⱼ = Σ_{i<j} αᵢ, for a history that keeps differences of images.

    The history is a ring: the newest pair is in ``slot``, the one before it in ``slot − 1`` modulo m. Writes
    ``differences[slot] = f − previous``, rounded to the dtype of the history.

    Args:
        alpha: [B, filled] by slot, from `anderson_weights`.
        f, previous: [B, N], the newest image and the one before it, None if there is none.
        differences: [m, B, N], in the images' dtype or in bfloat16.
    """
    memory, filled = len(differences), alpha.shape[1]
    out = f.clone() if out is None else out.copy_(f)
    if previous is None or filled == 1:
        return out
    newest = f - previous
    differences[slot] = newest
    ring = [(slot - age) % memory for age in range(filled)]
    weights = 1 - alpha[:, ring[:-1]].cumsum(1)
    older = (differences[j].to(out.dtype) for j in ring[1:-1])
    for weight, difference in zip(weights.T.to(out.dtype), (newest, *older), strict=True):
        out.addcmul_(weight[:, None], difference, value=-1)
    return out
