"""What users give an implicit network: data of each sample, values that were not measured, and no operator."""

import copy
import pickle

import deepinv
import pytest
import torch
from torch import nn

import jfbfast
from jfbfast import DEADMM, RED, DEGrad, DEProx, GaussianBlur, ImplicitNetwork, NonexpansiveDenoiser, Picard
from jfbfast.operators.data_fidelity import DataFidelity, WeightedLeastSquares


def red(filter_damping=None):
    return RED(NonexpansiveDenoiser(1, 4, 2), 0.1, filter_damping)


def test_a_fidelity_that_holds_data_of_each_sample_sees_whole_batches():
    class Scaled(DataFidelity):
        def __init__(self, scales):
            super().__init__()
            self.register_buffer("scales", scales)

        def gradient(self, operator, x, d):
            return self.scales * operator.adjoint(operator(x) - d)

    scales, d = torch.tensor([1.9, 0.5, 0.05]).view(3, 1, 1, 1), torch.randn(3, 1, 6, 6)
    solver = Picard(tol=1e-4, max_iter=900)
    ours = DEGrad(GaussianBlur(3), nn.Tanh(), step_size=0.3, data_fidelity=Scaled(scales), solver=solver)
    expected = DEGrad(
        GaussianBlur(3), nn.Tanh(), step_size=0.3, data_fidelity=WeightedLeastSquares(scales), solver=solver
    )
    torch.testing.assert_close(ours(d), expected(d), rtol=1e-3, atol=1e-3)


MODELS = {
    "DEGrad": lambda **options: DEGrad(GaussianBlur(), red(), **options),
    "filtered": lambda **options: DEGrad(GaussianBlur(), red("weight"), preconditioner="exact", **options),
    "DEProx": lambda **options: DEProx(GaussianBlur(), NonexpansiveDenoiser(1, 4, 2), **options),
    "DEADMM": lambda **options: DEADMM(GaussianBlur(), NonexpansiveDenoiser(1, 4, 2), **options),
}


@pytest.mark.parametrize("name", MODELS)
def test_values_that_were_not_measured_may_be_nan(name):
    d, mask = torch.rand(2, 1, 8, 8), (torch.rand(2, 1, 8, 8) > 0.3).float()
    fidelity = WeightedLeastSquares(mask)
    model = MODELS[name](data_fidelity=fidelity)
    zeroed, spoilt = (d.masked_fill(mask == 0, value) for value in (0.0, torch.nan))
    found = model(spoilt)
    torch.testing.assert_close(found, model(zeroed), rtol=0, atol=0)
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    values = (fidelity.value(model.blur, found, v, *fidelity.inputs(v)) for v in (spoilt, zeroed))
    torch.testing.assert_close(*values)


def test_weights_can_be_assigned_in_every_form():
    d, fidelity = torch.ones(1, 1, 2, 2), WeightedLeastSquares(2.0)
    for weights in (3.0, torch.tensor(3.0), lambda d: 3 * d, nn.Parameter(torch.tensor(3.0)), 3.0):
        fidelity.weights = weights
        torch.testing.assert_close(fidelity.inputs(d)[0].detach(), 3 * d)
        assert len([*fidelity.parameters()]) == isinstance(weights, nn.Parameter)
        assert list(fidelity.state_dict()) == ["weights"] * isinstance(weights, nn.Parameter)
    for twin in (copy.deepcopy(fidelity), pickle.loads(pickle.dumps(fidelity))):
        assert float(twin.weights) == 3.0
    with pytest.raises(ValueError, match=r"weights is -1\.0"):
        fidelity.weights = -1.0


class Blurred(nn.Module):
    def __init__(self):
        super().__init__()
        self.blur = GaussianBlur()

    def forward(self, x):
        return self.blur(x)

    def adjoint(self, y):
        return self.blur.adjoint(y)

    def scale(self):
        return 0.5


def test_a_step_finds_the_methods_of_the_operator_of_a_call():
    class Own(ImplicitNetwork):
        def step(self, x, d):
            return x - self.blur.scale() * (self.blur.gradient(x, d) + x)

    given, d = Blurred(), torch.rand(1, 1, 8, 8)
    solver = jfbfast.Anderson(tol=1e-6)
    expected = GaussianBlur().solve(GaussianBlur().adjoint(d), 1.0)
    torch.testing.assert_close(Own(None, solver=solver)(d, given), expected, rtol=0, atol=1e-5)
    wrapped = jfbfast.IterativeOperator(given)
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert twin.scale() == 0.5
    with pytest.raises(AttributeError, match="unknown"):
        wrapped.unknown  # noqa: B018


def test_every_operator_has_a_gradient_and_its_step():
    x, d = torch.rand(2, 1, 1, 8, 8)
    taps = torch.ones(1, 1, 3, 3) / 9
    inner = deepinv.physics.BlurFFT((1, 8, 8), filter=taps)
    expected = x - 0.3 * (inner.A_adjoint(inner.A(x) - d) + x)
    for operator in (jfbfast.operators.physics.PhysicsOperator(inner), jfbfast.IterativeOperator(inner)):
        torch.testing.assert_close(operator.gradient_step(x, d, x, 0.3), expected)
        torch.testing.assert_close(operator.gradient(x, d), inner.A_adjoint(inner.A(x) - d))


@pytest.mark.parametrize("make", [lambda: DEGrad(None, red()), lambda: DEADMM(None, NonexpansiveDenoiser(1, 4, 2))])
@pytest.mark.parametrize("use", ["layer", "start", "report", "update_averaging"])
def test_a_network_without_an_operator_says_what_to_call(make, use):
    model, d = make(), torch.rand(1, 1, 8, 8)
    calls = {
        "layer": lambda: model.layer(d, d),
        "start": lambda: model.start(d),
        "report": lambda: jfbfast.diagnostics.report(model, d),
        "update_averaging": lambda: model.update_averaging(d),
    }
    if use == "update_averaging":
        model.averaging = torch.tensor(torch.nan)
    with pytest.raises(ValueError, match=r"operator is None; .*network\.with_operator"):
        calls[use]()


@pytest.mark.parametrize("weights", [lambda d: d.isfinite().to(d.dtype), torch.tensor([1.0, 0.0])])
def test_a_value_that_was_not_measured_may_be_nan_in_training(weights):
    d = torch.rand(2, 1, 6, 6)
    d[..., 1::2] = torch.nan
    weights = weights if callable(weights) else weights.repeat(3)
    model = DEGrad(GaussianBlur(3), red(), data_fidelity=WeightedLeastSquares(weights), step_size=0.5)
    model(d).sum().backward()
    assert (model.solution.status == 0).all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class TwoStates(ImplicitNetwork):
    """A network whose state is a pair of images."""

    def __init__(self, blur, convolution):
        super().__init__(blur)
        self.convolution = convolution

    def start(self, d, *injected):
        return d, torch.zeros_like(d)

    def step(self, x, d, *injected):
        return 0.5 * x[0] + 0.1 * self.convolution(x[1]), 0.3 * x[1] + d

    def layer(self, x, d, *injected):
        return self.step(x, d)

    def image(self, state, d, *injected):
        return state[0]


def test_a_network_may_have_a_state_of_two_tensors():
    network, d = TwoStates(GaussianBlur(), NonexpansiveDenoiser(1, 2, 2)), torch.rand(2, 1, 6, 6)
    assert network(d).shape == d.shape and len(network.solution.value) == 2
    with pytest.raises(ValueError, match=r"d is torch.float64; it takes the dtype of the network's parameters"):
        network(d.double())
