"""Conjugate gradients for the Tikhonov system (AᵀA + λI) x = b, many systems side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jfbfast.convergence import warn_unconverged

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.complex64: 1e-6, torch.complex128: 1e-12}
_CUDA_POLL = 4  # how many iterations pass before the host waits for a GPU to see whether every system is done


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    b: Tensor,
    damping: Tensor,
    tol: float,
    max_iter: int,
    *,
    dims: tuple[int, ...],
    goal: str,
    precondition: Callable[[Tensor], Tensor] = lambda r: r,
    norm: Tensor | None = None,
) -> Tensor:
    """(AᵀA + λI)⁻¹ b from a start at zero; each system has its own step lengths and stops by itself.

    Args:
        normal: x ↦ AᵀA x, for each system by itself.
        b: the right-hand sides, float32, float64 or complex.
        damping: λ, broadcastable against b and constant within a system.
        tol: a system stops where ‖b − (AᵀA + λI) x‖ ≤ tol·‖b‖.
        max_iter: the largest number of applications of ``normal``.
        dims: the dimensions of one system; the others count the systems.
        goal: what the warning says of the systems that failed, after their number: "images did not reach …".
        precondition: r ↦ M⁻¹ r, M symmetric positive definite.
        norm: what takes the place of ‖b‖ in the stopping rule, one for each system.

    Returns:
        x, all NaN for a system with a b that is not finite.

    Warns:
        ConvergenceWarning: some systems did not reach ``tol``.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u.conj() * v).sum(dims, keepdim=True).real

    x = torch.zeros_like(b)
    r = b.clone()
    z = precondition(r)
    p = z
    rz = dot(r, z)
    bound = tol**2 * (dot(b, b) if norm is None else norm**2)
    active = dot(r, r) > bound  # False for a system with NaN, too
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
    if active.any():
        warn_unconverged(
            f"{int(active.sum())} of {active.numel()} {goal} in {max_iter} iterations of conjugate gradients"
        )
    return torch.where(torch.isfinite(bound), x, torch.nan)
