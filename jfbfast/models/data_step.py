"""The data step that the layers share: x ↦ P(Aᵀd + λx) with P = (AᵀA + λI)⁻¹, the proximal operator of f/λ.

Where AᵀA is diagonal in a known basis, the step there is z + λ/(s + λ) ⊙ x, with z of P Aᵀd. Both z and the factors are
the same at every evaluation, and so they are inputs of the solve. Elsewhere P is solved by conjugate gradients, in the
form x − P ∇f(x; d): near a minimum of f, it multiplies their error by a small gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jfbfast.models.implicit_network import check_operator
from jfbfast.operators.data_fidelity import DataFidelity, LeastSquares
from jfbfast.operators.eigenbasis import Eigenbasis, eigenbasis
from jfbfast.operators.iterative import gradient


def basis_of_step(fidelity: DataFidelity, operator: Any, d: Tensor) -> Eigenbasis | None:
    """The basis in which the data step is diagonal; None where P takes conjugate gradients."""
    if type(fidelity).least_squares is not LeastSquares.least_squares:
        return None
    return eigenbasis(operator, d)


def factors_of_images(factors: Tensor, d: Tensor) -> Tensor:
    """Factors (…, H, W) of coefficients as the input of a solve, (B, 1, H, W), or (B, C, H, W) if channels differ."""
    channels = factors.shape[-3] if factors.dim() > 2 else 1
    return factors.expand(d.shape[0], channels, *factors.shape[-2:])


def constants(
    basis: Eigenbasis, operator: Any, d: Tensor, weight: Tensor, restored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `diagonal_step` needs at every evaluation: V* P Aᵀd, (B, C, H, W), and λ/(s + λ), (B, 1, H, W).

    Args:
        basis: V.
        operator: A.
        d: the measurements.
        weight: λ, of shape () or (B, 1, 1, 1).
        restored: P Aᵀd, if it is known.
    """
    squares = basis.eigenvalues(d)
    weight = weight.to(squares.dtype)
    if restored is None:
        coefficients = basis.coefficients(operator.adjoint(d)) / (squares + weight)
    else:
        coefficients = basis.coefficients(restored)
    return coefficients, factors_of_images(weight / (squares + weight), d)


def inputs_of_step(network: Any, d: Tensor) -> tuple[Tensor, ...]:
    """What `data_step` needs at every evaluation: `constants`, or else what the data fidelity keeps of d."""
    check_operator(network.blur)
    basis = basis_of_step(network.data_fidelity, network.blur, d)
    if basis is None:
        return network.data_fidelity.inputs(d)
    return constants(basis, network.blur, d, network.weight)


def diagonal_step(basis: Eigenbasis, x: Tensor, restored: Tensor, kept: Tensor) -> Tensor:
    """P(Aᵀd + λx) = V(restored + kept ⊙ V* x), where `constants` returned ``restored`` and ``kept``."""
    return basis.image(torch.addcmul(restored, kept, basis.coefficients(x)))


def data_step(network: Any, x: Tensor, d: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """P(Aᵀd + λx) of a network with ``data_fidelity``, ``blur`` and ``weight`` λ, from its `inputs_of_step`."""
    fidelity, operator = network.data_fidelity, network.blur
    basis = basis_of_step(fidelity, operator, d)
    if basis is not None:
        return diagonal_step(basis, x, *inputs).to(x.dtype)
    operator, d = fidelity.least_squares(operator, d, *inputs)
    return x - operator.solve(gradient(operator, x, d, None), network.weight)


@torch.no_grad()
def tikhonov_start(network: Any, d: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """P Aᵀd for λ = ``weight``, where a solve starts."""
    check_operator(network.blur)
    basis = basis_of_step(network.data_fidelity, network.blur, d)
    if basis is not None:
        return basis.image(inputs[0]).to(d.dtype)
    operator, d = network.data_fidelity.least_squares(network.blur, d, *inputs)
    return operator.solve(operator.adjoint(d), network.weight)
