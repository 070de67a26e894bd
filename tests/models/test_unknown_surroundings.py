"""Networks for measurements with padding_mode="valid": x has a margin around the frame of d."""

import pytest
import torch
import torch.nn.functional as F

from jfbfast import (
    RED,
    Anderson,
    Blur,
    DEGrad,
    GaussianBlur,
    Status,
    UNet,
    jacobian_penalty,
)
from jfbfast.backends.tensors import padded
from jfbfast.models.config import ModelConfig
from jfbfast.models.feed_forward import FeedForward, plug_and_play
from jfbfast.operators.frame import cut, cut_to

BLUR = GaussianBlur((5, 3), 1.0, "valid")  # a margin of (2, 1)


class Sliced(torch.nn.Module):
    """The same operator by PyTorch's own convolution."""

    def __init__(self):
        super().__init__()
        y, x = (torch.tensor(taps, dtype=torch.float64) for taps in (BLUR.taps.y, BLUR.taps.x))
        self.kernel = y[:, None] * x

    def forward(self, x):
        return F.conv2d(x, self.kernel.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])

    def adjoint(self, y):
        return F.conv_transpose2d(y, self.kernel.expand(y.shape[1], 1, -1, -1), groups=y.shape[1])


def network(operator, form):
    torch.manual_seed(0)
    solver = Anderson(tol=1e-10, max_iter=300)
    if form == "paper":
        return DEGrad(operator, RED(torch.nn.Conv2d(2, 2, 3, padding=1), 0.5), step_size=0.7, solver=solver)
    denoiser = UNet(2, (4, 6), (1, 1), injection=form == "injection")
    return DEGrad(operator, RED(denoiser, 0.1, "weight"), preconditioner="exact", solver=solver)


@pytest.mark.parametrize("form", ["paper", "filtered", "injection"])
def test_output_and_gradients_are_those_of_torchs_convolution(form):
    d = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    found = []
    for operator in (BLUR, Sliced()):
        model = network(operator, form).double()
        leaf = d.clone().requires_grad_()
        restored = model(leaf)
        assert restored.shape == (2, 2, 11, 8) == model.start(d).shape
        assert (model.solution.status == Status.CONVERGED).all()
        cut_to(restored, d).square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None for g in gradients)
        found.append((restored, leaf.grad, *gradients))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("blur", [BLUR, Blur(torch.arange(1.0, 16).view(5, 3) / 120, "valid")])
def test_a_start_has_the_shape_of_the_restoration(blur):
    model, d = network(blur, "filtered").double().eval(), torch.randn(1, 2, 7, 6, dtype=torch.float64)
    restored = model(d)
    model(d, x0=restored)
    assert model.solution.iterations.tolist() == [1]
    with pytest.raises(ValueError, match=r"x0 has shape \(1, 2, 7, 6\); it takes that of Aᵀd, \(1, 2, 11, 8\)"):
        model(d, x0=d)
    with pytest.raises(ValueError, match="d has shape"):
        model(d[0])


@pytest.mark.parametrize("blur", [BLUR, Blur(torch.arange(1.0, 16).view(5, 3) / 120, "valid")])
def test_the_penalty_takes_the_last_solution(blur):
    model, d = network(blur, "filtered").double(), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    model(d).sum().backward()
    jacobian_penalty(model, d, bound=0.0).backward()
    with pytest.raises(ValueError, match="x is None"):
        jacobian_penalty(model, torch.randn(2, 2, 12, 10))


def test_the_other_networks_restore_the_margin_too():
    d = torch.randn(1, 2, 7, 6)
    assert FeedForward(BLUR, torch.nn.Identity())(d).shape == (1, 2, 11, 8)
    assert plug_and_play(BLUR, d, lambda z: 0.5 * z, 0.5).value.shape == (1, 2, 11, 8)


def test_a_description_of_a_model_keeps_the_mode():
    config = ModelConfig(kernel_size=7, padding_mode="valid")
    assert config.blur().margin == (3, 3) and config.least_side == 7
    assert ModelConfig(kernel_size=7).least_side == 4


def test_cutting_undoes_padding():
    d = torch.randn(2, 3, 4)
    assert torch.equal(cut(padded(d, (2, 1)), (2, 1)), d) and padded(d, (2, 1)).shape == (2, 7, 6)
    assert padded(d, (2, 1)).count_nonzero() == d.numel()
    assert cut(d, (0, 0)) is padded(d, (0, 0)) is d
    assert torch.equal(cut_to(padded(d, (2, 1)), d), d)
