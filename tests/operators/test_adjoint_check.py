"""`check_adjoint` passes operators that are right, and says in one sentence what is wrong with the others."""

import pytest
import torch
from torch import nn

import jfbfast
from jfbfast import check_adjoint

MATRIX = torch.randn(7, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
X = torch.zeros(3, 5, dtype=torch.complex128)


def forward(x):
    return x @ MATRIX.mT


def adjoint(y):
    return y @ MATRIX.conj()


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular", "replicate", "valid"])
def test_our_blurs_pass(padding_mode):
    assert check_adjoint(jfbfast.GaussianBlur(padding_mode=padding_mode), (2, 3, 13, 11)) < 1e-4
    psf = torch.rand(3, 5)
    assert check_adjoint(jfbfast.Blur(psf / psf.sum(), padding_mode=padding_mode), (1, 1, 13, 11)) < 1e-4


def test_complex_operators_pass_and_so_do_complex_images_of_real_ones():
    assert check_adjoint(forward, X, adjoint=adjoint) < 1e-12
    assert check_adjoint(lambda x: forward(x.to(X.dtype)), X.real, adjoint=lambda y: adjoint(y).real) < 1e-12
    assert check_adjoint(lambda x: 0 * x, X, adjoint=lambda y: 0 * y) == 0


def test_half_precision_holds_the_images_of_a_large_operator():
    """AᵀA x would be beyond its largest number."""
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float16)
    assert check_adjoint(lambda x: 300 * x, x, adjoint=lambda y: 300 * y) < 0.01


def test_the_linear_physics_of_deepinv_pass():
    physics = pytest.importorskip("deepinv").physics
    mask = (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert check_adjoint(physics.MRI(mask=mask, img_size=(2, 8, 8)), (2, 2, 8, 8)) < 1e-4
    assert check_adjoint(physics.Blur(filter=torch.rand(1, 1, 5, 5), padding="circular"), (2, 3, 16, 16)) < 1e-4
    blur = physics.Blur(filter=torch.rand(1, 1, 3, 3), padding="circular")
    with pytest.raises(ValueError, match="adjoint is 2 times the adjoint of A"):
        check_adjoint(blur, (2, 3, 16, 16), adjoint=lambda y: 2 * blur.A_adjoint(y))
    wrong = physics.Inpainting((1, 8, 8), mask=0.5)
    wrong.A_adjoint = lambda y, **options: -y
    with pytest.raises(ValueError, match=r"adjoint is not that of A|adjoint is -1 times"):
        check_adjoint(wrong, (2, 1, 8, 8))


@pytest.mark.parametrize(
    "a, of_a, told",
    [
        (forward, lambda y: 2.5 * adjoint(y), r"adjoint is 2\.5 times the adjoint of A"),
        (forward, lambda y: -adjoint(y), "adjoint is -1 times the adjoint of A"),
        (forward, lambda y: (1 + 2j) * adjoint(y), r"adjoint is \(1\+2j\) times the adjoint of A"),
        (forward, lambda y: y @ MATRIX, "adjoint is the transpose of A without the complex conjugate"),
        (forward, lambda y: adjoint(y).roll(1, 1), "adjoint is not that of A: ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ by"),
        (lambda x: forward(x) + 1, adjoint, r"A maps 0 to values of norm 4\.58"),
        (lambda x: forward(x) * x.norm(dim=1, keepdim=True), adjoint, "A is not linear"),
        (lambda x: forward(x.conj()), adjoint, "A conjugates its argument"),
        (lambda x: forward(x - x.mean(0)), adjoint, "A mixes the samples of a batch"),
        (lambda x: forward(x) + torch.randn(3, 7), adjoint, "A gives another result at a second call"),
        (
            forward,
            lambda y: adjoint(y)[:, :4],
            r"adjoint maps \(3, 7\) to \(3, 4\); it takes \(3, 5\), as x",
        ),
        (forward, lambda y: adjoint(y).real, "adjoint returns torch.float64"),
        (lambda x: torch.nan * x, adjoint, "A gives values that are not finite"),
        (lambda x: x.sum(), adjoint, "an operator that keeps the batch size"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(a, of_a, told):
    with pytest.raises(ValueError, match=told) as error:
        check_adjoint(a, X, adjoint=of_a)
    assert "\n" not in str(error.value)


def test_small_errors_are_found_in_large_images_at_float32():
    class Shifted(nn.Module):
        """A difference along x, whose adjoint is wrong in one column of 64."""

        def forward(self, x):
            return x - x.roll(1, -1)

        def adjoint(self, y):
            right = y - y.roll(-1, -1)
            return torch.cat([right[..., :-1], y[..., -1:]], -1)

    with pytest.raises(ValueError, match="adjoint is not that of A"):
        check_adjoint(Shifted(), (2, 1, 64, 64))


def test_arguments_that_make_no_sense_are_refused():
    for operator, like, options, error, told in (
        (forward, X, {}, TypeError, "operator is function, which has no adjoint"),
        (lambda x: None, X, {"adjoint": adjoint}, TypeError, "A returns a NoneType"),
        (forward, (0, 5), {"adjoint": adjoint}, ValueError, r"like is torch.float32 of shape \(0, 5\)"),
        (forward, X, {"adjoint": adjoint, "trials": 0}, ValueError, "trials is 0"),
        (forward, X, {"adjoint": adjoint, "tol": 0}, ValueError, "tol is 0"),
    ):
        with pytest.raises(error, match=told):
            check_adjoint(operator, like, **options)
