"""A linear physics of deepinv as an operator, with the closed form of its (AᵀA + λI)⁻¹ where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ClosedForm = Callable[[Any, Tensor, Tensor], Tensor]

_ROUNDING = 300  # times the machine epsilon: the largest relative residual of a closed form at a moderate λ

# Whether the closed form of a physics was found to hold, by the shape and the dtype of an image.
_verified: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()


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

    @torch.no_grad()
    def closed_solve(self, b: Tensor, damping: Tensor) -> Tensor | None:
        """(AᵀA + λI)⁻¹ b by the closed form of the physics; None if it has none.

        The closed form is used only if it solves the equation for a random b to rounding, which is checked once for
        each physics and image size: the class of a user may override A and inherit a closed form that is for another A.

        Args:
            b: images (B, …).
            damping: λ > 0, of shape () or (B, 1, …, 1), in the dtype of b.
        """
        form = _closed_form(self.physics)
        if form is None:
            return None
        known = _verified.setdefault(self.physics, {})
        key = (b.shape[1:], b.dtype)
        if key not in known:
            known[key] = _holds(form, self.physics, b)
        return form(self.physics, b, damping) if known[key] else None


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


def _holds(form: ClosedForm, physics: Any, b: Tensor) -> bool:
    """Whether a closed form solves (AᵀA + λI) x = r to rounding, for a random r with b's shape and two values of λ."""
    generator = torch.Generator(b.device).manual_seed(0)
    r = torch.randn(b.shape, generator=generator, dtype=b.dtype, device=b.device)
    dtypes = [b.dtype, *(t.dtype for t in _buffers(physics) if t.is_floating_point() or t.is_complex())]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    try:
        mean = (physics.A_adjoint(physics.A(r)) * r.conj()).sum().real / r.abs().square().sum()
        damping = mean * (1 - 0.5 * (torch.arange(len(b), device=b.device) % 2).to(mean.dtype))
        damping = damping.view(-1, *[1] * (b.dim() - 1))
        x = form(physics, r, damping)
        residual = physics.A_adjoint(physics.A(x)) + damping * x - r
    except Exception:  # of any kind: such a form is not for these images, and conjugate gradients are
        return False
    return x.shape == r.shape and bool(residual.norm() <= _ROUNDING * eps * r.norm())


def _buffers(physics: Any) -> list[Tensor]:
    return list(physics.buffers()) if isinstance(physics, nn.Module) else []
