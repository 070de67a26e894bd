"""Any linear operator by conjugate gradients: against dense matrices, closed solves and theorems."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from helpers.operators import Bare, dense
from jfbfast import (
    RED,
    Anderson,
    ConvergenceWarning,
    DEGrad,
    DnCNN,
    GaussianBlur,
    IterativeOperator,
    NonexpansiveDenoiser,
)
from jfbfast.operators.data_fidelity import DataFidelity, WeightedLeastSquares
from jfbfast.operators.iterative import gradient_step, linear_operator, may_hold_sample_data, with_solve

SHAPE = (1, 5, 6)


class Matrix(nn.Module):
    """A dense A from images (1, 5, 6) to measurements (2, 11)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("matrix", torch.randn(22, 30, generator=generator, dtype=torch.float64) / 6)

    def forward(self, x):
        return (x.flatten(1) @ self.matrix.T).view(-1, 2, 11)

    def adjoint(self, y):
        return (y.flatten(1) @ self.matrix).view(-1, *SHAPE)


class MaskedConvolution(nn.Module):
    """A circular convolution, neither separable nor symmetric, with a mask that keeps some of the pixels."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3, generator=generator, dtype=torch.float64) / 4)
        self.register_buffer("mask", (torch.rand(SHAPE, generator=generator, dtype=torch.float64) > 0.3).double())

    def forward(self, x):
        return self.mask * F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), self.kernel)

    def adjoint(self, y):
        return F.conv2d(F.pad(self.mask * y, (1, 1, 1, 1), mode="circular"), self.kernel.flip(-1, -2))


@pytest.mark.parametrize("operator", [Matrix(), MaskedConvolution()])
def test_solve_and_filter_against_dense_matrices(operator):
    matrix = dense(operator, SHAPE)
    torch.testing.assert_close(dense(operator.adjoint, operator(torch.zeros(1, *SHAPE).double()).shape[1:]), matrix.T)
    normal = matrix.T @ matrix
    iterative = IterativeOperator(operator)
    b = torch.randn(3, *SHAPE, dtype=torch.float64)
    dampings = torch.tensor([1e-3, 0.1, 2.0], dtype=torch.float64)
    solved = iterative.solve(b, dampings.view(3, 1, 1, 1))
    filtered = iterative.filter(b, dampings.view(3, 1, 1, 1))
    for i, damping in enumerate(dampings):
        inverse = torch.linalg.inv(normal + damping * torch.eye(30, dtype=torch.float64))
        expected = inverse @ b[i].flatten()
        scale = float(expected.norm())
        torch.testing.assert_close(solved[i].flatten(), expected, rtol=0, atol=1e-9 * scale)
        torch.testing.assert_close(filtered[i].flatten(), normal @ expected, rtol=0, atol=1e-9 * scale)
        alone = iterative.solve(b[i : i + 1], float(damping))
        torch.testing.assert_close(solved[i], alone[0], rtol=0, atol=1e-9 * scale)


def test_single_and_half_precision_are_solved_to_their_rounding():
    operator = MaskedConvolution()
    b = torch.randn(2, *SHAPE)
    exact = IterativeOperator(operator).solve(b.double(), 0.05)
    single = IterativeOperator(copy.deepcopy(operator).float())
    torch.testing.assert_close(single.solve(b, 0.05).double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(single.solve(b, 0.05), single.solve(b, 0.05), rtol=0, atol=0)
        found = single.solve(b, 0.05)
    torch.testing.assert_close(found, single.solve(b, 0.05), rtol=0, atol=0)
    half = b.bfloat16()
    torch.testing.assert_close(single.solve(half, 0.05), single.solve(half.float(), 0.05).bfloat16(), rtol=0, atol=0)
    assert single.filter(half, 0.05).dtype == torch.bfloat16


def test_a_solve_stops_at_its_tolerance_sample_by_sample():
    operator = IterativeOperator(Matrix(), tol=1e-2)
    exact = IterativeOperator(Matrix()).solve(torch.ones(1, *SHAPE, dtype=torch.float64), 0.01)
    easy = torch.linalg.svd(Matrix().matrix).Vh[0].view(SHAPE)  # an eigenvector: one step
    b = torch.stack([easy, torch.ones(SHAPE, dtype=torch.float64)])
    together = operator.solve(b, 0.01)
    residual = operator.normal(together) + 0.01 * together - b
    relative = residual.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
    assert relative[0] < 1e-12 and 1e-6 < relative[1] <= 1e-2
    assert not torch.allclose(together[1], exact[0], rtol=1e-6)


def test_a_bad_sample_affects_no_other_sample():
    operator = IterativeOperator(MaskedConvolution())
    b = torch.randn(4, *SHAPE, dtype=torch.float64)
    exact = operator.solve(b, 0.1)
    b[1, 0, 2, 2], b[2, 0, 0, 0] = torch.nan, torch.inf
    b[3] = 0
    leaf = b.clone().requires_grad_()
    found = operator.solve(leaf, 0.1)
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=1e-10)
    assert found[1:3].isnan().all() and (found[3] == 0).all()
    found[0].sum().backward()
    assert leaf.grad.isfinite().all()
    assert operator.solve(b[:0], 0.1).shape == b[:0].shape


@pytest.mark.parametrize("operator", [Matrix(), MaskedConvolution()])
def test_the_derivatives_pass_gradcheck_once_and_twice(operator):
    iterative = IterativeOperator(operator)
    b = torch.randn(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    one = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    each = torch.tensor([0.2, 0.7], dtype=torch.float64).view(2, 1, 1, 1).requires_grad_()
    for function in (iterative.solve, iterative.filter):
        for damping in (one, each):
            assert gradcheck(function, (b, damping), fast_mode=True)
            assert gradgradcheck(function, (b, damping), fast_mode=True)


class Gains(nn.Module):
    """A convolution by a learnable kernel, and then a gain of each pixel."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.kernel = nn.Parameter(torch.rand(1, 1, 3, 3, generator=generator, dtype=torch.float64) / 4)
        self.gains = nn.Parameter(torch.rand(SHAPE, generator=generator, dtype=torch.float64) + 0.5)

    def forward(self, x):
        return self.gains * F.conv2d(x, self.kernel, padding=1)

    def adjoint(self, y):
        return F.conv_transpose2d(self.gains * y, self.kernel, padding=1)


def test_the_derivatives_in_the_parameters_of_an_operator_pass_gradcheck():
    operator = Gains()
    iterative = IterativeOperator(operator)
    b = torch.randn(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    damping = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for function in (iterative.solve, iterative.filter):
        assert gradcheck(lambda b, damping, *p: function(b, damping), (b, damping, *operator.parameters()))  # noqa: B023

    def directional(b, *parameters):  # the gradient in the images, and then in the parameters
        out = iterative.solve(b, 0.3)
        return torch.autograd.grad(out.square().sum(), b, create_graph=True)[0]

    assert gradcheck(directional, (b, *operator.parameters()), fast_mode=True)
    with pytest.raises(RuntimeError, match="create_graph is True for a gradient in the parameters of A"):
        iterative.solve(b, 0.3).sum().backward(create_graph=True)
    bad = b.detach().clone()
    bad[1] = torch.nan
    iterative.solve(bad, damping)[0].sum().backward()
    assert operator.kernel.grad.isfinite().all() and operator.gains.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_images_are_solved_for_as_by_a_dense_matrix(dtype):
    matrix = torch.randn(7, 6, dtype=dtype, generator=torch.Generator().manual_seed(6))

    class Complex(nn.Module):
        def forward(self, x):
            return x @ matrix.T

        def adjoint(self, y):
            return y @ matrix.conj()

    operator, b = IterativeOperator(Complex()), torch.randn(2, 6, dtype=dtype)
    expected = torch.linalg.solve(matrix.mH @ matrix + 0.5 * torch.eye(6, dtype=dtype), b.T).T
    torch.testing.assert_close(operator.solve(b, 0.5), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(operator.filter(b, 0.5), b - 0.5 * expected, rtol=1e-4, atol=1e-5)
    if dtype == torch.complex128:
        torch.testing.assert_close(operator.solve(b, 0.5), expected, rtol=1e-10, atol=1e-10)
        damping = torch.tensor([[0.3], [2.0]], dtype=torch.float64, requires_grad=True)
        assert gradcheck(operator.solve, (b.requires_grad_(), damping))
        assert gradgradcheck(operator.solve, (b, damping))


def test_two_vjps_and_torch_func_give_the_same_jvp_of_a_layer():
    model = DEGrad(Matrix(), RED(nn.Conv2d(1, 1, 3, padding=1), 0.2, 0.3), preconditioner="exact", damping=0.1).double()
    d = torch.randn(2, 2, 11, dtype=torch.float64)
    x, v = torch.randn(2, 2, *SHAPE, dtype=torch.float64)
    _, jvp = torch.autograd.functional.jvp(lambda x: model.layer(x, d), x, v)
    expected = (model.layer(x + v, d) - model.layer(x - v, d)) / 2  # the denoiser is affine
    torch.testing.assert_close(jvp, expected, rtol=1e-9, atol=1e-9)
    _, vjp = torch.func.vjp(lambda x: model.layer(x, d), x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(vjp(v)[0], torch.autograd.grad(model.layer(leaf, d), leaf, v)[0])


@pytest.mark.parametrize("filter_damping", [None, "weight"])
def test_the_network_equals_the_one_with_the_closed_form_solve(filter_damping):
    blur = GaussianBlur(padding_mode="reflect")
    regularizer = RED(NonexpansiveDenoiser(2, 4, 3), 0.1, filter_damping).double().eval()
    d = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    grads = []
    for operator in (blur, Bare(blur)):
        model = DEGrad(operator, regularizer, preconditioner="exact", solver=Anderson(tol=1e-11, max_iter=200))
        leaf = d.clone().requires_grad_()
        restored = model(leaf)
        regularizer.zero_grad()
        restored.square().sum().backward()
        grads.append((model.start(d), restored, leaf.grad, *(p.grad.clone() for p in regularizer.parameters())))
    assert isinstance(model.blur, IterativeOperator)
    for closed, iterative in zip(*grads, strict=True):
        torch.testing.assert_close(iterative, closed, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("operator", [Matrix(), MaskedConvolution()])
def test_a_rough_solve_keeps_the_fixed_point(operator):
    regularizer = RED(NonexpansiveDenoiser(1, 4, 3), 0.2).double().eval()
    d = operator(torch.randn(2, *SHAPE, dtype=torch.float64))
    found = []
    for tol in (None, 1e-2):
        model = DEGrad(IterativeOperator(operator, tol), regularizer, preconditioner="exact")
        model.solver = Anderson(tol=1e-10, max_iter=400)
        found.append(model(d))
    x = found[1]
    residual = operator.adjoint(operator(x) - d) + regularizer(x)
    assert residual.norm() < 1e-8 * operator.adjoint(d).norm()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-7)
    rough, exact = (IterativeOperator(operator, tol).filter(x, 0.05) for tol in (1e-2, None))
    errors = (rough - exact).flatten(1).norm(dim=1)
    assert (errors > 1e-8).all() and (errors <= 1e-2 * x.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("operator", [Matrix(), MaskedConvolution()])
@pytest.mark.parametrize(("weight", "delta"), [(0.1, 0.1), (0.3, 0.05)])
def test_the_filtered_iteration_is_as_well_conditioned_as_promised(operator, weight, delta):
    iterative = IterativeOperator(operator)
    bound = weight / (weight**0.5 + delta**0.5) ** 2
    step = dense(lambda y: weight * iterative.filter(iterative.solve(y, weight), delta), SHAPE)
    assert torch.linalg.matrix_norm(step, 2) <= bound + 1e-9
    spectrum = torch.linalg.svdvals(dense(operator, SHAPE)).square()
    expected = (weight * spectrum / ((spectrum + delta) * (spectrum + weight))).max()
    torch.testing.assert_close(torch.linalg.matrix_norm(step, 2), expected, rtol=1e-8, atol=0)

    back = operator.adjoint(operator(torch.randn(1, *SHAPE, dtype=torch.float64)))
    y, z = torch.randn(2, 16, *SHAPE, dtype=torch.float64)
    for denoiser, lipschitz in (
        (NonexpansiveDenoiser(1, 4, 3), 1),
        (DnCNN(1, 4, 3, norm=None, spectral_norm="conv", residual=True), 2),
    ):  # y ← D(WP(Aᵀd + λy)) contracts by Lip(D) times the bound
        denoiser.double()
        images = [denoiser(iterative.filter(iterative.solve(back + weight * u, weight), delta)) for u in (y, z)]
        ratios = (images[0] - images[1]).flatten(1).norm(dim=1) / (y - z).flatten(1).norm(dim=1)
        assert (ratios <= lipschitz * bound + 1e-9).all()


def test_an_operator_with_its_own_solve_keeps_it():
    class Identity(nn.Module):
        def forward(self, x):
            return x

        adjoint = forward

        def solve(self, b, damping):
            return b / (1 + damping)

    own = Identity()
    assert DEGrad(own, RED(DnCNN(1, 2, 2)), preconditioner="exact").blur is own
    assert DEGrad(own, RED(DnCNN(1, 2, 2))).blur is own
    assert isinstance(DEGrad(own, RED(DnCNN(1, 2, 2), 0.1, 0.2)).blur, IterativeOperator)


def test_deepcopy_pickle_and_training():
    model = DEGrad(MaskedConvolution(), RED(DnCNN(1, 4, 3), 0.1, "weight"), preconditioner="exact").double()
    d = torch.randn(1, *SHAPE, dtype=torch.float64)
    model(d).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(d), model(d), rtol=0, atol=0)


def test_an_unsolved_system_warns():
    b = torch.randn(2, *SHAPE, dtype=torch.float64)
    b[1] = 0
    with pytest.warns(ConvergenceWarning, match="1 of 2 samples did not reach tol=1e-12 in 2 iterations") as found:
        IterativeOperator(Matrix(), max_iter=2).solve(b, 0.01)
    assert found[0].filename == __file__  # at the caller's line


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: IterativeOperator(Matrix(), tol=0.0), "tol is 0.0"),
        (lambda: IterativeOperator(Matrix(), tol=1.0), "tol is 1.0"),
        (lambda: IterativeOperator(Matrix(), max_iter=0), "max_iter is 0"),
        (lambda: IterativeOperator(Matrix(), max_iter=True), "max_iter is True"),
        (lambda: IterativeOperator(Matrix()).solve(torch.zeros(2, *SHAPE), 0), "damping is 0"),
        (lambda: IterativeOperator(Matrix()).solve(torch.zeros(2, *SHAPE), float("nan")), "damping is nan"),
        (lambda: IterativeOperator(Matrix()).solve(torch.zeros(2, *SHAPE), torch.ones(2)), "damping has shape"),
        (lambda: IterativeOperator(Matrix()).solve(torch.zeros(5), 0.1), "b has shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def holder(**attributes):
    module = nn.Sequential(nn.Conv2d(1, 1, 3))
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


BLUR, CONVOLUTION = GaussianBlur(), nn.Conv2d(1, 1, 3)


@pytest.mark.parametrize(
    ("module", "holds"),
    [
        (None, False),
        (nn.Sequential(CONVOLUTION, CONVOLUTION), False),  # the same one twice
        (holder(blur=BLUR, fidelity=WeightedLeastSquares(2.0)), False),
        (holder(operators={"a": BLUR, "b": IterativeOperator(BLUR)}), False),
        (holder(operators={"a": BLUR, "b": Bare(BLUR)}), True),
        (holder(operators=[(BLUR, Bare(BLUR))]), True),
        (holder(operator=SimpleNamespace(adjoint=BLUR.adjoint)), True),
        (holder(operator=SimpleNamespace(A_adjoint=BLUR.adjoint)), True),
        (holder(adjoint=BLUR.adjoint), True),
        (holder(other=SimpleNamespace()), False),
        (holder(image=torch.ones(1, 1, 2, 2, dtype=torch.complex64)), False),  # a tensor has an attribute `adjoint`
        (nn.Sequential(CONVOLUTION, IterativeOperator(Bare(BLUR))), True),
        (DataFidelity(), True),
    ],
)
def test_a_module_may_hold_something_of_each_sample(module, holds):
    assert may_hold_sample_data(module) is holds


def test_a_gradient_step_of_any_operator_is_that_of_the_blur():
    x, d, r = torch.randn(3, 2, 1, 7, 8, dtype=torch.float64).unbind()
    for added in (r, None):
        found = gradient_step(Bare(BLUR), x, d, added, torch.tensor(0.3))
        torch.testing.assert_close(found, BLUR.gradient_step(x, d, added, 0.3))


def test_an_operator_gets_a_solve_with_the_settings_of_another():
    assert with_solve(BLUR, IterativeOperator(BLUR)) is BLUR
    like = IterativeOperator(Bare(BLUR), tol=0.01, max_iter=7)
    found = with_solve(Bare(BLUR), like)
    assert (found.tol, found.max_iter) == (0.01, 7)
    assert with_solve(Bare(BLUR)).tol == IterativeOperator(Bare(BLUR)).tol


def test_what_is_no_operator_is_named():
    for given, message in (
        (GaussianBlur, "blur is the class GaussianBlur; it takes an instance"),
        (SimpleNamespace(adjoint=BLUR.adjoint), "blur is SimpleNamespace, which cannot be called"),
        (nn.Identity(), "blur is Identity, which has no adjoint"),
    ):
        with pytest.raises(TypeError, match=message):
            linear_operator("blur", given)
