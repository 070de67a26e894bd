"""The change of basis of `reference` by oneDNN's matrix products, on CPUs.

torch's own products of float32 matrices are MKL's, which uses half of the vector width of an AMD processor. On one core
of a Zen 5 they reach 100 GFLOP/s and oneDNN's 240, so that a change of basis takes 0.55 of the time at 16 × 3 × 64² and
4 × 3 × 128². The operator is the one that torch.compile calls on CPUs; where torch has none, `AVAILABLE` is False.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jfbfast.backends.reference import SVD

_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
AVAILABLE = _linear is not None
_LEAST_PRODUCTS = 2_000_000  # multiplications of one change of basis, from which on the transposition pays off


def is_faster(shape: Sequence[int]) -> bool:
    """Whether this module is faster for images of this shape, (…, H, W)."""
    return math.prod(shape) * sum(shape[-2:]) >= _LEAST_PRODUCTS


def change_basis(x: Tensor, svd_y: SVD, svd_x: SVD, back: bool) -> Tensor:
    """As `reference.change_basis`, for float32."""
    first, second = (svd_y.v, svd_x.v) if back else (svd_x.v.T, svd_y.v.T)
    return _times(_times(x.to(first.dtype), first).mT, second)


def _times(x: Tensor, transposed: Tensor) -> Tensor:
    """x Mᵀ for x (…, n) and M (n, n)."""
    assert _linear is not None
    product: Tensor = _linear(x.contiguous(), transposed, None, "none", [], "")
    # The product is a view, which no op of torch.library may return.
    return product.new_empty(0).set_(product.untyped_storage(), 0, product.shape, product.stride())
