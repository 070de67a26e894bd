"""Products with the derivative of a traced function, from either side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from jfbfast.backends.tensors import flat


class Linearisation:
    """Products with the derivative J of ``out`` with respect to the ``leaves``; the graph of ``out`` is kept.

    J v is the derivative of Jᵀ w, which is linear in w, in the direction v. So an op needs no forward-mode rule. Jᵀ w
    is traced for this at the first J v.
    """

    def __init__(self, out: Tensor, leaves: Sequence[Tensor]) -> None:
        self.out = out
        self.leaves = tuple(leaves)

    @property
    def finite(self) -> Tensor:
        """A mask of the samples for which ``out`` is finite, (B,)."""
        return flat(self.out.detach()).isfinite().all(1)

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        """Jᵀ w for w like ``out``: one tensor for each leaf."""
        w = w.to(self.out.dtype)
        return torch.autograd.grad(self.out, self.leaves, w, retain_graph=True, materialize_grads=True)

    @cached_property
    def _transposed(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        w = torch.zeros_like(self.out, requires_grad=True)
        with torch.enable_grad():
            return w, torch.autograd.grad(self.out, self.leaves, w, create_graph=True, materialize_grads=True)

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v, like ``out``, for a v of one tensor for each leaf."""
        w, transposed = self._transposed
        pairs = [(t, direction.to(t.dtype)) for t, direction in zip(transposed, v, strict=True) if t.requires_grad]
        if not pairs:
            return torch.zeros_like(self.out)
        products, directions = zip(*pairs, strict=True)
        return torch.autograd.grad(products, w, directions, retain_graph=True, materialize_grads=True)[0]
