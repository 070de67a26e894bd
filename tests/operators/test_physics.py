"""Physics of deepinv as operators: their closed forms against dense matrices."""

import gc
import weakref

import deepinv
import pytest
import torch
from torch.autograd import gradcheck

from jfbfast import RED, DEGrad, IterativeOperator
from jfbfast.operators import iterative

physics = deepinv.physics
BATCH = 3


def kernels(batch=BATCH):
    taps = torch.rand(batch, 1, 3, 3, dtype=torch.float64)
    return taps / taps.sum((2, 3), keepdim=True)


def masks(*shape):
    return torch.rand(shape, dtype=torch.float64).round()


# Each with the shape of an image; those with a batch of kernels or masks have one for each sample.
CLOSED = {
    "blurs, even width": lambda: (physics.BlurFFT((1, 5, 6), filter=kernels()), (1, 5, 6)),
    "blurs, odd width": lambda: (physics.BlurFFT((1, 6, 5), filter=kernels()), (1, 6, 5)),
    "masks": lambda: (physics.Inpainting((1, 5, 6), mask=masks(BATCH, 1, 5, 6)), (1, 5, 6)),
    "MRI": lambda: (physics.MRI(mask=masks(BATCH, 1, 4, 3).expand(-1, 2, -1, -1), img_size=(2, 4, 3)), (2, 4, 3)),
    "denoising": lambda: (physics.Denoising(), (1, 4, 3)),
    "downsampling": lambda: (physics.Downsampling((1, 4, 6), filter=kernels(), factor=2), (1, 4, 6)),
    "single pixel": lambda: (physics.SinglePixelCamera(m=9, img_size=(1, 4, 4)), (1, 4, 4)),
}


def dense(function, shape):
    """The matrix of a linear map of images for each sample, (B, m, n)."""
    columns = []
    for unit in torch.eye(torch.Size(shape).numel(), dtype=torch.float64):
        columns.append(function(unit.view(1, *shape).expand(BATCH, *shape)).reshape(BATCH, -1))
    return torch.stack(columns, 2)


def check_solve(operator, shape):
    matrix = dense(operator, shape)
    b = torch.randn(BATCH, *shape, dtype=torch.float64)
    for damping in (torch.tensor(0.03).double(), torch.tensor([0.01, 0.3, 2.0]).double().view(-1, 1, 1, 1)):
        regularised = matrix.mT @ matrix + damping.view(-1, 1, 1) * torch.eye(matrix.shape[2], dtype=torch.float64)
        expected = torch.linalg.solve(regularised, b.view(BATCH, -1, 1)).view_as(b)
        torch.testing.assert_close(operator.solve(b, damping), expected, rtol=1e-9, atol=1e-9)
        filtered = (matrix.mT @ matrix @ expected.view(BATCH, -1, 1)).view_as(b)
        torch.testing.assert_close(operator.filter(b, damping), filtered, rtol=1e-9, atol=1e-9)


def refuse(*args, **kwargs):
    raise AssertionError("conjugate gradients were used")


@pytest.mark.parametrize("kind", CLOSED)
def test_a_closed_form_is_exact_and_replaces_conjugate_gradients(kind, monkeypatch):
    given, shape = CLOSED[kind]()
    operator = IterativeOperator(given)
    monkeypatch.setattr(iterative, "conjugate_gradients", refuse)
    check_solve(operator, shape)
    b = torch.randn(BATCH, *shape, dtype=torch.float64, requires_grad=True)
    for damping in (torch.tensor(0.2), torch.tensor([0.1, 0.3, 2.0]).view(-1, 1, 1, 1)):
        assert gradcheck(operator.solve, (b, damping.double().requires_grad_()))


class Doubled(physics.Inpainting):
    """Overrides A and its adjoint, and inherits a closed form that is for another A."""

    def A(self, x, **kwargs):
        return 2 * super().A(x, **kwargs)

    def A_adjoint(self, y, **kwargs):
        return 2 * super().A_adjoint(y, **kwargs)


OTHERS = {
    "another A": lambda: (Doubled((1, 4, 5), mask=masks(BATCH, 1, 4, 5)), (1, 4, 5)),
    "no closed form": lambda: (physics.Blur(filter=kernels(), padding="circular"), (1, 4, 5)),
    "V not square": lambda: (physics.Decolorize(), (3, 4, 5)),
    "an inherited prox": lambda: (physics.Upsampling((1, 4, 6), filter=kernels(1), factor=2), (1, 2, 3)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_physics_whose_closed_form_does_not_hold_is_solved_iteratively(kind):
    given, shape = OTHERS[kind]()
    check_solve(IterativeOperator(given, tol=1e-12), shape)


class Gain(physics.Denoising):
    """A gain that the closed form of its base does not know."""

    gain = 1.0

    def A(self, x, **kwargs):
        return self.gain * x

    def A_adjoint(self, y, **kwargs):
        return self.gain * y


def test_a_closed_form_is_checked_at_each_solve():
    given = Gain()
    check_solve(IterativeOperator(given), (1, 3, 4))
    given.gain = 1.01
    check_solve(IterativeOperator(given), (1, 3, 4))
    changing = physics.Downsampling((1, 4, 6), filter=kernels(), factor=2)
    check_solve(IterativeOperator(changing), (1, 4, 6))
    changing.filter = None
    check_solve(IterativeOperator(changing, tol=1e-12), (1, 4, 6))


def test_complex_images_are_solved_for_by_a_closed_form(monkeypatch):
    monkeypatch.setattr(iterative, "conjugate_gradients", refuse)
    b = torch.randn(2, 1, 3, 4, dtype=torch.complex128)
    torch.testing.assert_close(IterativeOperator(physics.Denoising()).solve(b, 0.25), b / 1.25)


def test_a_closed_form_in_single_precision_is_exact_to_rounding(monkeypatch):
    monkeypatch.setattr(iterative, "conjugate_gradients", refuse)
    exact = physics.BlurFFT((1, 5, 6), filter=kernels())
    single = physics.BlurFFT((1, 5, 6), filter=exact.filter.float())
    b = torch.randn(BATCH, 1, 5, 6)
    found, expected = (IterativeOperator(given).solve(x, 0.05) for given, x in ((single, b), (exact, b.double())))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    assert IterativeOperator(single).solve(b.bfloat16(), 0.05).dtype == torch.bfloat16


def test_a_sample_that_is_not_finite_affects_no_other_in_a_closed_form():
    given, shape = CLOSED["blurs, even width"]()
    operator, b = IterativeOperator(given), torch.randn(BATCH, *shape, dtype=torch.float64)
    expected = operator.solve(b, 0.1)
    b[1] = torch.nan
    found = operator.solve(b, 0.1)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert found[1].isnan().all()


def test_a_solve_draws_no_random_numbers_and_holds_no_physics():
    given, _ = CLOSED["blurs, even width"]()
    model = DEGrad(None, RED(torch.nn.Tanh()), preconditioner="exact")
    d = torch.rand(BATCH, 1, 5, 6, dtype=torch.float64)
    state = torch.random.get_rng_state()
    model(d, given).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state)
    held = weakref.ref(given)
    del given
    gc.collect()
    assert held() is None
