"""The Jacobian penalty: its value against a dense Jacobian, its gradient by finite differences, its effect."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from helpers.maps import dense_jacobian
from helpers.models import Cell, networks
from jfbfast import Anderson, ConvergenceWarning, jacobian_penalty
from jfbfast.spectrum import contraction_factor


@pytest.mark.parametrize("name", networks())
def test_the_value_equals_the_power_method_on_a_dense_jacobian(name):
    model = networks()[name].double().train()
    x, d = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(5)
    found = jacobian_penalty(model.layer, d, x=x, bound=0.1, iterations=4)
    torch.manual_seed(5)
    v = torch.randn_like(x).flatten(1)
    j = dense_jacobian(copy.deepcopy(model).eval().layer, x, d)
    for _ in range(4):
        v = torch.einsum("bij,bi->bj", j, F.normalize(v, dim=1))
    size = torch.einsum("bij,bi->bj", j, F.normalize(v, dim=1)).norm(dim=1)
    torch.testing.assert_close(found, F.relu(size - 0.1).square().mean())
    assert model.training


def test_it_tends_to_the_excess_of_the_contraction_factor():
    weight = torch.randn(12, 12, dtype=torch.float64)
    weight = (weight + weight.T) / 4
    x = torch.zeros(3, 12, dtype=torch.float64)
    radius = float(torch.linalg.eigvalsh(weight).abs().max())
    found = jacobian_penalty(lambda x: x @ weight + 0 * x, x=x, bound=0.7, iterations=200)
    assert radius > 1 and math.isclose(float(found), (radius - 0.7) ** 2, rel_tol=1e-6)


def test_the_gradient_agrees_with_finite_differences():
    model = networks()["filtered"].double().eval()
    with torch.no_grad():
        for conv in model.regularizer.denoiser.layers[::3]:
            conv.weight += 0.1 * torch.randn_like(conv.weight)
    x, d = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)

    def penalty():  # v is a constant of the gradient, so it must not move with the parameters
        torch.manual_seed(7)
        return jacobian_penalty(model.layer, d, x=x, bound=0.0, iterations=0)

    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    assert sum(g is not None and bool((g != 0).any()) for g in gradient) >= 5
    direction = [torch.randn_like(p) for p in parameters]
    analytic = sum((g * v).sum() for g, v in zip(gradient, direction, strict=True) if g is not None)
    values = []
    for step in (1e-7, -2e-7):  # so short that no ReLU is crossed
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p += step * v
        values.append(float(penalty().detach()))
    assert math.isclose(float(analytic), (values[0] - values[1]) / 2e-7, rel_tol=1e-5)


def test_training_with_the_penalty_makes_a_layer_contract():
    cell = Cell()
    with torch.no_grad():
        cell.inner.weight *= 8
    x, d = torch.zeros(8, 12), 0.3 * torch.randn(8, 12)
    optimizer = torch.optim.Adam(cell.parameters(), lr=0.02)

    def fixed_points():
        return Anderson(tol=1e-4, max_iter=100).solve(cell, x, (d,)).value

    assert contraction_factor(cell, fixed_points(), (d,)).max() > 1
    for _ in range(60):
        optimizer.zero_grad()
        jacobian_penalty(cell, d, x=fixed_points()).backward()
        optimizer.step()
    assert contraction_factor(cell, fixed_points(), (d,)).max() < 1


def test_it_uses_the_last_solution_without_the_diverged_samples():
    model = networks()["filtered"]
    d = torch.randn(3, 3, 8, 8)
    d[1] = torch.nan
    with pytest.warns(ConvergenceWarning):
        model(d)
    torch.manual_seed(1)
    found = jacobian_penalty(model, d, bound=0.0)
    torch.manual_seed(1)
    kept = [0, 2]
    expected = jacobian_penalty(model.layer, d[kept], x=model.solution.value[kept], bound=0.0)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with pytest.warns(ConvergenceWarning):
        model(d[1:2])
    nothing = jacobian_penalty(model, d[1:2])
    assert nothing == 0
    nothing.backward()


def test_a_zero_jacobian_has_penalty_zero_and_gradient_zero():
    bias = torch.ones(4, requires_grad=True)
    x = torch.randn(3, 4)
    for layer in (lambda x: bias.expand_as(x), lambda x: bias + 0.5 * x):  # and one that no parameter moves
        penalty = jacobian_penalty(layer, x=x, bound=0.5)
        assert penalty == 0
        (gradient,) = torch.autograd.grad(penalty, bias)
        assert (gradient == 0).all()
    assert jacobian_penalty(torch.ones_like, x=x) == 0


def test_it_is_refused_in_inference_mode():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="jacobian_penalty differentiates"):
        jacobian_penalty(Cell(), torch.zeros(2, 12), x=torch.zeros(2, 12))


def test_a_solution_for_measurements_of_another_shape_is_not_used():
    model = networks()["filtered"]
    with torch.inference_mode():
        model(torch.randn(2, 3, 8, 8))
    jacobian_penalty(model, torch.randn(2, 3, 8, 8)).backward()
    with pytest.raises(ValueError, match="x is None; it takes a tensor, or a DEGrad as layer whose last forward"):
        jacobian_penalty(model, torch.randn(2, 3, 9, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: jacobian_penalty(m, d), "x is None"),
        (lambda m, d: jacobian_penalty(m.layer, d), "x is None"),
        (
            lambda m, d: jacobian_penalty(m, d, x=torch.cat([d, d])),
            r"inputs\[0\] has shape .*; it takes the batch size",
        ),
        (lambda m, d: jacobian_penalty(m, d, x=d, bound=-1), "bound is -1"),
        (lambda m, d: jacobian_penalty(m, d, x=d, iterations=-1), "iterations is -1"),
        (lambda m, d: jacobian_penalty(m, d, x=d, iterations=2.5), "iterations is 2.5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(networks()["filtered"], torch.randn(1, 3, 8, 8))
