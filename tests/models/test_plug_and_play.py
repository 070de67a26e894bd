"""Plug-and-play restoration: its steps, its settings and its files."""

import math

import pytest
import torch

import jfbfast
from jfbfast import Blur, GaussianBlur, PlugAndPlay, point_spread
from jfbfast.models.config import ModelConfig
from jfbfast.models.plug_and_play import GaussianDenoiser

MOTION = point_spread.motion(length=5, angle=30)


@pytest.mark.parametrize("blur", [GaussianBlur(5, 1.0, "valid"), Blur(MOTION, "circular"), Blur(MOTION, "valid")])
def test_the_steps_are_those_of_half_quadratic_splitting(blur):
    d, noise, told = torch.rand(2, 1, 12, 15, dtype=torch.float64) - 0.5, 0.02, []

    def denoiser(x, level):
        told.append(level)
        return x / (1 + level)

    found = PlugAndPlay(denoiser, blur, noise, steps=3)(d)

    count = blur.adjoint(d[:1]).numel()
    basis = torch.eye(count, dtype=torch.float64).view(count, *blur.adjoint(d[:1]).shape[1:])
    dense = blur(basis).flatten(1).T  # the columns of A
    y, x = blur.margin
    image = torch.nn.functional.pad(d, (x, x, y, y), mode="replicate").flatten(1)
    first = 2 * 49 / 255
    for level in (first, math.sqrt(first * noise), noise):
        damping = 0.23 * (noise / level) ** 2
        normal = dense.T @ dense + damping * torch.eye(count, dtype=torch.float64)
        image = torch.linalg.solve(normal, (d.flatten(1) @ dense + damping * image).T).T / (1 + level)
        image = image.clamp(-1, 1)
    torch.testing.assert_close(found.flatten(1), image, rtol=0, atol=2e-5 if isinstance(blur, Blur) else 1e-9)
    assert told == pytest.approx([first, math.sqrt(first * noise), noise])


def test_the_gradient_goes_through_every_step():
    torch.manual_seed(0)
    network = GaussianDenoiser(1, (2, 4), (1, 1)).double()
    model = PlugAndPlay(network, GaussianBlur(3, 0.8), 0.05, steps=2)
    d = torch.rand(1, 1, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, d)


def test_a_measurement_that_is_refused_changes_nothing():
    model = PlugAndPlay(lambda x, noise: x, GaussianBlur(), 0.05, noise_range=(0.0, 0.1))
    before = model.blur
    with pytest.raises(ValueError, match=r"noise is 0.2; it takes a number from 0 to 0.1"):
        model.set_measurement(Blur(MOTION), 0.2)
    with pytest.raises(TypeError, match="blur is Identity; it takes a SeparableBlur or a Blur"):
        model.set_measurement(torch.nn.Identity(), 0.05)
    assert model.blur is before and model.noise == 0.05
    with pytest.raises(TypeError, match=r"denoiser is 3; it takes a function D\(x, σ\) or a module"):
        PlugAndPlay(3)
    with pytest.raises(ValueError, match="steps is 0"):
        PlugAndPlay(lambda x, noise: x, steps=0)
    with pytest.raises(ValueError, match="plug-and-play takes a GaussianDenoiser"):
        ModelConfig("plug-and-play").model()


def test_it_restores_better_than_tikhonov_by_the_shipped_denoiser(tmp_path):
    x = torch.zeros(1, 3, 48, 56)
    x[..., 12:30, 20:] = 0.6
    x[..., 30:, :16] = -0.5
    blur = Blur(point_spread.motion(length=7, angle=40), padding_mode="valid", tol=1e-4)
    d = blur(x) + 0.01 * torch.randn(blur(x).shape, generator=torch.Generator().manual_seed(0))
    model = PlugAndPlay.from_pretrained("plug-and-play")
    model.set_measurement(blur, 0.01)
    y, w = blur.margin

    def error(image):
        return float((image - x)[..., y:-y, w:-w].square().mean())

    with torch.no_grad():
        found = model(d)
    assert error(found) < 0.3 * error(jfbfast.tikhonov(blur, d, 1e-3))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(PlugAndPlay.from_pretrained(tmp_path)(d), found)
    report = jfbfast.restore(d[0], motion=(7, 40), noise=0.01, light="encoded", checkpoint="plug-and-play").report
    assert (report.method, report.evaluations) == ("plug-and-play", 8)


def test_an_empty_batch_gives_an_empty_one():
    model = PlugAndPlay(lambda x, level: x, GaussianBlur(5, 1.0, "valid"))
    assert model(torch.empty(0, 3, 12, 15)).shape == (0, 3, 16, 19)
