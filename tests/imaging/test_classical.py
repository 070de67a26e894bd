"""Direct inverse, gradient descent, Tikhonov, total variation."""

import math

import pytest
import torch

import jfbfast
from jfbfast import GaussianBlur, Status, tv
from jfbfast.imaging.classical import differences, differences_adjoint

BLUR = GaussianBlur(5, 1.0, "zeros")


def pictures(count, height=24, width=20):
    """Smooth pictures with edges, uint8."""
    noise = torch.randn(count, 3, height, width)
    smooth = GaussianBlur(15, 3.0, "reflect")(noise)
    edges = (smooth > 0).float() * 0.5 + 0.25 + smooth
    return list((edges.clamp(0, 1) * 255).round().byte())


def photograph_like(*shape):
    """Smooth random images in [−1, 1]."""
    return torch.tanh(GaussianBlur(15, 3.0, "circular")(8 * torch.randn(*shape, dtype=torch.float64)))


def test_direct_inverse_undoes_a_noiseless_blur():
    blur = GaussianBlur()
    x = photograph_like(2, 3, 32, 33)
    torch.testing.assert_close(jfbfast.direct_inverse(blur, blur(x)), x, rtol=0, atol=1e-9)


def test_gradient_descent_converges_to_tikhonov():
    blur = GaussianBlur(5, 1.0, "reflect")
    d = blur(photograph_like(2, 1, 16, 17))
    found = jfbfast.gradient_descent(blur, d, damping=0.1, step_size=1.5, max_iter=500)
    torch.testing.assert_close(found.value, jfbfast.tikhonov(blur, d, 0.1), rtol=0, atol=1e-8)
    assert found.iterations.tolist() == [500, 500]


def test_gradient_descent_stops_each_sample_at_its_noise():
    blur, noise = GaussianBlur(5, 1.0, "reflect"), 0.02
    x = photograph_like(3, 1, 64, 64)
    x[2] = x[2] * 0.01
    d = blur(x) + noise * torch.randn_like(x)
    found = jfbfast.gradient_descent(blur, d, noise=noise, max_iter=300)
    assert len(set(found.iterations.tolist())) > 1 and (found.iterations < 300).all()
    residual = (blur(found.value) - d).flatten(1).norm(dim=1)
    assert (residual <= noise * 64).all()
    errors = [(image - x).flatten(1).norm(dim=1) for image in (found.value, blur.adjoint(d))]
    assert (errors[0] <= errors[1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping is -1.0"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"max_iter": 0}, "max_iter is 0"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        jfbfast.gradient_descent(GaussianBlur(), torch.zeros(1, 1, 8, 8), **options)


def test_unknown_surroundings_are_restored_with_the_frame():
    blur, truth = GaussianBlur(5, 1.0, "valid"), photograph_like(1, 1, 20, 18)
    d = blur(truth)
    found = jfbfast.tikhonov(blur, d, 0.01)
    gradient = blur.adjoint(blur(found) - d) + 0.01 * found
    assert found.shape == truth.shape and gradient.norm() < 1e-12 * found.norm()
    descent = jfbfast.gradient_descent(blur, d, damping=0.1, step_size=1.5, max_iter=200).value
    torch.testing.assert_close(descent, jfbfast.tikhonov(blur, d, 0.1), rtol=0, atol=1e-8)
    solution = tv(blur, d, 1e-3, tol=1e-5, max_iter=2000)  # the margin moves slowly

    def cost(x):
        return 0.5 * (blur(x) - d).square().sum() + 1e-3 * torch.hypot(*differences(x)).sum()

    least = cost(solution.value)
    assert (solution.status == Status.CONVERGED).all() and solution.value.shape == truth.shape
    assert all(cost(solution.value + 1e-3 * torch.randn_like(truth)) > least for _ in range(5))


def test_the_differences_have_their_adjoint():
    x, u = torch.randn(2, 3, 7, 6, dtype=torch.float64), torch.randn(2, 2, 3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close((differences(x) * u).sum(), (x * differences_adjoint(u)).sum())


def objective(x, d, weight):
    total_variation = torch.hypot(*differences(x)).flatten(1).sum(1)
    return 0.5 * (BLUR(x) - d).square().flatten(1).sum(1) + weight * total_variation


def test_total_variation_is_minimised():
    """No perturbation lowers the objective, and neither does deepinv's proximal gradient descent."""
    x = torch.stack([image.double() / 127.5 - 1 for image in pictures(2, 12, 10)])
    d = BLUR(x) + 0.05 * torch.randn_like(x)
    weight = 0.02
    found = tv(BLUR, d, weight, tol=1e-8, max_iter=20000)
    assert (found.status == Status.CONVERGED).all()
    reached = objective(found.value, d, weight)
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            assert (objective(found.value + scale * torch.randn_like(d), d, weight) > reached).all()
        assert (objective(found.value * (1 - scale), d, weight) > reached - 1e-9).all()
    loose = objective(tv(BLUR, d, weight).value, d, weight)
    assert ((loose - reached) < 1e-2 * reached).all()

    optim = pytest.importorskip("deepinv.optim")
    prior, z = optim.TVPrior(n_it_max=100), d.clone()
    for _ in range(60):
        z = prior.prox(z - BLUR.gradient(z, d), gamma=weight)
    theirs = objective(z, d, weight)
    assert (reached <= theirs + 1e-6).all() and ((theirs - reached) < 1e-2 * reached).all()


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_weight_of_total_variation_that_is_not_positive_is_named(weight):
    with pytest.raises(ValueError, match="weight is"):
        tv(BLUR, torch.zeros(1, 3, 8, 8), weight)
