"""The application that carries the gradient is taken one step beyond the solve, and measures the solution there."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import jfbfast
from helpers.maps import Counted, linear_map
from jfbfast import (
    Anderson,
    Broyden,
    ConvergenceWarning,
    DEGrad,
    DnCNN,
    GaussianBlur,
    Inertial,
    Picard,
    Status,
    solve_fixed_point,
)

SOLVERS = [Anderson, Broyden, Inertial, Picard]


def relative_residual(layer, x):
    return ((layer(x) - x).norm(dim=1) / layer(x).norm(dim=1)).detach()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_value_is_the_iterate_after_the_last_evaluated_one(solver, autocast):
    layer, fixed, _, _ = linear_map(8, 0.6)
    x0 = torch.zeros(3, 8, dtype=torch.float64)
    evaluated = []

    def recorded(x):
        evaluated.append(x.clone())
        return layer(x)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # which leaves float64 as it is
        _, solution = solve_fixed_point(recorded, x0, solver=solver(tol=0, max_iter=4))
    more = solver(tol=0, max_iter=5).solve(layer, x0)
    assert len(evaluated) == 5 and solution.iterations.tolist() == [4] * 3
    assert torch.equal(solution.value, evaluated[-1])
    torch.testing.assert_close(solution.value, more.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(solution.residual, relative_residual(layer, solution.value))
    assert (solution.value - fixed).norm() < (evaluated[3] - fixed).norm()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tol", [0.1, 1e-3, 1e-9])
def test_output_residual_and_status_agree(solver, tol):
    matrix = linear_map(8, 0.6)[2]
    d = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d *= torch.tensor([1e-3, 0.1, 1.0, 10.0, 100.0])[:, None]

    def T(x, d):
        return torch.tanh(x @ matrix.T) + d

    out, solution = solve_fixed_point(T, torch.zeros_like(d), inputs=(d,), solver=solver(tol=tol, max_iter=300))
    torch.testing.assert_close(out, T(solution.value, d), rtol=1e-14, atol=1e-14)
    residual = (out - solution.value).norm(dim=1) / out.norm(dim=1)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-15)
    assert (solution.status == Status.CONVERGED).all() and (residual <= tol * (1 + 1e-9)).all()


class Step(nn.Module):
    """Converged at 0, but not at the iterate that follows; counts its applications in a batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, d):
        self.norm(x)
        return self.gain * torch.where(x.abs() < 1e-3, 1 + 1e-3 + x * 0.5, 3.0) - 1 + d * 0


def test_a_sample_keeps_its_value_if_the_following_iterate_is_worse():
    model, d = Step().train(), torch.zeros(2, 2)
    out, solution = solve_fixed_point(model, torch.zeros(2, 2), inputs=(d,), solver=Picard(tol=0, atol=0.01))
    assert (solution.status == Status.CONVERGED).all() and solution.iterations.tolist() == [1, 1]
    assert not solution.value.any()
    torch.testing.assert_close(out, torch.full((2, 2), 1e-3), rtol=1e-3, atol=0)
    assert model.norm.num_batches_tracked == 1  # the application that was given up is not noted
    out.sum().backward()
    torch.testing.assert_close(model.gain.grad, torch.tensor(4 * 1.001))


def test_an_application_whose_residual_grows_beyond_the_safeguard_is_discarded():
    def T(x, d):
        return torch.where(x < 1, x + 0.5, 1e3 * x)

    with pytest.warns(ConvergenceWarning, match="1 of 1 samples did not converge"):
        out, solution = solve_fixed_point(
            T, torch.zeros(1, 1), inputs=(torch.zeros(1, 1),), solver=Picard(tol=1e-3, max_iter=2)
        )
    assert solution.status.item() == Status.MAX_ITER
    assert solution.value.item() in (0.0, 0.5) and out.item() == solution.value.item() + 0.5


def model(**options):
    torch.manual_seed(0)
    denoiser = DnCNN(3, 8, 4, norm=None, residual=True)
    return DEGrad(GaussianBlur(), jfbfast.RED(denoiser, 0.1, "weight"), preconditioner="exact", **options)


def test_low_precision_is_measured_by_the_application_that_carries_the_gradient():
    d = torch.rand(3, 3, 12, 10)
    net = model(solve_dtype=torch.bfloat16, solver=Anderson(tol=1e-2)).eval()
    out = net(d)
    solution = net.solution
    assert torch.equal(solution.iterations, solution.coarse_iterations)  # no evaluation in float32 beside it
    torch.testing.assert_close(out, net.layer(solution.value, d), rtol=1e-5, atol=1e-6)
    residual = (out - solution.value).flatten(1).norm(dim=1) / out.flatten(1).norm(dim=1)
    torch.testing.assert_close(solution.residual, residual.detach(), rtol=1e-3, atol=1e-7)
    assert (solution.status == Status.CONVERGED).all() and (residual <= 1e-2).all()


@pytest.mark.parametrize("max_iter", [6, 60])
def test_a_wrong_result_of_low_precision_is_continued_in_full_precision(monkeypatch, max_iter):
    """The coarse layer contracts to another point, so that its word is good for nothing."""
    d = torch.rand(3, 4, dtype=torch.float64) + 1
    fine, coarse = Counted(lambda x, d: 0.5 * x + d), Counted(lambda x, d: 0.2 * x + d)
    monkeypatch.setattr(
        "jfbfast.implicit.forward_solve.prepared",
        lambda layer, dtype=None, **_: fine if dtype is None else coarse,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        out, solution = solve_fixed_point(
            lambda x, d: 0.5 * x + d,
            torch.zeros_like(d),
            inputs=(d,),
            solver=Picard(tol=1e-4, max_iter=max_iter),
            solve_dtype=torch.bfloat16,
        )
    assert (solution.iterations <= max_iter).all() and solution.coarse_iterations.unique().item() == coarse.calls
    assert fine.calls == solution.iterations.max() - coarse.calls
    torch.testing.assert_close(out, 0.5 * solution.value + d)
    converged = max_iter == 60
    assert ((solution.status == Status.CONVERGED) == converged).all()
    torch.testing.assert_close(solution.residual, (out - solution.value).norm(dim=1) / out.norm(dim=1))
    if converged:
        torch.testing.assert_close(out, 2 * d, rtol=2e-4, atol=0)


class Whole(nn.Module):
    """½x + d, with an operator that may hold something of each sample."""

    def __init__(self):
        super().__init__()
        self.operator = SimpleNamespace(adjoint=None)

    def forward(self, x, d):
        return 0.5 * x + d


class Other:
    """A solver of another library, which gives no following iterates."""

    tol, atol, max_iter = 1e-4, 0.0, 60

    def solve(self, layer, x0, inputs=(), **options):
        return Picard(self.tol, self.max_iter).solve(layer, x0, inputs, **options)._replace(following=None)


def test_a_wrong_result_of_another_solver_is_continued_with_the_whole_batch(monkeypatch):
    """The coarse layer is right for the first of three samples."""
    d = torch.rand(3, 4, dtype=torch.float64) + 1
    rates = torch.tensor([[0.5], [0.2], [0.2]], dtype=torch.float64)
    fine, coarse = Counted(lambda x, d: 0.5 * x + d), Counted(lambda x, d: rates * x + d)
    monkeypatch.setattr(
        "jfbfast.implicit.forward_solve.prepared",
        lambda layer, dtype=None, **_: fine if dtype is None else coarse,
    )
    out, solution = solve_fixed_point(
        Whole(), torch.zeros_like(d), inputs=(d,), solver=Other(), solve_dtype=torch.bfloat16
    )
    assert (solution.status == Status.CONVERGED).all() and fine.calls and set(fine.batches) == {3}
    assert (solution.iterations > solution.coarse_iterations).tolist() == [False, True, True]
    torch.testing.assert_close(out, 2 * d, rtol=2e-4, atol=0)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((), 0.5))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x, d):
        return self.gain * x * self.scale + d


def test_restoring_buffers_does_not_break_the_graph_of_an_earlier_forward(monkeypatch):
    net, d = Scaled(), torch.rand(2, 4)
    first = jfbfast.fixed_point(net, torch.zeros_like(d), inputs=(d,))
    monkeypatch.setattr(
        "jfbfast.implicit.fixed_point._advance",
        lambda solution, *_: (solution, torch.ones_like(solution.status, dtype=torch.bool)),
    )
    second = jfbfast.fixed_point(net, torch.zeros_like(d), inputs=(d,))
    (first + second).sum().backward()
