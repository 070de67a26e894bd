"""DE-PROX and DE-ADMM: with a linear network against dense solves, and as modules."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import jfbfast
from helpers.operators import Bare
from jfbfast import DEADMM, RED, Anderson, DEGrad, DEProx, DnCNN, GaussianBlur, Implicit, NonexpansiveDenoiser, UNet
from jfbfast.operators.data_fidelity import Poisson, WeightedLeastSquares

TIGHT = Anderson(tol=1e-11, max_iter=2000)
SHAPE = (1, 4, 5)


class Prox(nn.Module):
    """The proximal operator (I + cL)⁻¹ of the quadratic c⟨x, L x⟩/2, with a symmetric L."""

    def __init__(self, scale):
        super().__init__()
        root = torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 4
        self.register_buffer("form", root.T @ root + 0.1 * torch.eye(20, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x):
        system = torch.eye(20, dtype=torch.float64) + self.scale * self.form
        return torch.linalg.solve(system, x.flatten(1).T).T.view_as(x)


BLUR = GaussianBlur(kernel_size=3, sigma=0.8, padding_mode="valid")
# Each form with the matrix S(AᵀWA, L) of the system S x = AᵀWd that its fixed point solves. All but the exact DE-PROX
# minimise ½⟨A x − d, W(A x − d)⟩ + s⟨x, L x⟩/2; that one alternates two proximal operators.
FORMS = {
    "DE-PROX": (
        lambda prox, **options: DEProx(BLUR, prox, step_size=0.7, **options),
        lambda n, form: n + 0.4 / 0.7 * form,
    ),
    "DE-PROX, exact": (
        lambda prox, **options: DEProx(BLUR, prox, preconditioner="exact", weight=0.3, **options),
        lambda n, form: n + 0.4 * n @ form + 0.3 * 0.4 * form,
    ),
    "DE-ADMM": (
        lambda prox, **options: DEADMM(BLUR, prox, weight=0.3, **options),
        lambda n, form: n + 0.4 * 0.3 * form,
    ),
    "DE-ADMM by conjugate gradients": (
        lambda prox, **options: DEADMM(Bare(BLUR), prox, weight=0.3, **options),
        lambda n, form: n + 0.4 * 0.3 * form,
    ),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_with_a_linear_proximal_operator_a_form_agrees_with_a_dense_solve(name, weighted):
    make, matrix = FORMS[name]
    prox = Prox(0.4)
    d = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    weights = torch.rand(d.shape, dtype=torch.float64) if weighted else torch.ones_like(d)
    fidelity = WeightedLeastSquares(weights) if weighted else None
    model = make(prox, data_fidelity=fidelity, solver=TIGHT)
    a = BLUR(torch.eye(20, dtype=torch.float64).view(-1, *SHAPE)).flatten(1).T
    for found, measured, w in zip(model(d).detach().flatten(1), d.flatten(1), weights.flatten(1), strict=True):
        system = matrix(a.T @ (w[:, None] * a), prox.form)
        torch.testing.assert_close(found, torch.linalg.solve(system, a.T @ (w * measured)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", list(FORMS)[:3])
def test_the_implicit_gradient_of_a_form_is_exact(name):
    prox = Prox(0.4)
    model = FORMS[name][0](prox, solver=TIGHT, gradient=Implicit(tol=1e-11)).double()
    d = torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda d, *parameters: model(d), (d, *model.parameters()), atol=1e-6, fast_mode=True)


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.6, 1.3, 0.9], dtype=torch.float64))

    def forward(self, x):
        return self.gain * BLUR(x)

    def adjoint(self, y):
        return BLUR.adjoint(self.gain * y)


@pytest.mark.parametrize("name", ["DE-PROX, exact", "DE-ADMM", "DE-GRAD, filtered"])
def test_learnable_operators_and_weights_get_exact_gradients(name):
    network, operator = Prox(0.4), Gain()
    weights = nn.Parameter(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    options = dict(data_fidelity=WeightedLeastSquares(weights), solver=TIGHT, gradient=Implicit(tol=1e-11))
    if name == "DE-GRAD, filtered":
        model = DEGrad(operator, RED(network, 0.3, "weight"), preconditioner="exact", **options)
    elif name == "DE-ADMM":
        model = DEADMM(operator, network, weight=0.3, **options)
    else:
        model = DEProx(operator, network, preconditioner="exact", weight=0.3, **options)
    model, d = model.double(), torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda d, *parameters: model(d), (d, *model.parameters()), atol=1e-6, fast_mode=True)


def test_the_exact_forms_and_the_preconditioned_de_grad_share_their_data_step():
    network, d = NonexpansiveDenoiser(1, 4, 2), torch.randn(2, 1, 8, 8)
    blur = GaussianBlur()
    degrad = DEGrad(blur, RED(network, 0.05), preconditioner="exact")
    prox = DEProx(blur, network, preconditioner="exact", weight=0.05)
    admm = DEADMM(blur, network, weight=0.05)
    torch.testing.assert_close(prox.start(d), degrad.start(d))
    torch.testing.assert_close(admm.start(d), degrad.start(d))
    # DE-GRAD is P(Aᵀd + λD(x)); DE-PROX is D(P(Aᵀd + λx)).
    torch.testing.assert_close(prox.layer(network(d), d), network(degrad.layer(d, d)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [DEProx, DEADMM])
def test_a_form_trains_saves_and_copies(make):
    blur = GaussianBlur(padding_mode="reflect")
    x = nn.functional.interpolate(torch.rand(4, 1, 3, 3), size=12, mode="bilinear") * 2 - 1
    d = blur(x) + 0.1 * torch.randn_like(x)
    model, other = (make(blur, NonexpansiveDenoiser(1, 4, 3)) for _ in range(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (model(d) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    expected = model(d)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(d), expected, rtol=0, atol=0)
    assert jfbfast.jacobian_penalty(model, d).isfinite()


@pytest.mark.parametrize("make", [DEProx, DEADMM])
def test_a_solve_starts_where_the_last_one_ended(make):
    model, d = make(GaussianBlur(), NonexpansiveDenoiser(1, 4, 2)), torch.randn(2, 1, 8, 8)
    restored = model(d)
    again = model(d, x0=model.solution.value)
    assert (model.solution.iterations == 1).all()
    torch.testing.assert_close(again, restored, rtol=1e-2, atol=1e-2)


def test_de_prox_takes_poisson_counts_and_averaging():
    d = torch.rand(2, 1, 8, 8)
    fidelity = Poisson(gain=0.1, background=1.0)
    model = DEProx(GaussianBlur(), NonexpansiveDenoiser(1, 4, 2), data_fidelity=fidelity, step_size=0.02, averaging=0.8)
    model(d).sum().backward()
    assert model.log_step_size.grad.isfinite()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DEProx(GaussianBlur(), UNet), TypeError, "denoiser is <class"),
        (lambda: DEProx(GaussianBlur(), DnCNN(1, 2, 2)), ValueError, "denoiser is a DnCNN that is R.*residual=True"),
        (lambda: DEADMM(GaussianBlur(), UNet(1, injection=True)), ValueError, "denoiser is a UNet with injection"),
        (lambda: DEADMM(nn.Identity(), UNet(1)), TypeError, "blur is Identity, which has no adjoint"),
        (lambda: DEProx(GaussianBlur(), UNet(1), weight=0.1), ValueError, "weight is 0.1; only preconditioner='exact'"),
        (lambda: DEADMM(GaussianBlur(), UNet(1), weight=0.0), ValueError, "weight is 0.0; it takes a positive"),
        (lambda: DEProx(GaussianBlur(), UNet(1), step_size=0.0), ValueError, "step_size is 0.0"),
        (lambda: DEProx(GaussianBlur(), UNet(1), preconditioner="cg"), ValueError, "preconditioner is 'cg'"),
        (
            lambda: DEProx(GaussianBlur(), UNet(1), preconditioner="exact", step_size=0.5),
            ValueError,
            "step_size is 0.5; the preconditioned layer takes none",
        ),
        (
            lambda: DEADMM(GaussianBlur(), UNet(1), data_fidelity=Poisson()),
            ValueError,
            "data_fidelity is Poisson; DE-ADMM takes LeastSquares or WeightedLeastSquares",
        ),
        (
            lambda: DEProx(GaussianBlur(), nn.Flatten())(torch.zeros(1, 1, 8, 8)),
            ValueError,
            r"denoiser maps shape \(1, 1, 8, 8\) to \(1, 64\); it takes one that keeps the shape",
        ),
    ],
)
def test_bad_arguments_of_a_form_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("form", ["DEGrad", "DEProx", "DEADMM"])
def test_a_form_takes_the_physics_of_each_call_and_weights_of_each_sample(form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dinv = pytest.importorskip("deepinv")
    masks, weights = (torch.rand(3, 1, 8, 8) > 0.4).float(), torch.rand(3, 1, 1, 1) + 0.5
    x, network, fidelity = torch.rand(3, 1, 8, 8), NonexpansiveDenoiser(1, 4, 2), WeightedLeastSquares(weights)
    if form == "DEGrad":
        model = DEGrad(None, RED(network, 0.1), preconditioner="exact", data_fidelity=fidelity)
    else:
        options = {"preconditioner": "exact"} if form == "DEProx" else {}
        model = getattr(jfbfast, form)(None, network, weight=0.1, data_fidelity=fidelity, **options)
    physics = dinv.physics.Inpainting((1, 8, 8), mask=masks)
    together = model(physics(x), physics)
    assert together.requires_grad
    for i in range(3):
        model.data_fidelity.weights = weights[i]
        alone = model(physics(x)[i : i + 1], dinv.physics.Inpainting((1, 8, 8), mask=masks[i : i + 1]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("gradient", ["jfb", "implicit"])
@pytest.mark.parametrize("make", [DEProx, DEADMM])
def test_a_sample_that_is_not_finite_gives_a_form_no_gradient(make, gradient):
    options = {"preconditioner": "exact"} if make is DEProx else {}
    model, d = make(GaussianBlur(), NonexpansiveDenoiser(1, 4, 2), gradient=gradient, **options), torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected = model(d[:2])
    model(d[:2]).square().sum().backward()
    alone = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    d[2, 0, 0, 0] = torch.nan
    with pytest.warns(jfbfast.ConvergenceWarning):
        restored = model(d)
    restored.square().sum().backward()
    assert model.solution.status[2] == jfbfast.Status.DIVERGED and restored[2].isnan().any()
    torch.testing.assert_close(restored[:2].detach(), expected, rtol=1e-4, atol=1e-5)
    for parameter, grad in zip(model.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-4)


class Shrinks(nn.Module):
    """D(x, σ) = x/(1 + σ)."""

    def forward(self, x, noise):
        noise = torch.as_tensor(noise, dtype=x.dtype)
        return x / (1 + noise.view(-1, *[1] * (x.dim() - 1)))


@pytest.mark.parametrize("make", [DEProx, DEADMM])
def test_a_form_tells_its_denoiser_a_noise_level(make):
    class Fixed(nn.Module):
        def forward(self, x):
            return x / 1.2

    d = torch.rand(2, 1, 8, 8)
    expected = make(GaussianBlur(), Fixed())(d)
    told, learning = (make(GaussianBlur(), Shrinks(), noise=0.2, learn_noise=learn) for learn in (False, True))
    torch.testing.assert_close(told(d), expected)
    torch.testing.assert_close(learning(d), expected)
    learning(d).sum().backward()
    assert learning.log_noise.grad.isfinite() and learning.log_noise.grad != 0
    assert told.noise == 0.2 and "log_noise" not in told.state_dict()
    with pytest.raises(ValueError, match="noise is -1"):
        make(GaussianBlur(), Shrinks(), noise=-1.0)
    with pytest.raises(ValueError, match="noise is None; learn_noise"):
        make(GaussianBlur(), Shrinks(), learn_noise=True)
