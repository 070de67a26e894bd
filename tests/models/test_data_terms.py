"""DE-GRAD with other data fidelities: against dense solves, SciPy's minimisers and inpainting by the operator."""

import copy
import pickle
import warnings

import pytest
import scipy.optimize
import torch
from torch import nn
from torch.autograd import gradcheck

import jfbfast
from jfbfast import (
    RED,
    Anderson,
    DEGrad,
    DnCNN,
    GaussianBlur,
    Implicit,
    IterativeOperator,
    NonexpansiveDenoiser,
    Picard,
    UNet,
)
from jfbfast.operators.data_fidelity import DataFidelity, Poisson, WeightedLeastSquares

TIGHT = Anderson(tol=1e-11, max_iter=2000)


class Shrink(nn.Module):
    """R(x) = s(x − c), the gradient of s‖x − c‖²/2."""

    def __init__(self, strength, centre=0.0):
        super().__init__()
        self.strength, self.centre = nn.Parameter(torch.tensor(strength, dtype=torch.float64)), centre

    def forward(self, x):
        return self.strength * (x - self.centre)


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self.mask * x

    adjoint = forward


def matrix_of(operator, shape):
    unit = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    return operator(unit).flatten(1).T


@pytest.mark.parametrize("mirror", [True, False])
def test_a_poisson_layer_finds_the_minimiser_that_scipy_finds(mirror):
    blur = GaussianBlur(kernel_size=3, sigma=0.7)
    x = torch.rand(2, 1, 5, 6, dtype=torch.float64) * 1.6 - 0.7
    gain, background = 0.2, 1.0
    d = torch.poisson((blur(x) + background) / gain) * gain - background
    fidelity = Poisson(gain, background, mirror=mirror, floor=1e-2 if mirror else 0.1)
    step = 0.1 if mirror else 0.01
    model = DEGrad(blur, Shrink(2.0, 0.3), step_size=step, data_fidelity=fidelity, solver=TIGHT)
    found = model(d).detach()
    assert (found + background > 0.1).all()
    own = fidelity.inputs(d)

    def objective(v):
        v = torch.from_numpy(v).view_as(d).requires_grad_()
        value = (fidelity.value(blur, v, d, *own) + (v - 0.3).square().flatten(1).sum(1)).sum()
        return value.item(), torch.autograd.grad(value, v)[0].flatten().numpy()

    least = scipy.optimize.minimize(
        objective,
        d.numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-9, "maxiter": 2000},
    )
    torch.testing.assert_close(found, torch.from_numpy(least.x).view_as(d), rtol=0, atol=1e-6)


def weights_of_each_sample(d):
    return torch.rand(d.shape, generator=torch.Generator().manual_seed(1), dtype=d.dtype) * 2


@pytest.mark.parametrize("preconditioner", [None, "exact"])
@pytest.mark.parametrize("padding_mode", ["reflect", "valid"])
def test_weighted_least_squares_agrees_with_a_dense_solve(preconditioner, padding_mode):
    blur = GaussianBlur(kernel_size=3, sigma=0.8, padding_mode=padding_mode)
    d = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    weights = weights_of_each_sample(d)
    options = {"step_size": 0.4} if preconditioner is None else {"preconditioner": "exact", "damping": 0.2}
    model = DEGrad(blur, Shrink(0.3), data_fidelity=WeightedLeastSquares(weights), solver=TIGHT, **options)
    found = model(d)
    a = matrix_of(blur, found.shape[1:])
    for sample, measured, w in zip(found.detach().flatten(1), d.flatten(1), weights.flatten(1), strict=True):
        system = a.T @ (w[:, None] * a) + 0.3 * torch.eye(a.shape[1], dtype=torch.float64)
        torch.testing.assert_close(sample, torch.linalg.solve(system, a.T @ (w * measured)), rtol=0, atol=1e-8)


def filtered(operator, network, **options):
    return DEGrad(
        operator,
        RED(network, 0.2, "weight"),
        preconditioner="exact",
        solver=Anderson(tol=1e-8, max_iter=500),
        **options,
    ).double()


def test_a_mask_as_weights_is_a_mask_in_the_operator():
    d = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    mask = (weights_of_each_sample(d) > 0.8).double()
    network = UNet(1, (4, 6), (1, 1), injection=True)
    of_weights = filtered(GaussianBlur(kernel_size=1), network, data_fidelity=WeightedLeastSquares(mask))
    of_operator = filtered(Mask(mask), network)
    torch.testing.assert_close(of_weights.start(d), of_operator.start(mask * d))
    torch.testing.assert_close(of_weights.layer(d, d), of_operator.layer(d, mask * d))
    grads = []
    for model, measured in ((of_weights, d), (of_operator, mask * d)):
        restored = model(measured)
        model.zero_grad()
        restored.square().sum().backward()
        grads.append([restored.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_samples_with_weights_of_their_own_leave_the_batch():
    sizes = []

    class Counts(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return 0.1 * x

    blur, d = GaussianBlur(kernel_size=3), torch.randn(3, 1, 6, 6)
    weights = torch.tensor([1.9, 0.5, 0.05]).view(3, 1, 1, 1)
    model = DEGrad(blur, Counts(), data_fidelity=WeightedLeastSquares(weights), solver=Picard(tol=1e-4, max_iter=900))
    together = model(d)
    assert set(sizes) >= {1, 3}
    for i in range(3):
        model.data_fidelity.weights = weights[i]
        torch.testing.assert_close(model(d[i : i + 1])[0], together[i])


@pytest.mark.parametrize(
    "options",
    [{"step_size": 0.5}, {"preconditioner": "exact", "damping": 0.3}],
    ids=["gradient step", "preconditioned"],
)
def test_the_implicit_gradient_in_the_weights_and_the_measurements_is_exact(options):
    blur, regularizer = GaussianBlur(kernel_size=3), Shrink(0.4)
    d = torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = (torch.rand(2, 1, 2, 3, dtype=torch.float64) + 0.2).requires_grad_()

    def restored(d, weights, strength):
        fidelity = WeightedLeastSquares(lambda d: weights)
        model = DEGrad(blur, regularizer, data_fidelity=fidelity, solver=TIGHT, gradient=Implicit(tol=1e-11), **options)
        return model(d)

    assert gradcheck(restored, (d, weights, regularizer.strength), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("mirror", [True, False])
def test_the_implicit_gradient_of_a_poisson_layer_is_exact(mirror):
    fidelity = Poisson(gain=0.5, background=1.0, mirror=mirror, floor=0.01)
    model = DEGrad(
        GaussianBlur(kernel_size=3),
        Shrink(1.0),
        step_size=0.1,
        data_fidelity=fidelity,
        solver=TIGHT,
        gradient=Implicit(tol=1e-11),
    )
    d = (torch.rand(1, 1, 2, 3, dtype=torch.float64) * 2 - 0.5).requires_grad_()
    assert gradcheck(lambda d, strength: model(d), (d, model.regularizer.strength), atol=1e-6, fast_mode=True)


def test_trained_weights_get_a_gradient_and_a_state_dict():
    d = torch.randn(2, 1, 6, 6)
    fidelity = WeightedLeastSquares(nn.Parameter(torch.ones(6, 6)))
    red = RED(DnCNN(1, 4, 2, norm=None, residual=True), 0.1, "weight")
    model = DEGrad(GaussianBlur(), red, preconditioner="exact", data_fidelity=fidelity).eval()
    model(d).square().sum().backward()
    assert fidelity.weights.grad.abs().max() > 0
    assert "data_fidelity.weights" in model.state_dict()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(d), model(d), rtol=0, atol=0)


def test_fixed_weights_and_other_fidelities_add_nothing_to_a_state_dict():
    blur, red = GaussianBlur(), RED(DnCNN(1, 4, 2, norm=None, residual=True), 0.1)
    states = [
        DEGrad(blur, red, data_fidelity=fidelity).state_dict()
        for fidelity in (None, WeightedLeastSquares(torch.ones(6, 6)), Poisson(background=1.0))
    ]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    model = DEGrad(blur, red, data_fidelity=Poisson(0.1, 1.0), step_size=0.02)
    model.load_state_dict(states[1])


def test_a_fidelity_of_ones_own_and_those_of_deepinv_are_taken():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dinv = pytest.importorskip("deepinv")

    class Halved(DataFidelity):
        def gradient(self, operator, x, d):
            return operator.adjoint(operator(x) - d) / 2

    blur, d = GaussianBlur(), torch.randn(2, 1, 8, 8)
    red = RED(DnCNN(1, 4, 3, norm=None, residual=True), 0.1)
    expected = DEGrad(blur, red, step_size=0.4)
    for fidelity, step in (
        (Halved(), 0.8),
        (dinv.optim.data_fidelity.L2(), 0.4),
        (WeightedLeastSquares(0.5), 0.8),
    ):
        model = DEGrad(blur, red, step_size=step, data_fidelity=fidelity)
        weight = 0.05 if step == 0.8 else 0.1
        with torch.no_grad():
            red.log_weight.fill_(torch.tensor(weight).log())
            found = model.layer(d, d)
            red.log_weight.fill_(torch.tensor(0.1).log())
        torch.testing.assert_close(found, expected.layer(d, d), rtol=1e-4, atol=1e-5)
    for operator in (dinv.physics.Inpainting((1, 8, 8), mask=0.5), blur):
        model = DEGrad(operator, red, step_size=0.05, data_fidelity=dinv.optim.data_fidelity.L1())
        model.solver = Picard(tol=0, max_iter=5)
        model(d).sum().backward()


def test_a_fidelity_that_is_no_square_takes_no_preconditioner():
    red = RED(DnCNN(1, 4, 2, norm=None, residual=True), 0.1)
    with pytest.raises(ValueError, match="data_fidelity is Poisson; the preconditioned layer takes LeastSquares or"):
        DEGrad(GaussianBlur(), red, preconditioner="exact", data_fidelity=Poisson(background=1.0))
    with pytest.raises(TypeError, match="data_fidelity is 'poisson'; it takes"):
        DEGrad(GaussianBlur(), red, data_fidelity="poisson")
    with pytest.raises(ValueError, match=r"d has values down to -3\.0; the Poisson"):
        DEGrad(GaussianBlur(), red, data_fidelity=Poisson(background=1.0))(torch.full((1, 1, 6, 6), -3.0))


def test_the_tolerance_of_weighted_solves_is_that_of_the_operator():
    d = torch.randn(2, 1, 8, 8)
    fidelity = WeightedLeastSquares(torch.rand(8, 8) + 0.5)
    rough, _ = fidelity.least_squares(IterativeOperator(GaussianBlur(), tol=1e-2, max_iter=7), d, *fidelity.inputs(d))
    assert (rough.tol, rough.max_iter) == (1e-2, 7)


def test_a_poisson_layer_trains_on_counts():
    blur = GaussianBlur(kernel_size=3, sigma=0.8, padding_mode="reflect")
    x = nn.functional.interpolate(torch.rand(4, 1, 4, 4), size=16, mode="bilinear") * 2 - 1
    gain = 0.05
    d = torch.poisson((blur(x) + 1) / gain) * gain - 1
    red = RED(NonexpansiveDenoiser(1, 4, 3), 1 / gain)
    model = DEGrad(blur, red, step_size=0.3 * gain, data_fidelity=Poisson(gain, 1.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(model(d), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and losses[-1] < nn.functional.mse_loss(d, x), losses[::5]


def test_the_jacobian_penalty_leaves_out_samples_with_weights_of_their_own():
    blur, d = GaussianBlur(), torch.randn(3, 1, 6, 6)
    d[1] = torch.nan
    weights = torch.rand(3, 1, 6, 6)
    model = DEGrad(blur, RED(NonexpansiveDenoiser(1, 4, 2), 0.1), data_fidelity=WeightedLeastSquares(weights))
    found = jfbfast.jacobian_penalty(model, d, x=torch.randn(3, 1, 6, 6), bound=0.0, iterations=30)
    model.data_fidelity.weights = weights[::2]
    expected = jfbfast.jacobian_penalty(model, d[::2], x=torch.randn(2, 1, 6, 6), bound=0.0, iterations=30)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)
