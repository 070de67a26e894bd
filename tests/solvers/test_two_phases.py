"""A solve in two phases, with a coarse layer first; and samples that stall."""

import pytest
import torch

from helpers.maps import Counted, linear_map
from jfbfast import Anderson, Broyden, Inertial, Picard, Status
from jfbfast.solvers.loop import Phase

SOLVERS = (Anderson, Broyden, Inertial, Picard)
RATES = torch.tensor([0.1, 0.5, 0.8, 0.3], dtype=torch.float64)[:, None]
OFFSETS = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
MATRIX = linear_map(20, 0.9)[2]


def layer(x, rate, offset):
    return torch.tanh(rate * (x[:, None, :] * MATRIX).sum(-1)) + offset


def coarse(x, rate, offset):
    """To three decimals."""
    return (layer(x, rate, offset) * 1000).round() / 1000


def residual(value, rate=RATES, offset=OFFSETS):
    f = layer(value, rate, offset)
    return (f - value).norm(dim=1) / f.norm(dim=1)


def start():
    return torch.zeros(4, 20, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_coarse_phase_gives_the_same_solution_in_fewer_evaluations_of_the_layer(solver):
    alone, fine, rough = Counted(layer), Counted(layer), Counted(coarse)
    plain = solver(1e-8, 200).solve(alone, start(), (RATES, OFFSETS))
    solution = solver(1e-8, 200).solve(fine, start(), (RATES, OFFSETS), coarse=rough)
    assert (solution.status == Status.CONVERGED).all()
    torch.testing.assert_close(solution.value, plain.value, rtol=0, atol=1e-6)
    torch.testing.assert_close(solution.residual, residual(solution.value), rtol=1e-6, atol=0)
    assert (solution.residual <= 1e-8).all()
    assert fine.calls < alone.calls and rough.calls > 0
    assert solution.coarse_iterations.dtype == torch.long
    assert ((solution.coarse_iterations >= 1) & (solution.coarse_iterations < solution.iterations)).all()
    assert int(solution.coarse_iterations.max()) == rough.calls
    assert int((solution.iterations - solution.coarse_iterations).max()) == fine.calls
    assert plain.coarse_iterations.tolist() == [0] * 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_fine_evaluation_is_enough_if_the_coarse_layer_meets_the_tolerance(solver):
    fine = Counted(layer)
    solution = solver(0.01).solve(fine, start(), (RATES, OFFSETS), coarse=coarse)
    assert (solution.status == Status.CONVERGED).all()
    assert fine.calls == 1
    assert (solution.iterations - solution.coarse_iterations).tolist() == [1] * 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_samples_that_fail_coarsely_need_the_layer_without_verification(solver):
    """The coarse layer is exact for samples 0 and 3, and stalls at 1e-4 for the others."""

    def rough(x, rate, offset):
        return layer(x, rate, offset) + torch.where(rate < 0.4, 0, 1e-4) * torch.sin(1e6 * x)

    fine = Counted(layer)
    solution = solver(1e-8, 200).solve(fine, start(), (RATES, OFFSETS), coarse=rough, verify=False)
    assert (solution.status == Status.CONVERGED).all() and set(fine.batches) <= {1, 2}
    finely = solution.iterations - solution.coarse_iterations
    assert (finely == 0).tolist() == [True, False, False, True] and int(finely.max()) == fine.calls
    torch.testing.assert_close(solution.residual, residual(solution.value), rtol=1e-6, atol=0)
    assert (residual(solution.following) <= 1e-7).all()
    unused = Counted(lambda x: x)
    solution = solver(1e-8, 200).solve(unused, start(), coarse=lambda x: layer(x, RATES, OFFSETS), verify=False)
    assert (solution.status == Status.CONVERGED).all() and unused.calls == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_sample_takes_its_two_phases_independently_of_the_others(solver):
    solve = solver(1e-8, 200).solve
    together = solve(layer, start(), (RATES, OFFSETS), coarse=coarse)
    for i in range(4):
        one = slice(i, i + 1)
        alone = solve(layer, start()[one], (RATES[one], OFFSETS[one]), coarse=coarse)
        for a, c in zip(together[:5], alone[:5], strict=True):
            assert torch.equal(a[one], c)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("max_iter", [1, 2, 3, 9, 14])
def test_both_layers_share_the_budget_exactly(solver, max_iter):
    """Samples that stall early with the coarse layer have more evaluations left of the other one."""
    fine, rough = Counted(layer), Counted(coarse)
    solution = solver(1e-14, max_iter).solve(fine, start(), (RATES, OFFSETS), coarse=rough)
    assert (solution.iterations <= max_iter).all()
    assert (solution.iterations - solution.coarse_iterations >= 1).all()
    late = solution.status == Status.MAX_ITER
    assert late.any() and (solution.iterations[late] == max_iter).all()
    assert rough.calls == int(solution.coarse_iterations.max()) <= max_iter - 1
    torch.testing.assert_close(solution.residual, residual(solution.value))
    if max_iter == 14 and solver in (Anderson, Picard):
        assert len(set(solution.coarse_iterations.tolist())) > 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_fine_phase_begins_at_the_start_if_the_coarse_one_diverges(solver):
    poison = torch.tensor([0, 1, 0, 0], dtype=torch.float64)[:, None]

    def broken(x, rate, offset, poison):
        return coarse(x, rate, offset) / (1 - poison)  # infinite for sample 1

    def whole(x, rate, offset, poison):
        return layer(x, rate, offset)

    x0 = torch.full((4, 20), 0.1, dtype=torch.float64)
    solution = solver(1e-8, 200).solve(whole, x0, (RATES, OFFSETS, poison), coarse=broken)
    assert (solution.status == Status.CONVERGED).all()
    assert solution.coarse_iterations[1] == 1
    plain = solver(1e-8, 200).solve(layer, x0, (RATES, OFFSETS))
    assert torch.equal(solution.value[1], plain.value[1])
    assert solution.iterations[1] == plain.iterations[1] + 1


def test_the_fine_phase_begins_at_the_best_iterate_if_the_coarse_residual_grows():
    seen = []

    def fine(x):
        seen.append(x.clone())
        return 0.5 * x + 1

    x0 = torch.full((1, 3), 3.0, dtype=torch.float64)
    solution = Picard(1e-8, 300).solve(fine, x0, coarse=lambda x: 2 - (x - 2) * 4)
    assert torch.equal(seen[0], x0)
    assert solution.status[0] == Status.CONVERGED
    torch.testing.assert_close(solution.value, torch.full_like(x0, 2.0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_that_is_not_finite_affects_only_its_sample(solver):
    x0 = start()
    x0[2, 1] = torch.nan
    solution = solver(1e-8, 200).solve(layer, x0, (RATES, OFFSETS), coarse=coarse)
    expected = solver(1e-8, 200).solve(layer, start(), (RATES, OFFSETS), coarse=coarse)
    assert solution.status[2] == Status.DIVERGED and solution.value[2].isnan().all()
    for a, c in zip(solution[:5], expected[:5], strict=True):
        assert torch.equal(a[[0, 1, 3]], c[[0, 1, 3]])


def test_an_empty_batch_takes_two_phases():
    empty = torch.zeros(0, 3)
    for solver in SOLVERS:
        solution = solver().solve(lambda x: x, empty, coarse=lambda x: x)
        assert solution.coarse_iterations.shape == (0,)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_stalled_sample_ends_at_its_lowest_residual(solver):
    """At the floor of a layer whose images are only known to about 1e-4."""

    def rough(x, rate, offset):
        return layer(x, rate, offset) + 1e-4 * torch.sin(1e7 * x)

    calls = Counted(rough)
    phase = Phase(calls, start(), (RATES, OFFSETS), torch.full((4,), 300), 300, 300, stop_when_stalled=True)
    stopped = solver(1e-8, 300)._run(phase)
    assert stopped.status.tolist() == [Status.MAX_ITER] * 4
    f = rough(stopped.value, RATES, OFFSETS)
    torch.testing.assert_close(stopped.residual, (f - stopped.value).norm(dim=1) / f.norm(dim=1))
    assert (stopped.residual < 1e-3).all()
    assert calls.calls < 60 and len(set(stopped.iterations.tolist())) > 1


@pytest.mark.parametrize(("rate", "stalls"), [(0.9, False), (0.92, False), (0.94, True), (0.999, True)])
def test_a_stall_is_a_fall_of_less_than_30_percent_in_5_evaluations(rate, stalls):
    """0.7 = 0.931⁵. The sixth evaluation is the first to tell."""

    def linear(x):
        return rate * x + 1 - rate

    solution = Picard(1e-4, 400).solve(linear, torch.zeros(1, 5, dtype=torch.float64), coarse=linear)
    if stalls:
        assert solution.coarse_iterations[0] == 6
    else:
        assert solution.coarse_iterations[0] > 6 and solution.iterations[0] == solution.coarse_iterations[0] + 1
