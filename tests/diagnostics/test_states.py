"""Diagnostics of layers with structured and complex states, and of implicit networks of a user's own."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import jfbfast
from jfbfast import Anderson, ImplicitNetwork, Picard, Status
from jfbfast.diagnostics import convergence_history, gradient_agreement, jfb_condition, plots, report
from jfbfast.imaging.quality import psnr
from jfbfast.implicit.methods import GRADIENTS

REAL, COMPLEX = torch.float64, torch.complex128


class Pair(nn.Module):
    """A layer on (complex (B, 3), real (B, 4)) with two features of each sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.phase = nn.Linear(4, 4, dtype=REAL), nn.Parameter(torch.randn(3, dtype=COMPLEX) / 4)

    def forward(self, x, d):
        z, h = x
        return self.phase * z.conj() + 0.2 * h[:, :3] + d["z"], 0.3 * torch.tanh(self.mix(h) + z.imag.sum(1)[:, None])


@pytest.fixture
def posed():
    d = {"z": torch.randn(2, 3, dtype=COMPLEX, generator=torch.Generator().manual_seed(0))}
    start = torch.zeros(2, 3, dtype=COMPLEX), torch.zeros(2, 4, dtype=REAL)
    return Pair(), {"x0": start, "inputs": (d,), "solver": Anderson(tol=1e-8)}


def test_a_layer_with_a_complex_tuple_as_state_is_reported(posed, tmp_path):
    layer, options = posed
    found = report(layer, **options, iterations=30, steps=10)
    assert (found.solution.status == Status.CONVERGED).all() and set(found.cosine) == set(GRADIENTS)
    assert found.solution.value[0].dtype == found.history.solution.value[0].dtype == COMPLEX
    assert found.ritz_values.shape == (2, 10)  # of the 6 + 4 real numbers

    def real(v):
        out = layer((torch.view_as_complex(v[:6].view(1, 3, 2)), v[None, 6:]), {"z": options["inputs"][0]["z"][:1]})
        return torch.cat([torch.view_as_real(out[0]).flatten(), out[1].flatten()])

    z, h = (v[0] for v in found.history.solution.value)
    at = torch.cat([torch.view_as_real(z).flatten(), h])
    dense = torch.autograd.functional.jacobian(real, at)
    torch.testing.assert_close(found.contraction_factor[0], torch.linalg.eigvals(dense).abs().max())
    torch.testing.assert_close(found.operator_norm[0], torch.linalg.matrix_norm(dense, 2))
    assert (found.cosine["implicit"] > 0.9999).all() and "contraction factor" in str(found)
    figure = found.plot(tmp_path / "report.png")
    assert isinstance(figure, Figure) and len(figure.axes) == 4 and (tmp_path / "report.png").stat().st_size > 1000


def test_a_history_of_states_ends_at_the_fixed_point_and_is_drawn(posed):
    layer, options = posed
    history = convergence_history(layer, iterations=25, **options)
    assert history.residual.shape == (25, 2) and (history.residual[-1] < 1e-12).all()
    value = history.solution.value
    torch.testing.assert_close(layer(value, options["inputs"][0]), value)
    figure = plots.history(history, tol=1e-6)
    (axis,) = figure.axes
    assert len(axis.lines) == 2 + 2 + 1 and axis.get_yscale() == "log"  # two curves with dots, and the tolerance
    assert len(plots.history(history).axes[0].lines) == 2


def test_gradients_of_any_layer_are_compared_with_the_exact_one(posed):
    layer, options = posed
    value = convergence_history(layer, iterations=30, **options).solution.value
    cotangent = tuple(torch.ones_like(v) for v in value)
    cosine, ratio = gradient_agreement(layer, None, value, cotangent, **options)
    assert set(cosine) == set(ratio) == set(GRADIENTS)
    assert (cosine["implicit"] > 0.99999).all() and (cosine["neumann"] > cosine["jfb"]).all()
    assert (jfb_condition(layer, value, options["inputs"]) > 1).all()
    with pytest.raises(ValueError, match="model has no parameters that require a gradient"):
        gradient_agreement(lambda *given: layer(*given), None, value, cotangent, **options)
    with pytest.raises(TypeError, match="cotangent has another structure than x0"):
        gradient_agreement(layer, None, value, value[0], **options)
    with pytest.raises(ValueError, match=r"value has shape \(2, 2\); it takes that of x0, \(2, 3\)"):
        gradient_agreement(lambda x: x, None, torch.zeros(2, 2), torch.zeros(2, 3), x0=torch.zeros(2, 3))


@pytest.mark.parametrize("measure", [report, convergence_history])
def test_a_truth_is_refused_for_states_that_are_not_one_real_tensor(measure, posed):
    layer, options = posed
    with pytest.raises(TypeError, match="x is given; it takes None for a state or inputs that are not real tensors"):
        measure(layer, x=torch.zeros(2, 10), **options)


class Richardson(ImplicitNetwork):
    """A user's network: a gradient step with a prior that is computed once from d."""

    def __init__(self, **options):
        super().__init__(jfbfast.GaussianBlur(), **options)
        self.network = nn.Conv2d(1, 1, 3, padding=1)

    def injected(self, d):
        return (torch.tanh(self.network(d)),)

    def step(self, x, d, prior):
        return x - 0.5 * (self.blur.gradient(x, d, x - prior))


def test_an_implicit_network_of_a_users_own_is_reported():
    torch.manual_seed(0)
    model, d = Richardson(solver=Picard(1e-5, 100)).double(), torch.rand(2, 1, 8, 7, dtype=REAL)
    found = report(model, d, d, iterations=40, steps=56)
    assert (found.solution.status == Status.CONVERGED).all() and found.history.psnr.shape == (40, 2)
    assert found.lipschitz_bound is None and (found.contraction_factor <= 0.5).all()
    with pytest.raises(TypeError, match="model is a Richardson, which takes the measurements d"):
        report(model, d, solver=Anderson())


def test_a_network_is_judged_by_the_images_of_its_states():
    denoiser = jfbfast.NonexpansiveDenoiser(1, 2, 2)
    model = jfbfast.DEADMM(jfbfast.GaussianBlur(), denoiser, weight=0.2, solver=Picard(1e-6, 100)).double()
    x = torch.rand(2, 1, 8, 7, dtype=REAL)
    d = model.blur(x)
    history = convergence_history(model, d, x, iterations=60)
    expected = psnr(model.image(model.layer(history.solution.value, d), d), x)
    torch.testing.assert_close(history.psnr[-1], expected.detach(), rtol=1e-6, atol=0)
    found = report(model, d, x, iterations=60, steps=20)
    torch.testing.assert_close(found.history.psnr, history.psnr, rtol=1e-6, atol=0)
    assert (found.cosine["implicit"] > 0.999).all()
