"""The spectrum of a layer's Jacobian ∂T/∂x at a point, sample by sample, by products with vectors only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.tensors import compute_dtype, flat
from jfbfast.implicit.frozen import frozen, materialised_weights, owner
from jfbfast.implicit.jacobian import Linearisation
from jfbfast.implicit.states import packed
from jfbfast.solvers import Layer

__all__ = ["contraction_factor", "operator_norm", "optimal_averaging", "ritz_values"]

_SEED = 0  # all samples have the same start vector, so that a sample's result does not depend on its batch


@contextmanager
def linearised(layer: Layer, x: Tensor, inputs: Sequence[Tensor] = ()) -> Iterator[Linearisation]:
    """The Jacobian ∂T/∂x at x; its module stays in eval() within. Takes the arguments of `ritz_values`."""
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
    """x as (B, N), in a dtype wide enough to orthogonalise in."""
    return flat(x.detach()).to(compute_dtype(x.dtype))


def _like(x: Tensor, w: Tensor) -> Tensor:
    return w.reshape(x.shape).to(x.dtype)


def _unit(w: Tensor) -> Tensor:
    return F.normalize(w, dim=1, eps=torch.finfo(w.dtype).tiny)


def arnoldi(operator: Callable[[Tensor], Tensor], like: Tensor, steps: int) -> Tensor:
    """Arnoldi's method: project each sample's linear map G onto its Krylov space with basis Q.

    If a Krylov space is invariant before the last step, Arnoldi's method continues from a new random vector.

    Args:
        operator: G, (B, N) to (B, N), sample by sample.
        like: a tensor (B, N) with the dtype and device of the vectors.
        steps: dimension of the Krylov space, at least 1.

    Returns:
        QᵀGQ, (B, k, k), with k = min(steps, N).

    Raises:
        ValueError: ``steps`` is below 1.
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
        for _ in range(2):  # a single pass leaves rounding errors as large as w
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


def ritz_values(layer: Callable[..., Any], x: Any, inputs: Sequence[Any] = (), steps: int = 60) -> Tensor:
    """Ritz values of ∂T/∂x at x, which approximate its outermost eigenvalues.

    They come from Arnoldi's method on the transposed Jacobian (Arnoldi, 1951; Saad, Numerical methods for large
    eigenvalue problems, 2011). They are the eigenvalues themselves once ``steps`` reaches N, the size of a sample.

    Args:
        layer: ``T(x, *inputs)``, (B, …) to the same shape, sample by sample: a module, a module's method
            or any callable. Its module is evaluated as in eval(), as during a solve.
        x: the point, (B, …), or a state of any structure that `fixed_point` takes; of complex numbers the real and
            imaginary parts count.
        inputs: tensors (B, …) on which T depends, or structures of them.
        steps: number of vector-Jacobian products, and of vectors kept for each sample.

    Returns:
        (B, min(steps, N)), complex; NaN for a sample with a T(x) or a Jacobian that is not finite.

    Raises:
        ValueError: ``steps`` is below 1, or the layer changes the shape.

    Example:
        >>> import torch, jfbfast
        >>> scale = torch.tensor([0.5, -0.25])
        >>> values = jfbfast.spectrum.ritz_values(lambda x: scale * x, torch.zeros(1, 2))
        >>> [round(value, 4) for value in sorted(values[0].real.tolist())]
        [-0.25, 0.5]
    """
    layer, x, inputs = packed(layer, x, inputs)[:3]
    with linearised(layer, x, inputs) as jacobian:
        h = arnoldi(lambda w: flat(jacobian.vjp(_like(x, w))[0]), _flat(x), steps)
        finite = jacobian.finite & h.isfinite().flatten(1).all(1)
    values = torch.linalg.eigvals(torch.where(finite[:, None, None], h, 0).double())
    return torch.where(finite[:, None], values, torch.nan)


def contraction_factor(layer: Callable[..., Any], x: Any, inputs: Sequence[Any] = (), steps: int = 60) -> Tensor:
    """The contraction factor γ, (B,): the spectral radius of ∂T/∂x at x, and the rate at which x ← T(x) converges.

    It is the largest modulus of the `ritz_values`, and takes the same arguments.

    Example:
        >>> import torch, jfbfast
        >>> x = torch.zeros(3, 4)
        >>> jfbfast.spectrum.contraction_factor(lambda x: 1 - x / 2, x)
        tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    return ritz_values(layer, x, inputs, steps).abs().amax(1)


def symmetric_ritz_values(operator: Callable[[Tensor], Tensor], like: Tensor, steps: int) -> Tensor:
    """Ritz values of a symmetric operator, which lie between its extreme eigenvalues, by `arnoldi`.

    Returns:
        (B, k), ascending; NaN for a sample that is not finite.
    """
    h = arnoldi(operator, like, steps)
    finite = h.isfinite().flatten(1).all(1)
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], (h + h.mT) / 2, 0).double())
    return torch.where(finite[:, None], values, torch.nan)


def operator_norm(layer: Callable[..., Any], x: Any, inputs: Sequence[Any] = (), steps: int = 20) -> Tensor:
    """The spectral norm ‖J‖₂ of J = ∂T/∂x at x, (B,): a lower bound that converges fast, by Lanczos' method on JJᵀ.

    It takes the arguments of `ritz_values`; each step needs two products.

    Example:
        >>> import torch, jfbfast
        >>> shear = torch.tensor([[0.0, 3.0], [0.0, 0.0]])  # its eigenvalues are 0, but its norm is 3
        >>> norm = jfbfast.spectrum.operator_norm(lambda x: x @ shear.T, torch.zeros(1, 2))
        >>> round(norm.item(), 4)
        3.0
    """
    layer, x, inputs = packed(layer, x, inputs)[:3]
    with linearised(layer, x, inputs) as jacobian:

        def normal(w: Tensor) -> Tensor:
            return flat(jacobian.jvp(jacobian.vjp(_like(x, w))))

        largest = symmetric_ritz_values(normal, _flat(x), steps)[:, -1]
        return torch.where(jacobian.finite, largest.clamp_min(0).sqrt(), torch.nan)


def optimal_averaging(eigenvalues: Tensor) -> float:
    """The averaging factor α that makes T_α(x) = (1 − α)x + αT(x) contract best, to three digits.

    T_α has the contraction factor max abs(1 − α(1 − μ)) over the eigenvalues μ of ∂T/∂x; α in (0, 1] minimises it. For
    real μ that fill [a, b] with b < 1, α is the smaller of 2/(2 − a − b) and 1. Eigenvalues that are not finite are
    left out, and so are those with a real part of 1 or more, since no α contracts them.

    Args:
        eigenvalues: μ, complex, of any shape.

    Returns:
        α in (0, 1]; NaN if no eigenvalue is left.

    Example:
        >>> import torch, jfbfast
        >>> jfbfast.spectrum.optimal_averaging(torch.tensor([-3.0, 0.0]))  # 2 / (2 + 3)
        0.4
    """
    contracted = eigenvalues[eigenvalues.isfinite() & (eigenvalues.real < 1)]
    if not contracted.numel():
        return torch.nan
    alpha = torch.linspace(0, 1, 1001, dtype=torch.float64, device=contracted.device)[1:]
    factor = (1 - alpha[:, None] * (1 - contracted)).abs().amax(1)  # convex in α
    return float(alpha[factor.argmin()])
