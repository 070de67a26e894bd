"""Linear light and encoded values, and what a camera makes of them."""

import numpy as np
import pytest
import torch

from jfbfast import GaussianBlur
from jfbfast.imaging.camera import Camera, clipped
from jfbfast.imaging.light import linear_noise, to_encoded, to_linear


def test_light_is_that_of_the_standard():
    # IEC 61966-2-1, as scikit-image and colour libraries have it
    value = np.linspace(0, 1, 257)
    expected = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    found = (to_linear(torch.from_numpy(2 * value - 1)) + 1) / 2
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_light_can_be_encoded_and_decoded_anywhere(dtype):
    x = torch.linspace(-3, 3, 1001, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5  # the standard's constants meet to 1e-7 only
    torch.testing.assert_close(to_encoded(to_linear(x)), x, rtol=0, atol=tolerance)
    torch.testing.assert_close(to_linear(to_encoded(x)), x, rtol=0, atol=tolerance)
    assert (to_linear(x).diff() > 0).all() and (to_encoded(x).diff() > 0).all()
    below = torch.rand(50, dtype=dtype)
    torch.testing.assert_close(to_linear(-1 - below) + 1, -(to_linear(-1 + below) + 1))


def test_light_has_derivatives():
    x = torch.tensor([-1.2, -0.99, -0.5, 0.3, 1.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(to_linear, x) and torch.autograd.gradcheck(to_encoded, x)


def test_noise_of_encoded_values_becomes_noise_of_light():
    d = torch.linspace(-0.8, 0.9, 10000, dtype=torch.float64).view(1, 100, 100)
    noisy = d + 1e-4 * torch.randn(d.shape, dtype=d.dtype, generator=torch.Generator().manual_seed(0))
    seen = float((to_linear(noisy) - to_linear(d)).square().mean().sqrt())
    assert linear_noise(d, 1e-4) == pytest.approx(seen, rel=0.03)


@pytest.mark.parametrize("light", ["linear", "encoded"])
@pytest.mark.parametrize("padding_mode", ["valid", "reflect"])
def test_the_corrected_measurement_of_the_true_scene_is_its_blur(light, padding_mode):
    x = 1.6 * torch.rand(1, 3, 21, 18, dtype=torch.float64) - 1
    camera = Camera(GaussianBlur(5, 1.0, padding_mode), light)
    torch.testing.assert_close(camera.corrected(camera.record(x), x), camera.blur(x))


def test_a_clipped_value_is_explained_by_any_scene_beyond_it():
    x = torch.linspace(-2, 2, 400, dtype=torch.float64).view(1, 1, 20, 20)
    for light in ("linear", "encoded"):
        camera = Camera(GaussianBlur(3, 0.7, "reflect"), light)
        recorded = camera.record(x)
        d = recorded.clamp(-1, 1)
        torch.testing.assert_close(camera.corrected(d, x), camera.blur(x))
        darker = camera.corrected(d, 0.1 * x)  # it does not explain the clipped values, which then count
        assert (darker - camera.blur(0.1 * x))[d == 1].min() > 0.5
    assert float(clipped(d).double().mean()) == pytest.approx(0.5, abs=0.05) and not clipped(0.5 * d).any()
