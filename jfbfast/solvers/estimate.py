"""Estimates of (I − ∂T/∂x)⁻¹ from the history of a solve (Ramzi et al., 2022, "SHINE")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast.backends.tensors import compute_dtype, flat


class LowRank(NamedTuple):
    """(I − ∂T/∂x)⁻¹ ≈ I − U Vᵀ for b samples; u and v are the columns of U and V, (k, b, N)."""

    u: Tensor
    v: Tensor

    def transpose(self, w: Tensor) -> Tensor:
        """w − V Uᵀ w, for w (b, N)."""
        wide = torch.promote_types(compute_dtype(w.dtype), self.u.dtype)
        weights = torch.einsum("kbn,bn->bk", self.u.to(wide), w.to(wide))
        return (w - torch.einsum("bk,kbn->bn", weights, self.v.to(wide))).to(w.dtype)


class InverseEstimate:
    """An estimate of (I − ∂T/∂x)⁻¹ at each sample's solution: the identity with a low-rank update.

    For a sample without a history (one evaluation, or a solve that diverged) it is the identity.
    """

    def __init__(self, shape: torch.Size) -> None:
        self._shape = shape
        self._parts: list[tuple[Tensor, LowRank]] = []

    def put(self, samples: Tensor, part: LowRank) -> None:
        """Set the estimate for these samples, given as (b,) indices into the batch."""
        self._parts.append((samples, part))

    def transpose(self, w: Tensor) -> Tensor:
        """(I − ∂T/∂x)⁻ᵀ w, sample by sample, for w of the shape of the solution, (B, …).

        Raises:
            ValueError: w of another shape.
        """
        if w.shape != self._shape:
            raise ValueError(f"w has shape {tuple(w.shape)}; it takes that of the solution, {tuple(self._shape)}")
        out = flat(w).clone()
        for samples, part in self._parts:
            out[samples] = part.transpose(out[samples])
        return out.view(self._shape)
