"""Solve the linear systems A w = b of a batch by Krylov methods, with one product for all samples at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast.backends.tensors import flat

Product = Callable[[Tensor], Tensor]


class LinearSolution(NamedTuple):
    """What a linear solver found, in the order of the batch.

    Attributes:
        value: w, of b's shape; b itself for a sample whose b is not finite.
        residual: ‖A w − b‖ / ‖b‖ by the method's own recurrence, (B,), float64; 0 if b = 0, and NaN
            if b is not finite.
    """

    value: Tensor
    residual: Tensor


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(1, dtype=torch.float64)


def _norm(u: Tensor) -> Tensor:
    return torch.linalg.vector_norm(u, dim=1, dtype=torch.float64)


def _over(numerator: Tensor, denominator: Tensor, where: Tensor) -> Tensor:
    """The quotient where ``where`` is true, and 0 elsewhere, even where the operands are not finite."""
    return torch.where(where, numerator / denominator.where(where, 1.0), 0.0)


def _scaled(u: Tensor, factor: Tensor) -> Tensor:
    """The rows of u times their factors; a factor of 0 gives 0 even where u is not finite."""
    factor = factor.to(u.dtype)[:, None]
    return torch.where(factor != 0, u * factor, 0.0)


def _normalised(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """b as rows of norm 1, the norms, and a mask of the systems to solve: b is finite and not 0."""
    rows = flat(b)
    norm = _norm(rows)
    running = (norm > 0) & norm.isfinite()
    return _scaled(rows, _over(torch.ones_like(norm), norm, running)), norm, running


def _finished(b: Tensor, norm: Tensor, w: Tensor, residual: Tensor) -> LinearSolution:
    finite = norm.isfinite()
    value = torch.where(finite[:, None], _scaled(w, norm), b.reshape(w.shape)).view(b.shape)
    return LinearSolution(value, residual.where(finite, torch.nan))


def gmres(product: Product, b: Tensor, tol: float, max_iter: int) -> LinearSolution:
    """Solve A w = b by GMRES without restarts (Saad and Schultz, 1986), from w = 0.

    Modified Gram–Schmidt is applied twice; inner products and the small least-squares problem are in float64. A
    sample stops at ‖A w − b‖ ≤ tol ‖b‖, or if its product is not finite or its system is singular.

    Args:
        product: w ↦ A w, (B, …) to the same shape, sample by sample.
        b: (B, …), float32 or float64.
        tol: of the relative residual, at least 0.
        max_iter: the most products; memory grows by one w in each.
    """
    right, norm, running = _normalised(b)
    residual = running.double()
    basis = [right]
    reflections: list[tuple[Tensor, Tensor]] = []  # they make the Hessenberg matrix triangular
    columns: list[Tensor] = []  # the columns of the triangular matrix
    reflected: list[Tensor] = []  # the right-hand side e₁ after the reflections

    while len(columns) < max_iter and running.any():
        w = product(basis[-1].view(b.shape)).reshape(right.shape)
        image = _norm(w)
        column = [torch.zeros_like(norm) for _ in basis]
        for _ in range(2):
            for i, v in enumerate(basis):
                overlap = _dot(v, w)
                column[i] = column[i] + overlap
                w = w - overlap.to(w.dtype)[:, None] * v
        rounding = torch.finfo(w.dtype).eps * image
        height = _norm(w)
        height = height.where(height > rounding, 0.0)  # 0: the Krylov space is complete

        for i, (cosine, sine) in enumerate(reflections):
            column[i : i + 2] = cosine * column[i] + sine * column[i + 1], sine * column[i] - cosine * column[i + 1]
        diagonal = torch.hypot(column[-1], height)
        running = running & image.isfinite() & (diagonal > rounding)
        cosine, sine = _over(column[-1], diagonal, running), _over(height, diagonal, running)
        reflections.append((cosine, sine))
        columns.append(torch.stack([*(c.where(running, 0.0) for c in column[:-1]), diagonal.where(running, 1.0)], 1))
        reflected.append(cosine * residual)
        residual = torch.where(running, sine * residual, residual)
        running = running & (residual > tol)
        basis.append(_scaled(w, _over(torch.ones_like(height), height, running)))

    value = torch.zeros_like(right)
    if columns:
        triangle = torch.stack([F.pad(c, (0, len(columns) - c.shape[1])) for c in columns], 2)
        weights = torch.linalg.solve_triangular(triangle, torch.stack(reflected, 1)[..., None], upper=True)
        for v, weight in zip(basis, weights.squeeze(2).unbind(1), strict=False):
            value = value + _scaled(v, weight)
    return _finished(b, norm, value, residual)


def cgls(product: Product, transposed: Product, b: Tensor, tol: float, max_iter: int) -> LinearSolution:
    """Solve A w = b by CGLS (Björck, 1996), the stable form of conjugate gradients on AᵀA w = Aᵀb, from w = 0.

    A sample stops at ‖A w − b‖ ≤ tol ‖b‖, or if its products are not finite.

    Args:
        product: w ↦ A w, (B, …) to the same shape, sample by sample.
        transposed: r ↦ Aᵀ r.
        b: (B, …), float32 or float64.
        tol: of the relative residual, at least 0.
        max_iter: the most iterations, each with one product with A and one with Aᵀ.
    """
    r, norm, running = _normalised(b)
    residual = running.double()
    w = torch.zeros_like(r)
    p = torch.zeros_like(r)
    previous = torch.ones_like(norm)

    for _ in range(max_iter):
        if not running.any():
            break
        s = transposed(r.view(b.shape)).reshape(r.shape)
        square = _dot(s, s)
        running = running & square.isfinite() & (square > 0)
        p = _scaled(s, running.double()) + _scaled(p, _over(square, previous, running))
        q = product(p.view(b.shape)).reshape(r.shape)
        curvature = _dot(q, q)
        running = running & curvature.isfinite() & (curvature > 0)
        step = _over(square, curvature, running)
        w, r = w + _scaled(p, step), r - _scaled(q, step)
        residual = torch.where(running, _norm(r), residual)
        running = running & (residual > tol)
        previous = square.where(running, 1.0)
    return _finished(b, norm, w, residual)
