"""The baselines with a network: plug-and-play, and a feed-forward network."""

import math

import pytest
import torch
from torch import nn

from jfbfast import GaussianBlur, Status, tikhonov
from jfbfast.models.feed_forward import FeedForward, plug_and_play

BLUR = GaussianBlur(5, 1.0, "zeros")


def test_feed_forward_is_a_network_after_tikhonov():
    d = torch.randn(2, 3, 12, 10)
    network = FeedForward(BLUR, nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), 0.02)
    torch.testing.assert_close(network(d), network.denoiser(tikhonov(BLUR, d, 0.02)))
    network(d).square().sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in network.parameters())


def test_plug_and_play_is_a_fixed_point():
    denoiser = GaussianBlur(3, 0.5)
    d = torch.randn(3, 3, 12, 10, dtype=torch.float64)
    weight = 0.5
    found = plug_and_play(BLUR, d, denoiser, weight, tol=1e-10, max_iter=2000)
    assert (found.status == Status.CONVERGED).all()
    x = found.value
    z = BLUR.solve(BLUR.adjoint(d) + weight * x, weight)
    torch.testing.assert_close(denoiser(z), x, rtol=0, atol=1e-7)
    torch.testing.assert_close(BLUR.adjoint(BLUR(z) - d) + weight * (z - x), torch.zeros_like(z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_weight_that_is_not_positive_is_named(weight):
    with pytest.raises(ValueError, match="weight is"):
        plug_and_play(BLUR, torch.zeros(1, 3, 8, 8), nn.Identity(), weight)
