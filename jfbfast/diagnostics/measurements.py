"""The figures that a report rests on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from jfbfast.diagnostics.history import History
from jfbfast.solvers import FixedPointSolution


@dataclass(frozen=True)
class Measurements:
    """How well conditioned an implicit network is on a batch of B samples; all tensors are on the CPU.

    Attributes:
        contraction_factor: γ, the spectral radius of ∂T/∂x at x*, (B,).
        operator_norm: ‖∂T/∂x‖₂ at x*, (B,).
        ritz_values: approximate eigenvalues of ∂T/∂x at x*, (B, k), complex.
        lipschitz_bound: an upper bound on γ, (B,); None for a layer that has none.
        jfb_condition: a lower bound on κ(MᵀM), (B,); None without parameters.
        cosine: for each gradient method, by name, the cosine of its gradient to the exact one, (B,); empty without
            parameters.
        norm_ratio: the norm of each method's gradient over that of the exact one, like ``cosine``.
        solution: what the model's own solve found, at its own tolerance.
        history: the same solver with tol = 0.
        tol: the solver's own tolerance.
    """

    contraction_factor: Tensor
    operator_norm: Tensor
    ritz_values: Tensor
    lipschitz_bound: Tensor | None
    jfb_condition: Tensor | None
    cosine: dict[str, Tensor]
    norm_ratio: dict[str, Tensor]
    solution: FixedPointSolution
    history: History
    tol: float
