"""Conjugate gradients for the Tikhonov system (AᵀA + λI) x = b, many systems side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
_CUDA_POLL = 4  # iterations between two looks at whether every system is done


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    b: Tensor,
    damping: Tensor,
    *,
    tol: float,
    max_iter: int,
    dims: tuple[int, ...],
    precondition: Callable[[Tensor], Tensor] = lambda r: r,
) -> tuple[Tensor, Tensor]:
    """(AᵀA + λI)⁻¹ b from a start at zero, each system with its own steps and its own stop.

    Args:
        normal: x ↦ AᵀA x, which treats each system by itself.
        b: the right-hand sides, float32 or float64.
        damping: λ, broadcastable against b and the same throughout a system.
        tol: a system stops where ‖b − (AᵀA + λI) x‖ ≤ tol·‖b‖.
        max_iter: applications of ``normal`` at most.
        dims: the dimensions that make up one system; the others count systems.
        precondition: r ↦ M⁻¹ r, M symmetric positive definite.

    Returns:
        x, NaN throughout a system whose b is not finite; and a mask of the systems that did not reach
        ``tol``, of size 1 in ``dims``.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(dims, keepdim=True)

    x = torch.zeros_like(b)
    r = b.clone()
    z = precondition(r)
    p = z
    rz = dot(r, z)
    bound = tol**2 * dot(b, b)
    active = dot(r, r) > bound  # False for a system that holds NaN, too
    for iteration in range(max_iter):
        if (b.device.type == "cpu" or iteration % _CUDA_POLL == 0) and not active.any():
            break
        q = normal(p) + damping * p
        step = torch.where(active, rz / dot(p, q), 0)
        x += step * p
        r = r - step * q
        z = precondition(r)
        previous, rz = rz, dot(r, z)
        p = z + torch.where(active, rz / previous, 0) * p
        active = dot(r, r) > bound
    return torch.where(torch.isfinite(bound), x, torch.nan), active
