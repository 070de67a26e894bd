"""The classical methods of the paper's comparison: direct inverse, and gradient descent stopped early."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast.iterative import LinearOperator
from jfbfast.operators import SeparableBlur


def direct_inverse(blur: SeparableBlur, d: Tensor) -> Tensor:
    """A⁻¹ d for d (…, H, W), through the SVD of each band matrix; the noise is amplified, not filtered.

    Raises:
        ValueError: A is numerically singular at this size and dtype, or a side is over 1024 pixels.
    """
    return blur.inverse(d)


class Descent(NamedTuple):
    """A gradient descent's end: the images and, for each sample, the steps it took."""

    value: Tensor
    iterations: Tensor


@torch.no_grad()
def gradient_descent(
    blur: LinearOperator,
    d: Tensor,
    *,
    weight: float = 0.0,
    step_size: float = 1.0,
    max_iter: int = 100,
    noise: float | None = None,
) -> Descent:
    """Gradient descent on ½‖A x − d‖² + λ/2‖x‖² from x = Aᵀd, stopped early.

    x ← x − η(Aᵀ(A x − d) + λ x). A sample stops where its residual ‖A x − d‖ reaches that of the
    noise, σ√n (Morozov's discrepancy principle), and otherwise after ``max_iter`` steps.

    Args:
        blur: A.
        d: the measurements, (B, …).
        weight: λ ≥ 0.
        step_size: η > 0; below 2/(‖A‖² + λ) the descent converges.
        max_iter: steps at most, at least 1.
        noise: σ ≥ 0, the noise's standard deviation in d's units; None runs to ``max_iter``.

    Raises:
        ValueError: a value out of its range.
    """
    for name, value, positive in (
        ("weight", weight, False),
        ("step_size", step_size, True),
        ("noise", noise, False),
    ):
        if value is not None and not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
            raise ValueError(f"{name} is {value}; it takes a {'positive' if positive else 'non-negative'} number")
    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}; it takes an integer of at least 1")
    per_sample = (-1, *[1] * (d.dim() - 1))
    x = blur.adjoint(d)
    active = torch.ones(len(d), dtype=torch.bool, device=d.device)
    iterations = torch.zeros(len(d), dtype=torch.long, device=d.device)
    bound = 0.0 if noise is None else noise * math.sqrt(d[0].numel() if len(d) else 0)
    for _ in range(max_iter):
        residual = blur(x) - d
        active = active & (residual.flatten(1).norm(dim=1) > bound)
        if not active.any():
            break
        x = torch.where(active.view(per_sample), x - step_size * (blur.adjoint(residual) + weight * x), x)
        iterations += active
    return Descent(x, iterations)


@torch.no_grad()
def tikhonov(blur: SeparableBlur, d: Tensor, damping: float | Tensor) -> Tensor:
    """argmin ½‖A x − d‖² + λ/2‖x‖² = (AᵀA + λI)⁻¹Aᵀd for d (…, H, W)."""
    return blur.solve(blur.adjoint(d), damping)


@torch.no_grad()
def discrepancy_damping(blur: SeparableBlur, d: Tensor, noise: float) -> float:
    """The λ at which Tikhonov's residual ‖A x − d‖ over the whole of d is that of the noise, σ√n.

    Morozov's discrepancy principle, by bisection on log λ between 1e-8 and 1e2; the residual grows
    with λ.

    Args:
        blur: A.
        d: measurements (…, H, W).
        noise: σ > 0, the noise's standard deviation in d's units.
    """
    if not 0 < noise < math.inf:
        raise ValueError(f"noise is {noise}; it takes a positive number")
    bound = noise * math.sqrt(d.numel())
    low, high = math.log(1e-8), math.log(1e2)
    for _ in range(30):
        middle = (low + high) / 2
        residual = float((blur(tikhonov(blur, d, math.exp(middle))) - d).double().norm())
        low, high = (middle, high) if residual < bound else (low, middle)
    return math.exp(low)
