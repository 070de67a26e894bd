"""A linear physics of deepinv as an operator, with the closed form of its (AᵀA + λI)⁻¹ where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jfbfast.backends.tensors import flat

ClosedForm = Callable[[Any, Tensor, Tensor], Tensor]


class PhysicsOperator(nn.Module):
    """A linear physics of deepinv, without its noise, as an operator with ``forward`` and ``adjoint``."""

    def __init__(self, physics: Any) -> None:
        super().__init__()
        self.physics = physics

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        return self.physics.A(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self.physics.A_adjoint(y)

    def gradient(self, x: Tensor, d: Tensor, r: Tensor | None = None) -> Tensor:
        """Aᵀ(A x − d) + r; None stands for r = 0."""
        g = self.adjoint(self(x) - d)
        return g if r is None else g + r

    def gradient_step(self, x: Tensor, d: Tensor, r: Tensor | None, step_size: float | Tensor) -> Tensor:
        """x − η(Aᵀ(A x − d) + r); None stands for r = 0."""
        return x - step_size * self.gradient(x, d, r)

    @torch.no_grad()
    def closed_solve(self, b: Tensor, damping: Tensor) -> Tensor | None:
        """(AᵀA + λI)⁻¹ b by the closed form of the physics; None if it has none that solves the equation.

        Each solution is checked, to the root of the machine epsilon: the class of a user may override A and inherit a
        closed form that is for another A.

        Args:
            b: images (B, …).
            damping: λ > 0, of shape () or (B, 1, …, 1), in the dtype of b.
        """
        form = _closed_form(self.physics)
        if form is None:
            return None
        try:
            x = form(self.physics, b, damping)
            residual = self.adjoint(self(x)) + damping * x - b
        except Exception:  # of any kind: such a form is not for these images, and conjugate gradients are
            return None
        off, size = flat(residual).norm(dim=1), flat(b).norm(dim=1)
        holds = (off <= torch.finfo(b.dtype).eps ** 0.5 * size) | ~size.isfinite()
        return x if x.shape == b.shape and bool(holds.all()) else None


def _closed_form(physics: Any) -> ClosedForm | None:
    """The closed form that a physics seems to have: by its singular values, or else its own ``prox_l2``."""
    if hasattr(physics, "mask") and all(hasattr(type(physics), m) for m in ("U", "U_adjoint", "V", "V_adjoint")):
        return _by_singular_values
    own = next((base for base in type(physics).__mro__ if "prox_l2" in vars(base)), None)
    return None if own is None or own.__name__ == "LinearPhysics" else _by_prox  # LinearPhysics iterates


def _by_singular_values(physics: Any, b: Tensor, damping: Tensor) -> Tensor:
    """V(Vᵀb ⊘ (|s|² + λ)) of a DecomposablePhysics, A = U diag(s)Vᵀ."""
    coefficients = physics.V_adjoint(b)
    power = torch.as_tensor(physics.mask, device=b.device).abs().square()
    return physics.V(coefficients / (power + damping.view(-1, *[1] * (coefficients.dim() - 1))))


def _by_prox(physics: Any, b: Tensor, damping: Tensor) -> Tensor:
    """γ argmin_x γ/2‖A x‖² + ½‖x − b‖² with γ = 1/λ."""
    gamma = 1 / damping
    return gamma * physics.prox_l2(b, torch.zeros_like(physics.A(b)), gamma)
