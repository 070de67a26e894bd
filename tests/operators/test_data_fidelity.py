"""Data fidelities: their gradients against autograd and deepinv's own, and what they refuse."""

import warnings

import pytest
import torch
from torch import nn

from jfbfast import GaussianBlur, IterativeOperator
from jfbfast.operators.data_fidelity import (
    DataFidelity,
    LeastSquares,
    Poisson,
    WeightedLeastSquares,
    as_data_fidelity,
    check_quadratic,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    dinv = pytest.importorskip("deepinv")

BLUR = GaussianBlur(kernel_size=5, sigma=1.2, padding_mode="reflect")


def images(*shape, lowest=-0.9):
    return torch.rand(*(shape or (3, 2, 7, 9)), dtype=torch.float64) * 1.8 + lowest


FIDELITIES = {
    "least squares": LeastSquares(),
    "a number": WeightedLeastSquares(3.0),
    "a mask of pixels": WeightedLeastSquares((torch.rand(7, 9) > 0.4).double()),
    "weights of each sample": WeightedLeastSquares(torch.rand(3, 1, 7, 9).double()),
    "weights from d": WeightedLeastSquares(lambda d: 1 / (d + 1.1)),
    "Poisson": Poisson(gain=0.05, background=1.0),
    "Poisson of bright images": Poisson(background=2.0),
    "Poisson below its floor": Poisson(gain=0.1, background=1.0, floor=0.7),
}


def test_a_fidelity_without_a_value_says_so():
    with pytest.raises(NotImplementedError, match="DataFidelity has no value"):
        DataFidelity().value(BLUR, images(), images())


@pytest.mark.parametrize("name", FIDELITIES)
def test_a_gradient_is_that_of_its_value(name):
    fidelity, d = FIDELITIES[name], images()
    x, own = images().requires_grad_(), fidelity.inputs(d)
    value = fidelity.value(BLUR, x, d, *own)
    assert value.shape == (3,)
    torch.testing.assert_close(fidelity.gradient(BLUR, x, d, *own), torch.autograd.grad(value.sum(), x)[0])
    assert all(len(each) == 3 for each in own)


@pytest.mark.parametrize("name", FIDELITIES)
def test_a_value_is_least_where_the_image_gives_the_measurement(name):
    fidelity, x = FIDELITIES[name], images()
    d = BLUR(x)
    own = fidelity.inputs(d)
    if not name.endswith("floor"):
        torch.testing.assert_close(fidelity.value(BLUR, x, d, *own), torch.zeros(3).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(fidelity.gradient(BLUR, x, d, *own), torch.zeros_like(x), rtol=0, atol=1e-9)
    assert (fidelity.value(BLUR, images(), d, *own) > 0.1).all()


def test_the_poisson_value_is_the_likelihood_of_the_counts():
    x, gain, background = images(1, 1, 5, 6), 0.04, 1.0
    mean = (BLUR(x) + background) / gain
    counts = torch.poisson(mean)
    fidelity, d = Poisson(gain, background), gain * counts - background
    likelihood = torch.distributions.Poisson(mean).log_prob(counts) - torch.distributions.Poisson(
        counts.clamp_min(1e-300)
    ).log_prob(counts)
    torch.testing.assert_close(fidelity.value(BLUR, x, d, *fidelity.inputs(d)), -likelihood.sum().view(1))


def test_a_poisson_gradient_is_finite_where_no_light_is():
    fidelity = Poisson(gain=0.1, background=1.0)
    d = torch.full((1, 1, 6, 6), -1.0)
    d[..., 3] = 2.0
    for value in (-1.0, -5.0):
        x = torch.full_like(d, value)
        for found in (fidelity.gradient(BLUR, x, d, *fidelity.inputs(d)), fidelity.value(BLUR, x, d, d + 1)):
            assert found.isfinite().all()


@pytest.mark.parametrize("mirror", [True, False])
def test_a_poisson_step_rests_where_the_gradient_vanishes_and_keeps_light_positive(mirror):
    fidelity = Poisson(gain=0.5, background=1.0, mirror=mirror)
    x, step = images(), torch.tensor(0.1).double()
    d = BLUR(x)
    own = fidelity.inputs(d)
    r = images() - 0.5
    rest = fidelity.descend(BLUR, x, d, -fidelity.gradient(BLUR, x, d, *own), step, *own)
    torch.testing.assert_close(rest, x)
    moved = fidelity.descend(BLUR, x, d, r, step, *own)
    assert ((moved - x) * (fidelity.gradient(BLUR, x, d, *own) + r) <= 0).all()
    far = fidelity.descend(BLUR, x - 3, d, 1e6 * r, step, *own)
    assert (far >= -1).all() and far.isfinite().all()


def physics_of(x):
    return dinv.physics.Blur(torch.rand(1, 1, 3, 3, dtype=torch.float64) / 9, padding="circular").to(x)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda: dinv.optim.data_fidelity.L2(), LeastSquares()),
        (lambda: dinv.optim.data_fidelity.L2(sigma=0.5), WeightedLeastSquares(4.0)),
        (lambda: dinv.optim.data_fidelity.PoissonLikelihood(bkg=1.5), Poisson()),
    ],
)
def test_the_data_fidelities_of_deepinv_agree_with_ours(theirs, ours):
    theirs = as_data_fidelity(theirs())
    x, d = images(lowest=0.1), images(lowest=0.3)
    if isinstance(ours, Poisson):  # deepinv's y counts the background too
        ours, measured = Poisson(background=1.5), d - 1.5
    else:
        measured = d
    from jfbfast.operators.iterative import linear_operator

    for operator in (BLUR, IterativeOperator(BLUR), linear_operator("blur", physics_of(x))):
        expected = ours.gradient(operator, x, measured, *ours.inputs(measured))
        torch.testing.assert_close(theirs.gradient(operator, x, d), expected)
    if not isinstance(ours, Poisson):  # deepinv's value adds the samples up, and leaves out a constant
        torch.testing.assert_close(theirs.value(BLUR, x, d), ours.value(BLUR, x, d, *ours.inputs(d)))


def test_what_is_a_data_fidelity_already_is_taken_as_it_is():
    poisson = Poisson()
    assert (poisson.gain, poisson.background, poisson.floor) == (1.0, 0.0, 1e-3)
    assert as_data_fidelity(poisson) is poisson and type(as_data_fidelity(None)) is LeastSquares


class Nothing(DataFidelity):
    pass


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: as_data_fidelity("poisson"), TypeError, "data_fidelity is 'poisson'; it takes None, a DataFid"),
        (lambda d: as_data_fidelity(Poisson), TypeError, "data_fidelity is <class"),
        (lambda d: WeightedLeastSquares(-1.0), ValueError, "weights is -1.0; it takes a finite number of at least 0"),
        (lambda d: WeightedLeastSquares("w"), ValueError, "weights is 'w'"),
        (lambda d: WeightedLeastSquares(torch.tensor([1.0, -2.0])).inputs(d), ValueError, "weights has values down to"),
        (lambda d: WeightedLeastSquares(d * torch.nan).inputs(d), ValueError, "weights has values down to nan"),
        (lambda d: WeightedLeastSquares(d * torch.inf).inputs(d), ValueError, "it takes finite numbers"),
        (lambda d: WeightedLeastSquares(torch.ones(3)).inputs(d), ValueError, r"weights has shape \(3,\); it takes"),
        (lambda d: WeightedLeastSquares(lambda d: 2.0).inputs(d), TypeError, "weights returned a float"),
        (lambda d: WeightedLeastSquares(nn.Parameter(0 * d)).inputs(d), ValueError, "weights has zeros and requires"),
        (lambda d: Poisson(gain=0.0), ValueError, "gain is 0.0; it takes a positive number"),
        (lambda d: Poisson(background=-1.0), ValueError, "background is -1.0"),
        (lambda d: Poisson(floor=0.0), ValueError, "floor is 0.0"),
        (lambda d: Poisson(background=1.0).inputs(-2 * d), ValueError, "d has values down to -2.0; the Poisson"),
        (lambda d: check_quadratic("DEProx", Poisson()), ValueError, "data_fidelity is Poisson; DEProx takes LeastSq"),
        (lambda d: Nothing().gradient(BLUR, d, d), NotImplementedError, "Nothing has no gradient"),
    ],
)
def test_bad_data_fidelities_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 1, 4, 2))
