"""Spectra from matrix-vector products, and the averaging chosen from them, against the dense Jacobian in float64."""

import copy
import warnings

import pytest
import torch
from torch import nn

from helpers.maps import dense_jacobian
from helpers.models import Cell, networks
from jfbfast import RED, ConvergenceWarning, DEGrad, DnCNN, GaussianBlur, Picard, UNet
from jfbfast.implicit.jacobian import Linearisation
from jfbfast.spectrum import contraction_factor, operator_norm, optimal_averaging, ritz_values


def image_models():
    unet = RED(UNet(3, (4, 6), (1, 1)), 0.1, "weight")
    strong = networks()["filtered"]
    with torch.no_grad():
        for conv in strong.regularizer.denoiser.layers[::3]:
            conv.weight *= 3
    return {**networks(), "unet": DEGrad(GaussianBlur(), unet, preconditioner="exact"), "strong": strong}


@pytest.mark.parametrize("name", image_models())
def test_radius_and_norm_agree_with_the_dense_jacobian(name):
    model = image_models()[name].double().train()
    before = copy.deepcopy(model.state_dict())
    x, d = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    radius, norm = contraction_factor(model.layer, x, (d,)), operator_norm(model.layer, x, (d,))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and model.training
    j = dense_jacobian(copy.deepcopy(model).eval().layer, x, d)
    torch.testing.assert_close(radius, torch.linalg.eigvals(j).abs().amax(1), rtol=0.05, atol=1e-3)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(j, 2), rtol=0.05, atol=1e-3)


class Linear(nn.Module):
    def __init__(self, *matrices):
        super().__init__()
        self.matrices = nn.Parameter(torch.stack(matrices))

    def forward(self, x, d):
        return torch.einsum("bij,bj->bi", self.matrices[: len(x)], x) + d


def non_normal(n):
    """A complex pair of modulus 0.8 on top, far from normal: its norm is many times that."""
    t = torch.triu(torch.randn(n, n, dtype=torch.float64), 1) * 0.3 + torch.diag(torch.linspace(-0.6, 0.7, n).double())
    t[:2, :2] = 0.8 * torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return q @ t @ q.T


def test_non_normal_and_complex_spectra_are_found():
    n = 64
    ginibre = torch.randn(n, n, dtype=torch.float64) / n**0.5
    layer = Linear(non_normal(n), ginibre, non_normal(n))
    x = torch.randn(3, n, dtype=torch.float64)
    j = layer.matrices.detach()
    expected = torch.linalg.eigvals(j)
    radius, norm = contraction_factor(layer, x, (x,), steps=40), operator_norm(layer, x, (x,))
    assert (norm[0] > 2 * radius[0]).all()
    torch.testing.assert_close(radius, expected.abs().amax(1), rtol=0.05, atol=0)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(j, 2), rtol=1e-3, atol=0)
    values = ritz_values(layer, x, (x,), steps=n)[1]  # a whole space: the spectrum itself
    distance = (values[:, None] - expected[1]).abs()
    assert distance.amin(0).max() < 1e-9 and distance.amin(1).max() < 1e-9
    torch.testing.assert_close(values.real.aminmax(), expected[1].real.aminmax())


def test_arnoldi_continues_past_an_invariant_krylov_space():
    scaled = 0.3 * torch.eye(20, dtype=torch.float64)
    scaled[3, 3] = -0.9
    layer = Linear(scaled, torch.zeros(20, 20, dtype=torch.float64))
    x = torch.randn(2, 20, dtype=torch.float64)
    values = ritz_values(layer, x, (x,), steps=8)
    torch.testing.assert_close(values.abs().amax(1), torch.tensor([0.9, 0.0], dtype=torch.float64))
    torch.testing.assert_close(values[0].real.amax(), torch.tensor(0.3, dtype=torch.float64))


def test_samples_are_not_coupled():
    model = networks()["filtered"].eval()
    x, d = torch.randn(2, 3, 3, 8, 8)
    bad = x.clone()
    bad[1] = torch.nan
    with torch.inference_mode():
        for measure in (contraction_factor, operator_norm):
            alone, among = measure(model.layer, x[2:], (d[2:],)), measure(model.layer, bad, (d,))
            assert among[1].isnan()
            torch.testing.assert_close(among[2:], alone, rtol=1e-4, atol=0)
            assert measure(model.layer, x[:0], (d[:0],)).shape == (0,)


def test_any_callable_works_and_bad_input_is_named():
    x = torch.randn(2, 5)
    torch.testing.assert_close(contraction_factor(lambda v: 0.5 * v + 1, x), torch.full((2,), 0.5).double())
    with pytest.raises(ValueError, match="steps is 0"):
        contraction_factor(lambda v: v, x, steps=0)
    with pytest.raises(ValueError, match="keeps the shape"):
        operator_norm(lambda v: v[:, :3], x)


def test_the_products_in_the_parameters_are_adjoint():
    cell = Cell().double()
    x, d = torch.randn(2, 4, 12, dtype=torch.float64)
    parameters = list(cell.parameters())
    jacobian = Linearisation(cell(x, d), parameters)
    w, v = torch.randn_like(x), [torch.randn_like(p) for p in parameters]
    forward = sum((a * b).sum() for a, b in zip(jacobian.vjp(w), v, strict=True))
    torch.testing.assert_close((w * jacobian.jvp(v)).sum(), forward)


def test_the_averaging_is_the_best_one():
    for a, b in ((-3.0, 0.4), (-0.5, 0.9), (0.2, 0.3)):
        alpha = optimal_averaging(torch.linspace(a, b, 7).to(torch.complex128))
        assert abs(alpha - min(1, 2 / (2 - a - b))) <= 1e-3
    pair = torch.tensor([0.1 + 2j, 0.1 - 2j, torch.nan, 1.2])  # |1 − αz|² has its minimum at Re z/|z|²
    assert abs(optimal_averaging(pair) - 0.9 / (0.81 + 4)) <= 1e-3
    assert optimal_averaging(torch.tensor([1.5 + 0j])) != optimal_averaging(torch.tensor([1.5 + 0j]))


def overshooting(averaging, dtype=torch.float64):
    """A filtered model whose ∂T has eigenvalues near −3: its denoiser is −16 times the identity, roughly."""
    denoiser = nn.Conv2d(1, 1, 3, padding=1).to(dtype)
    with torch.no_grad():
        denoiser.weight.zero_()[0, 0, 1, 1] = -12
    model = DEGrad(
        GaussianBlur(padding_mode="reflect"),
        RED(denoiser, 0.1, "weight"),
        preconditioner="exact",
        averaging=averaging,
        solver=Picard(tol=1e-6, max_iter=200),
    )
    return model.to(dtype).eval()


def test_automatic_averaging_makes_the_plain_iteration_converge():
    d = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning):
        overshooting(1.0)(d)
    model = overshooting("auto")
    assert model.averaging.isnan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(d)
    j = dense_jacobian(overshooting(1.0).layer, out.detach(), d)
    real = torch.linalg.eigvals(j).real
    assert real.min() < -2.5
    assert abs(float(model.averaging) - float(2 / (2 - real.min() - real.max()))) < 2e-3
    torch.testing.assert_close(model.layer(out, d), out, rtol=1e-4, atol=1e-5)
    again = float(model.averaging)
    with torch.no_grad():
        model.regularizer.denoiser.weight *= 0.1
    model(d)
    assert float(model.averaging) == again
    model.update_averaging(d)
    assert float(model.averaging) > 1.5 * again
    again = float(model.averaging)
    with pytest.raises(RuntimeError):
        model.update_averaging(torch.cat([d, d], 1))
    assert float(model.averaging) == again


def test_automatic_averaging_is_kept_with_the_weights():
    model = overshooting("auto", torch.float32)
    d = torch.randn(1, 1, 8, 8)
    with torch.inference_mode():
        expected = model(d)
    other = overshooting("auto", torch.float32)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.averaging, model.averaging)
    torch.testing.assert_close(copy.deepcopy(other)(d), expected)
    assert "averaging" not in overshooting(0.5).state_dict()
    other(d).sum().backward()
    fresh = overshooting("auto")
    with pytest.warns(ConvergenceWarning):
        fresh(torch.full((1, 1, 8, 8), torch.nan, dtype=torch.float64))
    assert fresh.averaging.isnan()
    fresh.solver = None
    fresh.update_averaging(torch.zeros(0, 1, 8, 8, dtype=torch.float64))  # which solves nothing
    other.update_averaging(d[:0])
    assert torch.equal(other.averaging, model.averaging)
    with pytest.raises(ValueError, match=r"averaging is 0\.5; only"):
        overshooting(0.5).update_averaging(d)
    with pytest.raises(ValueError, match="averaging is 'yes'"):
        DEGrad(GaussianBlur(), DnCNN(1, 2, 2), averaging="yes")
