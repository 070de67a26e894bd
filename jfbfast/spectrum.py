"""The spectrum of a layer's Jacobian ∂T/∂x at a point, sample by sample, from products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.reference import band_dtype, flat
from jfbfast.implicit.frozen import frozen, materialised_weights, owner
from jfbfast.implicit.jacobian import Linearisation
from jfbfast.solvers import Layer

__all__ = ["contraction_factor", "operator_norm", "optimal_averaging", "ritz_values"]

_SEED = 0  # of the start vector, one for every sample: a sample's result does not depend on its batch


@contextmanager
def linearised(layer: Layer, x: Tensor, inputs: Sequence[Tensor] = ()) -> Iterator[Linearisation]:
    """∂T/∂x at x, within which the layer's module is held still; the arguments as in `ritz_values`."""
    module = owner(layer)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(x.device.type, enabled=False),
        frozen(module),
        materialised_weights(module),
    ):
        leaf = x.detach().clone().requires_grad_()
        out = layer(leaf, *(value.detach().clone() for value in inputs))
        if out.shape != x.shape:
            raise ValueError(
                f"layer maps shape {tuple(x.shape)} to {tuple(out.shape)}; it takes a layer that keeps the shape"
            )
        yield Linearisation(out.to(x.dtype), (leaf,))


def _flat(x: Tensor) -> Tensor:
    """(B, N), in a dtype to orthogonalise in."""
    return flat(x.detach()).to(band_dtype(x.dtype))


def _like(x: Tensor, w: Tensor) -> Tensor:
    return w.reshape(x.shape).to(x.dtype)


def _unit(w: Tensor) -> Tensor:
    return F.normalize(w, dim=1, eps=torch.finfo(w.dtype).tiny)


def arnoldi(operator: Callable[[Tensor], Tensor], like: Tensor, steps: int) -> Tensor:
    """The compressions QᵀGQ of each sample's linear map G to its Krylov space, (B, k, k), k = min(steps, N).

    Where a Krylov space is invariant before k steps, it goes on with a new random vector.

    Args:
        operator: G, (B, N) to (B, N), sample by sample.
        like: a tensor (B, N) of the vectors' dtype and device.
        steps: k, at least 1.

    Raises:
        ValueError: ``steps`` below 1.
    """
    checks.integer("steps", steps, 1)
    batch, n = like.shape
    k = min(steps, n)
    random = torch.Generator(like.device).manual_seed(_SEED)
    basis = like.new_zeros(batch, k + 1, n)
    h = like.new_zeros(batch, k + 1, k)

    def fresh() -> Tensor:
        return torch.randn(n, dtype=like.dtype, device=like.device, generator=random).expand(batch, n)

    def orthogonalised(w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        coefficients = torch.zeros_like(q[:, :, 0])
        for _ in range(2):  # once leaves rounding errors of the size of w
            c = torch.einsum("bkn,bn->bk", q, w)
            w, coefficients = w - torch.einsum("bkn,bk->bn", q, c), coefficients + c
        return w, coefficients

    basis[:, 0] = _unit(fresh())
    for j in range(k):
        image = operator(basis[:, j]).to(like.dtype)
        w, h[:, : j + 1, j] = orthogonalised(image, basis[:, : j + 1])
        length = w.norm(dim=1)
        invariant = length <= 100 * torch.finfo(w.dtype).eps * image.norm(dim=1)
        if invariant.any() and j + 1 < n:
            w = torch.where(invariant[:, None], orthogonalised(fresh(), basis[:, : j + 1])[0], w)
        h[:, j + 1, j] = length.masked_fill(invariant, 0)
        basis[:, j + 1] = _unit(w)
    return h[:, :k]


def ritz_values(layer: Layer, x: Tensor, inputs: Sequence[Tensor] = (), steps: int = 60) -> Tensor:
    """Ritz values of ∂T/∂x at x, by Arnoldi's method on its transpose: they approximate the outer eigenvalues.

    Exact from steps = N on, N the numbers of a sample.

    Args:
        layer: T(x, *inputs), (B, …) to the same shape, sample by sample: a module, a module's method
            or any callable. Its module is held still, as in a solve.
        x: the point, (B, …).
        inputs: tensors (B, …) on which T depends.
        steps: k, vector-Jacobian products, and vectors kept of each sample.

    Returns:
        (B, min(k, N)), complex; NaN for a sample of which T(x) or the Jacobian is not finite.

    Raises:
        ValueError: ``steps`` below 1, or a layer that changes the shape.
    """
    with linearised(layer, x, inputs) as jacobian:
        h = arnoldi(lambda w: flat(jacobian.vjp(_like(x, w))[0]), _flat(x), steps)
        finite = jacobian.finite & h.isfinite().flatten(1).all(1)
    values = torch.linalg.eigvals(torch.where(finite[:, None, None], h, 0).double())
    return torch.where(finite[:, None], values, torch.nan)


def contraction_factor(layer: Layer, x: Tensor, inputs: Sequence[Tensor] = (), steps: int = 60) -> Tensor:
    """γ, the spectral radius of ∂T/∂x at x, (B,), the rate at which x ← T(x) converges there.

    The largest modulus of the `ritz_values`, whose arguments it takes.
    """
    return ritz_values(layer, x, inputs, steps).abs().amax(1)


def symmetric_ritz_values(operator: Callable[[Tensor], Tensor], like: Tensor, steps: int) -> Tensor:
    """Ritz values of a symmetric operator (B, N) → (B, N), (B, k) ascending; NaN for a sample that is not finite.

    They lie between its extreme eigenvalues.
    """
    h = arnoldi(operator, like, steps)
    finite = h.isfinite().flatten(1).all(1)
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], (h + h.mT) / 2, 0).double())
    return torch.where(finite[:, None], values, torch.nan)


def operator_norm(layer: Layer, x: Tensor, inputs: Sequence[Tensor] = (), steps: int = 20) -> Tensor:
    """‖∂T/∂x‖₂ at x, (B,), by Lanczos' method on JJᵀ: a lower bound, which converges fast.

    The arguments are those of `ritz_values`; each step takes two products.
    """
    with linearised(layer, x, inputs) as jacobian:

        def normal(w: Tensor) -> Tensor:
            return flat(jacobian.jvp(jacobian.vjp(_like(x, w))))

        largest = symmetric_ritz_values(normal, _flat(x), steps)[:, -1]
        return torch.where(jacobian.finite, largest.clamp_min(0).sqrt(), torch.nan)


def optimal_averaging(eigenvalues: Tensor) -> float:
    """The α in (0, 1], to three digits, that minimises max |1 − α(1 − μ)| over eigenvalues μ of ∂T/∂x.

    That maximum is the contraction factor of T_α = (1 − α)x + αT(x). For real μ in [a, b] with b < 1 it
    is the smaller of 2/(2 − a − b) and 1. Eigenvalues that are not finite, or of a real part of 1 and more,
    which no α contracts, are left out; NaN where none is left.

    Args:
        eigenvalues: μ, complex, of any shape.
    """
    contracted = eigenvalues[eigenvalues.isfinite() & (eigenvalues.real < 1)]
    if not contracted.numel():
        return torch.nan
    alpha = torch.linspace(0, 1, 1001, dtype=torch.float64, device=contracted.device)[1:]
    factor = (1 - alpha[:, None] * (1 - contracted)).abs().amax(1)  # convex in α
    return float(alpha[factor.argmin()])
