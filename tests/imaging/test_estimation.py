"""Estimates of a photograph's blur and noise."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jfbfast
from jfbfast.imaging import estimation
from jfbfast.imaging.photographs import ImageError, Photograph, write_photograph

SIDE = 192


@functools.cache
def dead_leaves(seed, side=SIDE + 24, channels=3):
    """Opaque discs that hide one another, radii by a power law, antialiased: as sharp as photographs are."""
    random = np.random.default_rng(seed)
    scene = np.zeros((channels, 2 * side, 2 * side), dtype=np.float32)
    y, x = np.ogrid[: 2 * side, : 2 * side]
    for _ in range(400):
        radius = 6 * random.uniform(0.003, 1) ** -0.5
        top, left = random.uniform(0, 2 * side, 2)
        scene[:, np.square(y - top) + np.square(x - left) < radius**2] = random.uniform(-0.8, 0.8, (channels, 1))
    return F.avg_pool2d(torch.from_numpy(scene)[None], 2)


def photograph(seed, sigma, noise, channels=3, rounded=True):
    """A blurred dead-leaves image (1, C, 192, 192) in 8 bits, with noise."""
    blurred = jfbfast.GaussianBlur(sigma=sigma, padding_mode="valid")(dead_leaves(seed, channels=channels))
    middle = (blurred.shape[-1] - SIDE) // 2
    blurred = blurred[..., middle : middle + SIDE, middle : middle + SIDE]
    found = blurred + noise * torch.randn_like(blurred)
    return ((found + 1) * 127.5).round() / 127.5 - 1 if rounded else found


@pytest.mark.parametrize("sigma, noise", [(1.0, 0.03), (1.5, 0.005), (2.0, 0.01), (3.0, 0.01)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_and_noise_of_dead_leaves_are_found(sigma, noise, channels):
    found = jfbfast.estimate(photograph(1, sigma, noise, channels))
    assert abs(math.log(found.sigma / sigma)) < 0.25
    assert abs(math.log(found.noise / math.hypot(noise, 0.0023))) < 0.3
    assert found.sigma_range[0] < found.sigma < found.sigma_range[1]
    assert found.noise_range[0] < found.noise < found.noise_range[1]


def test_the_estimated_sigma_grows_with_the_blur():
    found = [jfbfast.estimate(photograph(2, sigma, 0.01)).sigma for sigma in (0.4, 0.8, 1.2, 1.8, 2.6, 3.8)]
    assert found == sorted(found)


def test_the_estimated_noise_grows_with_the_noise():
    found = [jfbfast.estimate(photograph(3, 1.5, noise, rounded=False)).noise for noise in (0, 0.003, 0.01, 0.03, 0.1)]
    assert found == sorted(found)


def test_a_photograph_without_structure_gets_a_wide_range():
    leaves = jfbfast.estimate(photograph(4, 1.5, 0.01))
    flat = jfbfast.estimate(0.3 + 0.01 * torch.randn(3, SIDE, SIDE))
    assert math.log(flat.sigma_range[1] / flat.sigma_range[0]) > 1
    assert math.log(leaves.sigma_range[1] / leaves.sigma_range[0]) < 0.5
    assert flat.noise == pytest.approx(0.01, rel=0.25)


def test_the_estimate_is_deterministic_and_takes_each_form_of_a_photograph(tmp_path):
    photo = photograph(5, 1.2, 0.01)
    found = jfbfast.estimate(photo)
    assert jfbfast.estimate(photo) == jfbfast.estimate(photo[0]) == found
    file = tmp_path / "leaves.png"
    write_photograph(file, Photograph((photo[0] + 1) / 2, None, np.dtype("uint8")))
    assert jfbfast.estimate(file).sigma == pytest.approx(found.sigma, rel=1e-3)
    assert jfbfast.estimate(str(file)).noise == pytest.approx(found.noise, rel=1e-3)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_a_constant_photograph_has_an_estimate(value):
    found = jfbfast.estimate(torch.full((3, 64, 70), value))
    assert all(math.isfinite(number) for number in (found.sigma, found.noise, *found.sigma_range, *found.noise_range))


def test_large_photographs_are_read_on_a_sparse_grid_of_patches():
    assert len(estimation._patches(torch.zeros(1, 3000, 2000))) <= estimation.PATCHES


def test_white_noise_has_its_variance_on_every_ring():
    noise = 0.1 * torch.randn(1, 1024, 1024)
    window, rings = estimation._rings()
    power = torch.fft.rfft2(estimation._patches(noise) * window).abs().square().mean((0, 1)).flatten() @ rings
    torch.testing.assert_close(power[1:], torch.full((len(power) - 1,), 0.01), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "photo, words",
    [
        (torch.zeros(3, 63, 90), "photo has shape (3, 63, 90); it takes one photograph"),
        (torch.zeros(2, 3, 64, 64), "photo has shape (2, 3, 64, 64); it takes one photograph"),
        (torch.zeros(4, 64, 64), "photo has shape (4, 64, 64); it takes one photograph"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "photo is of torch.uint8; it takes floating-point values"),
        (torch.full((1, 64, 64), 255.0), "photo has values from 255 to 255; it takes values in [-1, 1]"),
        (torch.full((1, 64, 64), math.nan), "photo has values from nan to nan"),
    ],
)
def test_what_is_no_photograph_is_refused(photo, words):
    with pytest.raises(ValueError) as caught:
        jfbfast.estimate(photo)
    assert words in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ImageError, match="there is no such file"):
        jfbfast.estimate(tmp_path / "none.png")


def test_the_shipped_estimator_is_small_and_no_network_for_restoring():
    file = estimation.WEIGHTS / "estimator.npz"
    assert file.stat().st_size < 200_000 and "estimator" not in jfbfast.pretrained_names()
