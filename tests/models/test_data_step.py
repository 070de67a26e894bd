"""The layers in the basis where AᵀA is diagonal, against the same layers written as gradient steps, in float64."""

import pytest
import torch
from torch import nn

import jfbfast
from jfbfast import DEADMM, RED, Anderson, Blur, DEGrad, DEProx, GaussianBlur, IterativeOperator, SeparableBlur, UNet
from jfbfast.models.data_step import basis_of_step
from jfbfast.models.universal import UniversalDEGrad, UniversalRED
from jfbfast.operators import inverse
from jfbfast.operators.data_fidelity import WeightedLeastSquares
from jfbfast.operators.eigenbasis import DiagonalOperator, eigenbasis

SIZE = (9, 7)


def blurs():
    taps = [0.2, 0.5, 0.3], [0.1, 0.2, 0.4, 0.2, 0.1]
    motion = jfbfast.point_spread.motion(length=4, angle=30)
    return {
        "valid": SeparableBlur(*taps, "valid"),
        "reflect": GaussianBlur(5, 1.0, "reflect"),
        "circular": Blur(motion, "circular"),
        "separable Blur": Blur(jfbfast.point_spread.gaussian(0.7), "zeros"),
    }


class Shrunk(UNet):
    """A network whose layers contract."""

    def forward(self, *args, **options):
        return 0.7 * super().forward(*args, **options)


def network(injection=False, conditions=0):
    denoiser = Shrunk(2, (4,), (1,), injection=injection, conditions=conditions)
    with torch.no_grad():
        denoiser.tail.weight *= 3
    return denoiser


def universal(blur):
    model = UniversalDEGrad(network(9, 3), blur, 0.03)
    model.regularizer.condition = torch.tensor([[0.1, -0.5, 0.2], [0.3, -0.2, 0.1]])  # λ and δ of each sample
    return model


FORMS = {
    "preconditioned": lambda blur: DEGrad(blur, RED(network(), 0.2), preconditioner="exact"),
    "filtered": lambda blur: DEGrad(blur, RED(network(), 0.2, "weight"), preconditioner="exact"),
    "filtered apart": lambda blur: DEGrad(blur, RED(network(), 0.2, 0.4), preconditioner="exact"),
    "injection": lambda blur: DEGrad(blur, RED(network(True), 0.2, "weight"), preconditioner="exact", averaging=0.7),
    "universal": universal,
    "prox": lambda blur: DEProx(blur, network(), preconditioner="exact", weight=0.2),
    "admm": lambda blur: DEADMM(blur, network(), weight=0.2),
}


def old_layer(model, x, d):
    """The layer with x − P g, g = Aᵀ(A x − d) + R(x), as papers write it."""
    blur = model.blur
    if isinstance(model, DEGrad):
        g = blur.normal(x) - blur.adjoint(d) + model.regularizer(x, blur, d)
        return torch.lerp(x, x - blur.solve(g, model.damping), model.averaging)
    z = x - blur.solve(blur.normal(x) - blur.adjoint(d), model.weight)
    return model.denoiser(z) if isinstance(model, DEProx) else x + model.denoiser(2 * z - x) - z


def problem(form, blur):
    torch.manual_seed(0)
    model = FORMS[form](blurs()[blur]).double().eval()
    x, d = torch.rand(2, 2, *SIZE, dtype=torch.float64), model.blur(torch.rand(2, 2, *SIZE, dtype=torch.float64))
    return model, x, d


@pytest.mark.parametrize("blur", blurs())
@pytest.mark.parametrize("form", FORMS)
def test_the_layer_and_its_derivatives_are_those_of_the_gradient_step(form, blur):
    model, x, d = problem(form, blur)
    assert basis_of_step(model.data_fidelity, model.blur, d) is not None
    leaves = x.requires_grad_(), d.requires_grad_()
    w = torch.randn_like(x)
    tensors = *leaves, *model.parameters()
    found, expected = model.layer(x, d, *model.injected(d)), old_layer(model, x, d)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for own, theirs in zip(*(torch.autograd.grad(out, tensors, w) for out in (found, expected)), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-10)
    start = model.blur.solve(model.blur.adjoint(d), getattr(model, "weight", None) or model.damping).detach()
    if form == "universal":
        start = (1 + model.damping.detach()) * start
    torch.testing.assert_close(model.start(d), start, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_network_gets_the_gradient_of_the_gradient_step(form):
    model, _, d = problem(form, "valid")
    model.solver = Anderson(tol=1e-10, max_iter=200)
    d = d.requires_grad_()
    model(d).square().sum().backward()
    point = model.solution.value
    out = model.image(old_layer(model, point, d), d)
    torch.testing.assert_close(model(d), out, rtol=1e-8, atol=1e-8)
    tensors = d, *model.parameters()
    for own, theirs in zip((t.grad for t in tensors), torch.autograd.grad(out.square().sum(), tensors), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-8)


def test_the_derivatives_of_the_change_of_basis_pass_gradcheck_twice():
    for blur in blurs().values():
        x = torch.randn(1, 2, *SIZE, dtype=torch.float64, requires_grad=True)
        factors = torch.rand(1, 1, *SIZE, dtype=torch.float64, requires_grad=True)
        basis = blur.eigenbasis(SIZE)
        factors = torch.rand(basis.coefficients(x).shape[-2:], dtype=torch.float64, requires_grad=True)
        function = lambda x, factors, basis=basis: basis.image(basis.coefficients(x) * factors)  # noqa: E731
        assert torch.autograd.gradcheck(function, (x, factors), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, factors), fast_mode=True)
        squares = basis.eigenvalues(x)
        torch.testing.assert_close(basis.image(basis.coefficients(x) * squares), blur.normal(x), rtol=1e-11, atol=1e-11)


def test_layers_that_solve_by_iterations_stay_gradient_steps():
    """Their fixed points do not depend on how accurately P is solved."""
    red, blur, d = RED(network(), 0.2), GaussianBlur(), torch.rand(1, 2, 8, 8)
    rough = DEGrad(IterativeOperator(blur, tol=1e-2), red, preconditioner="exact", solver=Anderson(tol=1e-5))
    exact = DEGrad(blur, red, preconditioner="exact", solver=Anderson(tol=1e-5))
    assert basis_of_step(rough.data_fidelity, rough.blur, d) is None
    torch.testing.assert_close(rough(d), exact(d), rtol=0, atol=1e-4)
    assert basis_of_step(WeightedLeastSquares(2.0), blur, d) is None
    assert eigenbasis(Blur(jfbfast.point_spread.motion(5, 30), "valid"), d) is None
    assert eigenbasis(blur, torch.empty(1, 1, 1, inverse.SVD_LIMIT + 1)) is None


def test_a_damping_of_its_own_keeps_the_gradient_step():
    torch.manual_seed(0)
    red, blur = RED(network(), 0.2), GaussianBlur()
    model = DEGrad(blur, red, preconditioner="exact", damping=0.5).double().eval()
    x, d = torch.rand(2, 1, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model.layer(x, d), old_layer(model, x, d))
    assert model.injected(d) == ()


class Diagonal(DiagonalOperator, nn.Module):
    """A gain for each pixel, which is learnt."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(*SIZE, dtype=torch.float64))

    def forward(self, x):
        return self.gain * x

    adjoint = forward

    def normal(self, x):
        return self.gain.square() * x

    def eigenvalues(self, like):
        return self.gain.square()

    def coefficients(self, x):
        return x.clone()

    def image(self, coefficients):
        return coefficients


@pytest.mark.parametrize("form", FORMS)
def test_learnt_parameters_of_a_diagonal_operator_get_their_gradient(form):
    torch.manual_seed(0)
    model = FORMS[form](GaussianBlur())
    model.blur = Diagonal()
    model = model.double().eval()
    x, d = torch.rand(2, 2, 2, *SIZE, dtype=torch.float64)
    x.requires_grad_(), d.requires_grad_()
    tensors = x, d, *model.parameters()
    found, expected = model.layer(x, d, *model.injected(d)), old_layer(model, x, d)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    w = torch.randn_like(x)
    for own, theirs in zip(*(torch.autograd.grad(out, tensors, w) for out in (found, expected)), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-10)
    assert model.blur.gain.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_keep_the_data_step_in_float32(dtype):
    torch.manual_seed(0)
    model = FORMS["filtered"](GaussianBlur()).eval()
    x, d = torch.rand(2, 1, 2, 8, 8)
    exact = model.layer(x, d)
    with torch.autocast("cpu", dtype):
        injected = model.injected(d)
        assert all(value.dtype == torch.float32 for value in injected)
        torch.testing.assert_close(model.layer(x, d, *injected), exact, rtol=0, atol=2e-2)
    half = FORMS["filtered"](GaussianBlur()).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(dtype)
    found = half.layer(x.to(dtype), d.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=3e-2)


def test_a_universal_red_sees_as_much_with_any_operator():
    torch.manual_seed(0)
    red = UniversalRED(network(9, 3)).double()
    blur, x = GaussianBlur(), torch.rand(1, 2, *SIZE, dtype=torch.float64)
    basis = blur.eigenbasis(SIZE)
    seen = basis.image(basis.coefficients(x) * red.seen_factors(basis.eigenvalues(x)))
    torch.testing.assert_close(seen, red.seen(x, blur), rtol=1e-11, atol=1e-11)
