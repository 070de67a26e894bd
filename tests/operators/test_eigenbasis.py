"""The factors of a separable blur, and the change to the basis where AᵀA is diagonal."""

import pytest
import torch

import jfbfast
from helpers.operators import Bare
from jfbfast.backends import onednn, reference
from jfbfast.operators.eigenbasis import eigenbasis


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_of_basis_by_onednn_is_that_of_the_reference(dtype):
    blur, shape = jfbfast.SeparableBlur([0.1, 0.2, 0.5, 0.3, -0.2], [0.2, 0.5, 0.3], "valid"), (3, 2, 90, 81)
    assert onednn.is_faster(shape) and not onednn.is_faster((1, 1, 90, 81))
    x, basis = torch.randn(shape).to(dtype), blur.eigenbasis(shape[2:])
    exact = blur.eigenbasis(shape[2:]).coefficients(x.double())
    for name in ("reference", "native"):
        with jfbfast.backend(name):
            coefficients = basis.coefficients(x.mT.contiguous().mT)
            assert coefficients.shape == (3, 2, 81, 90) and coefficients.dtype == torch.float32
            torch.testing.assert_close(coefficients.double(), exact, rtol=0, atol=2e-5)
            torch.testing.assert_close(basis.image(coefficients), x.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", reference.PADDING_MODES)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 11])
def test_the_factors_of_a_symmetric_filter_are_a_sorted_svd(mode, n):
    taps = (0.25, 0.5, 0.25) if n >= 3 else (0.7,)
    table = reference.band_table(taps, n, mode)
    u, s, v = reference.svd(table, mode == "circular")
    identity = torch.eye(n, dtype=torch.float64)
    for product, expected in (
        (u.T @ u, identity),
        (v.T @ v, identity),
        (u * s @ v.T, reference.band_matrix(table, mode == "circular")),
    ):
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-14)
    assert (s >= 0).all() and (s.diff() <= 0).all()


@pytest.mark.parametrize("mode", ["reflect", "valid"])
def test_an_eigenbasis_diagonalises_the_normal_operator_of_its_images(mode):
    blur, x = jfbfast.GaussianBlur(3, 1.0, mode), torch.randn(1, 2, 7, 8, dtype=torch.float64)
    found = eigenbasis(blur, blur(x))
    assert found is not None
    torch.testing.assert_close(found.image(found.eigenvalues(x) * found.coefficients(x)), blur.normal(x))


def test_operators_that_iterate_have_no_eigenbasis():
    blur, d = jfbfast.GaussianBlur(3, 1.0, "valid"), torch.randn(1, 2, 5, 6, dtype=torch.float64)
    assert eigenbasis(Bare(blur), d) is None and eigenbasis(blur, d[0, 0, 0]) is None
