"""Direct inverse, gradient descent, Tikhonov."""

import pytest
import torch

import jfbfast
from jfbfast import GaussianBlur


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
