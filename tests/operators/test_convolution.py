"""A for any point spread function, against PyTorch's and SciPy's convolutions, dense matrices and `SeparableBlur`."""

import copy
import pickle

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import jfbfast
from helpers.operators import Bare, dense
from jfbfast import Blur, point_spread
from jfbfast.operators.iterative import may_hold_sample_data

MODES = ("zeros", "reflect", "replicate", "circular", "valid")


def random_psf(size, rank=None, seed=0):
    """Some weights of both signs, and none of it symmetric; as a sum of ``rank`` separable ones."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(size) if rank is None else rank
    u, v = (torch.rand(rank, n, generator=generator, dtype=torch.float64) - 0.3 for n in size)
    return torch.einsum("ry,rx->yx", u, v) / (rank * max(size))


def convolved(x, psf, mode):
    """torch's own, in the order of a convolution."""
    r_y, r_x = (side // 2 for side in psf.shape)
    planes = x.reshape(-1, 1, *x.shape[-2:])
    if mode != "valid":
        pad = (r_x, r_x, r_y, r_y)
        planes = F.pad(planes, pad) if mode == "zeros" else F.pad(planes, pad, mode=mode)
    out = F.conv2d(planes, psf.flip(0, 1)[None, None])
    return out.view(*x.shape[:-2], *out.shape[-2:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, None])  # separable, by FFT
@pytest.mark.parametrize(("size", "shape"), [((5, 7), (9, 14)), ((7, 5), (8, 7)), ((5, 5), (5, 5)), ((9, 1), (13, 4))])
def test_a_blur_is_a_convolution_and_its_adjoint_is_exact(mode, rank, size, shape):
    psf = random_psf(size, rank)
    blur = Blur(psf, mode)
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    blurred = blur(x)
    torch.testing.assert_close(blurred, convolved(x, psf, mode), rtol=1e-12, atol=1e-13)
    y = torch.randn_like(blurred)
    back = blur.adjoint(y)
    assert abs((blurred * y).sum() - (x * back).sum()) <= 1e-13 * x.norm() * y.norm()
    d, r = torch.randn_like(blurred), torch.randn_like(x)
    expected = blur.adjoint(blurred - d) + r
    torch.testing.assert_close(blur.gradient(x, d, r), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blur.gradient_step(x, d, r, 0.3), x - 0.3 * expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blur.gradient(x, d), expected - r, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blur.normal(x), blur.adjoint(blurred), rtol=1e-12, atol=1e-12)
    assert blur.kernel_size == size and blur.padding_mode == mode and torch.equal(blur.psf, psf)
    assert blurred.is_contiguous() and back.is_contiguous()


@pytest.mark.parametrize("mode", ["zeros", "circular", "valid"])
def test_a_blur_is_scipys_convolution_and_the_psf_is_the_image_of_a_point(mode):
    psf = point_spread.trajectory(9, np.random.default_rng(2))
    x = torch.randn(21, 18, dtype=torch.float64)
    how = {"zeros": {"mode": "same"}, "circular": {"mode": "same", "boundary": "wrap"}, "valid": {"mode": "valid"}}[
        mode
    ]
    expected = torch.from_numpy(scipy.signal.convolve2d(x.numpy(), psf.numpy(), **how))
    torch.testing.assert_close(Blur(psf, mode)(x), expected, rtol=0, atol=1e-13)
    point = torch.zeros(25, 29, dtype=torch.float64)
    point[12, 14] = 1
    image = Blur(psf, mode)(point)
    (r_y, r_x), (m_y, m_x) = (side // 2 for side in psf.shape), Blur(psf, mode).margin
    found = image[12 - m_y - r_y : 13 - m_y + r_y, 14 - m_x - r_x : 15 - m_x + r_x]
    torch.testing.assert_close(found, psf, rtol=0, atol=1e-15)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize(("size", "shape"), [((5, 5), (9, 8)), ((3, 5), (7, 13))])
def test_solve_and_filter_against_dense_matrices(mode, rank, size, shape):
    blur = Blur(random_psf(size, rank), mode)
    matrix = dense(blur, shape)
    normal = matrix.T @ matrix
    b = torch.randn(2, 3, *shape, dtype=torch.float64)
    dampings = torch.tensor([1e-3, 0.3], dtype=torch.float64)
    solved, filtered = (f(b, dampings.view(2, 1, 1, 1)) for f in (blur.solve, blur.filter))
    for i, damping in enumerate(dampings):
        inverse = torch.linalg.inv(normal + damping * torch.eye(len(normal), dtype=torch.float64))
        flat = b[i].reshape(3, -1).T
        for got, expected in ((solved[i], inverse @ flat), (filtered[i], normal @ inverse @ flat)):
            assert (got.reshape(3, -1).T - expected).norm() <= 1e-10 * expected.norm()
        torch.testing.assert_close(blur.solve(b[i], float(damping)), solved[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(blur.solve(b[i], damping), solved[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_separable_point_spread_function_gives_a_separable_blur(mode):
    u, v = torch.rand(2, 5, dtype=torch.float64)
    blur, separable = Blur(torch.outer(u, v), mode), jfbfast.SeparableBlur(u.flip(0), v.flip(0), mode)
    x = torch.randn(2, 1, 11, 12, dtype=torch.float64)
    d = separable(x) + 1
    for got, expected in (
        (blur(x), separable(x)),
        (blur.adjoint(d), separable.adjoint(d)),
        (blur.gradient_step(x, d, x, 0.5), separable.gradient_step(x, d, x, 0.5)),
        (blur.solve(x, 1e-3), separable.solve(x, 1e-3)),
        (blur.filter(x, 1e-3), separable.filter(x, 1e-3)),
        (blur.normal(x), separable.normal(x)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    by_fft = Blur(torch.outer(u, v) + 1e-6 * random_psf((5, 5)), mode)
    torch.testing.assert_close(by_fft(x), separable(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(by_fft.solve(x, 1e-3), separable.solve(x, 1e-3), rtol=0, atol=1e-2)
    assert blur._separable and not by_fft._separable


@pytest.mark.parametrize("mode", MODES)
def test_the_derivatives_pass_gradcheck_once_and_twice(mode):
    blur = Blur(random_psf((5, 5)), mode)
    x, r = torch.randn(2, 2, 1, 6, 7, dtype=torch.float64, requires_grad=True).unbind()
    d = blur(x.detach()).clone().requires_grad_()
    step, one = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.3))
    each = torch.tensor([0.2, 0.7], dtype=torch.float64).view(2, 1, 1, 1).requires_grad_()
    for function, arguments in (
        (blur, (x,)),
        (blur.adjoint, (d,)),
        (blur.gradient_step, (x, d, r, step)),
        (blur.solve, (x, one)),
        (blur.filter, (x, each)),
    ):
        assert gradcheck(function, arguments, fast_mode=True)
        assert gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_vmap_is_a_loop(mode):
    blur = Blur(random_psf((5, 5)), mode)
    x = torch.randn(3, 2, 8, 9, dtype=torch.float64)
    damping = torch.tensor([1e-2, 0.1, 1.0], dtype=torch.float64)
    for function in (blur, lambda y: blur.adjoint(blur(y)), lambda y: blur.solve(y, 0.1)):
        torch.testing.assert_close(torch.vmap(function)(x), torch.stack([function(one) for one in x]))
        torch.testing.assert_close(torch.vmap(function, 1, 1)(x), torch.stack([function(y) for y in x.unbind(1)], 1))
    expected = torch.stack([blur.solve(y, one) for y, one in zip(x, damping, strict=True)])
    torch.testing.assert_close(torch.vmap(blur.solve)(x, damping), expected)
    expected = torch.stack([blur.solve(x[0], one) for one in damping])
    torch.testing.assert_close(torch.vmap(blur.solve, (None, 0))(x[0], damping), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, None])
def test_half_precision_is_computed_in_float32_and_autocast_changes_nothing(mode, rank):
    blur = Blur(random_psf((5, 5), rank), mode)
    x = torch.randn(1, 2, 12, 11)
    half = x.bfloat16()
    functions = (blur, lambda y: blur.adjoint(blur(y)), lambda y: blur.solve(y, 0.05), lambda y: blur.filter(y, 0.05))
    for function in functions[:1] + functions[2:]:
        assert function(half).dtype == torch.bfloat16
        torch.testing.assert_close(function(half), function(half.float()).bfloat16(), rtol=1e-2, atol=0.02)
    for function in functions:
        with torch.autocast("cpu", torch.bfloat16):
            found = function(x)
        assert torch.equal(found, function(x))
        exact = function(x.double())
        torch.testing.assert_close(function(x).double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("size", "shape"), [((1, 7), (23, 40)), ((5, 3), (37, 22)), ((9, 9), (23, 23))])
def test_valid_solves_are_right_for_every_shape_of_the_margin(size, shape):
    blur = Blur(random_psf(size) + 1e-3 * torch.eye(*size).double(), "valid")
    b = torch.randn(2, *shape, dtype=torch.float64)
    by_operator = jfbfast.IterativeOperator(Bare(blur), tol=1e-12, max_iter=5000)
    for damping in (1e-4, 0.1):
        expected = by_operator.solve(b, damping)
        assert (blur.solve(b, damping) - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_image_affects_no_other_image(mode):
    blur = Blur(random_psf((5, 5)), mode)
    b = torch.randn(4, 9, 10, dtype=torch.float64)
    exact = blur.solve(b, 0.1)
    b[1, 2, 2], b[2, 0, 0] = torch.nan, torch.inf
    b[3] = 0
    found = blur.solve(b, 0.1)
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=1e-10)
    assert found[1].isnan().all() and not found[2].isfinite().any() and (found[3] == 0).all()
    for function in (blur.solve, blur.filter):
        assert function(b[:0], 0.1).shape == b[:0].shape
    assert blur(b[:0]).shape == (0, *blur(b).shape[1:])
    assert blur.adjoint(blur(b[:0])).shape == b[:0].shape


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "circular"])
def test_conjugate_gradients_stop_at_their_tolerance_or_warn(mode):
    psf = point_spread.defocus(4.0)
    b = torch.randn(2, 64, 51)
    for tol in (1e-2, 1e-4, 1e-5):
        x = Blur(psf, mode, tol=tol).solve(b, 1e-3).double()
        residual = Blur(psf, mode).normal(x) + 1e-3 * x - b
        relative = residual.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
        most = 1.05 if tol == 1e-5 else 1.01  # float32 rounds in "valid"
        assert (relative <= most * tol).all() and (relative > 1e-3 * tol).all()
    with pytest.warns(jfbfast.ConvergenceWarning, match="2 of 2 images did not reach .* 1e-06 in 2 iterations"):
        Blur(psf, mode, max_iter=2).solve(b, 1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("psf", [point_spread.motion(4, 30), point_spread.gaussian((0.7, 1.3))])
def test_degrad_restores_with_any_point_spread_function(mode, psf):
    blur = Blur(psf, mode, tol=1e-3)
    red = jfbfast.RED(jfbfast.UNet(channels=1, features=(4, 8), blocks=(1, 1), injection=True), 0.1, "weight")
    model = jfbfast.DEGrad(blur, red, preconditioner="exact")
    assert model.blur is blur and not may_hold_sample_data(model)
    x = torch.rand(2, 1, 16, 21) - 0.5
    d = blur(x)
    restored = model(d)
    assert restored.shape == x.shape
    (restored.square().mean() + jfbfast.jacobian_penalty(model, d)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    tikhonov = jfbfast.tikhonov(blur, d, 1e-2)
    assert (blur(tikhonov) - d).norm() < 0.2 * d.norm()
    model.eval()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(d), model(d), rtol=0, atol=0)
    assert "blur" not in "".join(model.state_dict())


def test_total_variation_and_gradient_descent_take_any_point_spread_function():
    blur = Blur(point_spread.motion(5, 60), "valid")
    x = torch.full((1, 1, 16, 17), 0.5)
    assert torch.allclose(jfbfast.tv(blur, blur(x), weight=1e-3, tol=1e-6, max_iter=3000).value, x, atol=0.02)
    found = jfbfast.gradient_descent(blur, blur(x), damping=0.1, max_iter=300)
    torch.testing.assert_close(found.value, jfbfast.tikhonov(blur, blur(x), 0.1), rtol=0, atol=1e-4)


def test_a_state_dict_says_which_blur_it_was_recorded_for():
    def model(psf):
        return jfbfast.DEGrad(Blur(psf), jfbfast.RED(jfbfast.DnCNN(1, 2, 2)), preconditioner="exact")

    state = model(point_spread.motion(7, 30)).state_dict()
    model(point_spread.motion(7, 30)).load_state_dict(state)
    with pytest.warns(UserWarning, match="the weights are from a model for Blur.*this model is for Blur"):
        model(point_spread.motion(7, 31)).load_state_dict(state)
    model(point_spread.motion(7, 30) * (1 + 1e-15)).load_state_dict(state)  # another platform's rounding


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Blur(torch.ones(3, 4)), r"psf has shape \(3, 4\); it takes two odd sides"),
        (lambda: Blur(torch.ones(3)), r"psf has shape \(3,\)"),
        (lambda: Blur(torch.full((3, 3), torch.nan)), "psf has values from nan to nan"),
        (lambda: Blur(torch.zeros(3, 3)), "psf has values from 0.0 to 0.0"),
        (lambda: Blur(torch.ones(3, 3, requires_grad=True)), "psf requires a gradient"),
        (lambda: Blur(torch.ones(3, 3), "mirror"), "padding_mode is 'mirror'; it takes one of 'zeros'"),
        (lambda: Blur(torch.ones(3, 3), tol=0.0), "tol is 0.0"),
        (lambda: Blur(torch.ones(3, 3), max_iter=0), "max_iter is 0"),
        (lambda: Blur(random_psf((5, 5))).solve(torch.zeros(8, 8), 0), "damping is 0"),
        (lambda: Blur(random_psf((5, 5))).solve(torch.zeros(8, 8), torch.ones(2)), "damping has shape"),
        (lambda: Blur(random_psf((5, 5)))(torch.zeros(8)), r"x is torch.float32 of shape \(8,\)"),
        (lambda: Blur(random_psf((5, 5)))(torch.zeros(8, 8, dtype=torch.int)), "x is torch.int32"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, None])
def test_a_point_spread_function_larger_than_the_image_is_refused(mode, rank):
    blur = Blur(random_psf((5, 7), rank), mode)
    for shape in ((4, 12), (12, 6)):
        for function in (blur, lambda x: blur.solve(x, 0.1), blur.normal):
            with pytest.raises(ValueError, match=r"pixels; a point spread function of 5 × 7 takes at least 5 × 7"):
                function(torch.zeros(shape))
