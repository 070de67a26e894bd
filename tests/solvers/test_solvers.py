"""The fixed-point solvers: theory, budgets, statuses, and samples that do not touch each other."""

import pickle
import warnings

import pytest
import torch

import jfbfast
from helpers.maps import Counted, linear_map
from helpers.models import Cell
from jfbfast import Anderson, Broyden, ConvergenceWarning, Inertial, Picard, Status, solve_fixed_point
from jfbfast.backends import native, reference
from jfbfast.solvers import loop
from jfbfast.solvers.base import checked_solver

SOLVERS = (Anderson, Broyden, Inertial, Picard)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_every_solver_finds_the_fixed_point(solver, backend):
    layer, fixed_point, *_ = linear_map(30, 0.7)
    with jfbfast.backend(backend):
        solution = solver(tol=1e-10, max_iter=200).solve(layer, torch.zeros(4, 30, dtype=torch.float64))
    assert (solution.status == Status.CONVERGED).all()
    assert (solution.residual <= 1e-10).all()
    torch.testing.assert_close(solution.value, fixed_point.expand(4, -1), rtol=0, atol=1e-8)
    residual = (layer(solution.value) - solution.value).norm(dim=1) / layer(solution.value).norm(dim=1)
    torch.testing.assert_close(solution.residual, residual)


def test_anderson_follows_gmres_on_a_linear_map():
    """Walker and Ni (2011), theorem 2.2: xₖ₊₁ = T(GMRES iterate k), so its residual is M times GMRES's."""
    n, steps = 40, 6
    layer, _, matrix, b = linear_map(n, 0.8)
    system = torch.eye(n, dtype=torch.float64) - matrix
    iterates = []

    def recorded(x):
        iterates.append(x.clone())
        return layer(x)

    Anderson(tol=0, max_iter=steps + 1, memory=steps + 1, regularization=1e-15).solve(
        recorded, torch.zeros(1, n, dtype=torch.float64)
    )
    krylov = b[:, None]
    for k in range(1, steps):
        basis = torch.linalg.qr(krylov)[0]
        gmres = basis @ torch.linalg.lstsq(system @ basis, b[:, None]).solution
        expected = matrix @ (b[:, None] - system @ gmres)
        found = layer(iterates[k + 1]) - iterates[k + 1]
        torch.testing.assert_close(found[0], expected[:, 0], rtol=1e-5, atol=1e-7 * float(b.norm()))
        krylov = torch.cat((krylov, matrix @ krylov[:, -1:]), dim=1)


@pytest.mark.parametrize("memory", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_and_native_agree(memory, dtype):
    *_, matrix, b = linear_map(33, 0.9)
    matrix, b = matrix.to(dtype), b.to(dtype)
    x0 = torch.randn(3, 33, dtype=dtype)
    found = {}
    for backend in ("reference", "native"):
        iterates = []

        def recorded(x, iterates=iterates):
            iterates.append(x.clone())
            return torch.tanh(x @ matrix.T) + b

        with jfbfast.backend(backend):
            solution = Anderson(tol=1e-5, max_iter=60, memory=memory).solve(recorded, x0)
        found[backend] = iterates, solution
    tolerance = {torch.float64: 1e-9, torch.float32: 3e-3}[dtype]
    for a, c in list(zip(found["reference"][0], found["native"][0], strict=False))[: memory + 1]:
        assert (a - c).norm() <= tolerance * a.norm()
    evaluations = [solution.iterations for _, solution in found.values()]
    assert (evaluations[0] - evaluations[1]).abs().max() <= 1
    assert all((solution.status == Status.CONVERGED).all() for _, solution in found.values())


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("memory", [1, 3, 5])
def test_a_history_in_bfloat16_takes_as_many_evaluations(backend, memory):
    *_, matrix, b = linear_map(60, 0.9)
    matrix, b = matrix.float(), b.float()
    scale = torch.tensor([[0.5], [0.8], [1.0]])

    def layer(x, scale):
        return scale * torch.tanh((x[:, None, :] * matrix).sum(-1)) + b

    x0 = torch.randn(3, 60)
    with jfbfast.backend(backend):
        wide, half = (
            Anderson(tol=1e-4, max_iter=100, memory=memory, history_dtype=history).solve(layer, x0, (scale,))
            for history in (None, torch.bfloat16)
        )
    assert (half.status == Status.CONVERGED).all()
    assert ((half.iterations - wide.iterations).abs() <= 1 + wide.iterations // 10).all()
    f = layer(half.value, scale)
    claimed = (f - half.value).norm(dim=1) / f.norm(dim=1)
    torch.testing.assert_close(half.residual, claimed, rtol=1e-4, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("max_iter", [1, 7])
def test_the_budget_is_kept_exactly(solver, max_iter):
    layer = Counted(linear_map(10, 0.99)[0])
    solution = solver(tol=0, max_iter=max_iter).solve(layer, torch.zeros(2, 10, dtype=torch.float64))
    assert layer.calls == max_iter
    assert solution.iterations.tolist() == [max_iter] * 2
    assert solution.status.tolist() == [Status.MAX_ITER] * 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_sample_stops_by_itself_and_leaves_the_batch(solver):
    rates = torch.tensor([0.0, 0.1, 0.5, 0.8], dtype=torch.float64)[:, None]

    def layer(x, rate):
        return rate * torch.tanh(x) + 1

    x0 = torch.randn(4, 50, dtype=torch.float64)
    counted = Counted(layer)
    together = solver(tol=1e-8, max_iter=200).solve(counted, x0, (rates,))
    assert counted.batches[0] == 4 and counted.batches[-1] <= 2
    for i in range(4):
        alone = solver(tol=1e-8, max_iter=200).solve(layer, x0[i : i + 1], (rates[i : i + 1],))
        for whole, one in zip(together[:5], alone[:5], strict=True):
            torch.testing.assert_close(whole[i : i + 1], one, rtol=0, atol=0)
    if solver is not Inertial:  # which is not the slower, the larger the rate
        assert together.iterations.tolist() == sorted(together.iterations.tolist())
    assert together.iterations[0] < together.iterations[3]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("captured", [False, True])
def test_a_bad_sample_leaves_the_others_bit_identical(solver, captured):
    matrix = linear_map(20, 0.8)[2]
    offsets = torch.randn(3, 20, dtype=torch.float64)

    def layer(x):  # unlike a matrix product, of the same rounding in a batch of any size
        return (x[:, None, :] * matrix).sum(-1)

    def solve(offsets):
        x0 = torch.zeros(3, 20, dtype=torch.float64)
        if captured:
            return solver(tol=1e-6).solve(lambda x: layer(x) + offsets, x0)
        return solver(tol=1e-6).solve(lambda x, o: layer(x) + o, x0, (offsets,))

    good = solve(offsets)
    for poison in (torch.nan, torch.inf):
        poisoned = offsets.clone()
        poisoned[1, 3] = poison
        bad = solve(poisoned)
        assert bad.status.tolist() == [good.status[0], Status.DIVERGED, good.status[2]]
        for a, c in zip(good[:5], bad[:5], strict=True):
            assert torch.equal(a[[0, 2]], c[[0, 2]])
        assert torch.equal(bad.value[1], torch.zeros(20, dtype=torch.float64))  # its only finite iterate


def test_a_start_that_is_not_finite_gives_nan():
    x0 = torch.ones(2, 5)
    x0[1, 2] = torch.nan
    solution = Anderson().solve(lambda x: 0.5 * x, x0)
    assert solution.value[1].isnan().all() and solution.residual[1].isnan()
    assert solution.value[0].isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_expansion_ends_finite_at_its_lowest_residual(solver):
    layer, *_ = linear_map(20, 3.0)
    residuals = []

    def recorded(x):
        f = layer(x)
        residuals.append(float((f - x).norm()))
        return f + 0.1 * x.square()

    solution = solver(max_iter=30).solve(recorded, torch.ones(1, 20, dtype=torch.float64))
    assert solution.status[0] in (Status.DIVERGED, Status.MAX_ITER)
    assert solution.value.isfinite().all() and solution.residual.isfinite().all()


def test_value_is_the_iterate_of_the_lowest_residual():
    seen = {}

    def layer(x):
        f = torch.cos(3 * x) * 2
        seen[float((f - x).norm())] = x.clone()
        return f

    solution = Picard(tol=1e-12, max_iter=15).solve(layer, torch.full((1, 3), 0.3, dtype=torch.float64))
    assert torch.equal(solution.value, seen[min(seen)])


def test_the_safeguard_tames_a_map_that_plain_iteration_cannot_solve():
    layer, *_ = linear_map(30, 1.0)
    matrix = -3.0 * torch.eye(30, dtype=torch.float64)
    solution = Anderson(tol=1e-8, max_iter=100).solve(
        lambda x: x @ matrix + 0.3 * torch.sin(layer(x)), torch.ones(1, 30, dtype=torch.float64)
    )
    assert solution.status[0] == Status.CONVERGED


def test_a_contraction_whose_first_image_is_zero_converges():
    for solver in SOLVERS:
        solution = solver(tol=1e-8).solve(lambda x: torch.relu(1 - x / 2), torch.full((1, 4), 2.0, dtype=torch.float64))
        assert solution.status[0] == Status.CONVERGED
        torch.testing.assert_close(solution.value, torch.full_like(solution.value, 2 / 3), rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_layer_that_reuses_its_output_buffer_converges_too(solver):
    layer, fixed_point, *_ = linear_map(30, 0.9)
    buffer = torch.empty(2, 30, dtype=torch.float64)
    x0 = torch.zeros(2, 30, dtype=torch.float64)
    solution = solver(tol=1e-9, max_iter=300).solve(lambda x: buffer.copy_(layer(x)), x0)
    fresh = solver(tol=1e-9, max_iter=300).solve(layer, x0)
    assert (solution.status == Status.CONVERGED).all()
    assert solution.iterations.max() <= 1.5 * fresh.iterations.max()
    torch.testing.assert_close(solution.value[0], fixed_point, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_of_any_layout_and_an_exact_start_are_solved(solver):
    x0 = torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2)
    solution = solver().solve(lambda x: x.contiguous(memory_format=torch.channels_last), x0)
    torch.testing.assert_close(solution.value, x0)
    assert solution.iterations.tolist() == [1, 1] and solution.residual.tolist() == [0, 0]
    empty = solver().solve(lambda x: x, torch.zeros(0, 3, 4, 4))
    assert empty.value.shape == (0, 3, 4, 4) and empty.status.shape == (0,)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_claims_a_residual_measured_wider(solver, dtype):
    solution = solver(tol=0.05).solve(lambda x: 0.5 * x + 1, torch.zeros(1, 64, dtype=dtype))
    assert solution.status[0] == Status.CONVERGED
    assert solution.value.dtype == dtype and solution.residual.dtype == torch.float32
    x = solution.value.float()
    assert float((0.5 * x + 1 - x).norm() / (0.5 * x + 1).norm()) <= 0.06


@pytest.mark.parametrize("kernels", [reference, native])
def test_weights_minimise_the_mixed_residual(kernels):
    residuals = torch.randn(5, 2, 30, dtype=torch.float64)
    gram = torch.einsum("ibn,jbn->bij", residuals, residuals).contiguous()
    valid = torch.tensor([[True] * 5, [True, False, True, False, False]])
    alpha = kernels.anderson_weights(gram, valid, 1e-14)
    torch.testing.assert_close(alpha.sum(1), torch.ones(2, dtype=torch.float64))
    assert (alpha[1, [1, 3, 4]] == 0).all()
    for b in range(2):
        used = residuals[valid[b], b]
        differences = (used[1:] - used[0]).T
        best = torch.linalg.lstsq(differences, -used[0][:, None]).solution[:, 0]
        expected = torch.cat((1 - best.sum()[None], best))
        torch.testing.assert_close(alpha[b, valid[b]], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Anderson(tol=-1), "tol is -1"),
        (lambda: Anderson(max_iter=0), "max_iter is 0"),
        (lambda: Anderson(max_iter=2.5), "max_iter is 2.5"),
        (lambda: Anderson(memory=0), "memory is 0"),
        (lambda: Anderson(memory=True), "memory is True; it takes an integer of at least 1"),
        (lambda: Anderson(regularization=0.0), "regularization is 0"),
        (lambda: Anderson(history_dtype=torch.float16), "history_dtype is torch.float16"),
        (
            lambda: Anderson(history_dtype=torch.bfloat16).solve(lambda x: x, torch.zeros(2, 3, dtype=torch.float64)),
            "takes float32 iterates",
        ),
        (lambda: Broyden(memory=0), "memory is 0"),
        (lambda: Broyden(memory=31), "memory is 31; it takes an integer from 1 to 30"),
        (lambda: Inertial(momentum=1.0), r"momentum is 1.0; it takes a number in \[0, 1\)"),
        (lambda: Inertial(momentum=None), "momentum is None"),
        (lambda: Picard(atol=float("inf")), "atol is inf"),
        (lambda: Anderson().solve(lambda x: x, torch.zeros(3, dtype=torch.long)), "x0 is torch.int64"),
        (lambda: Anderson().solve(lambda x: x[:, :1], torch.zeros(3, 2)), "layer maps shape"),
        (lambda: Anderson().solve(lambda x: x.repeat(1, 2), torch.zeros(3, 2)), r"\(3, 2\) to \(3, 4\)"),
        (
            lambda: Anderson().solve(lambda x: x, torch.zeros(3, 2), coarse=lambda x: x[:, :1]),
            "coarse maps shape",
        ),
        (
            lambda: Anderson().solve(lambda x, d: x, torch.zeros(3, 2), (torch.zeros(2),)),
            r"inputs\[0\] has shape",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Anderson().solve(lambda x: x, [0.0]), "x0 is a list; it takes a tensor"),
        (lambda: Anderson().solve(lambda x, d: x, torch.zeros(3, 2), torch.zeros(3, 2)), "inputs is a tensor"),
        (lambda: Anderson().solve(lambda x, d: x, torch.zeros(3, 2), (2.0,)), r"inputs\[0\] is a float"),
        (lambda: Anderson().solve(lambda x: (x,), torch.zeros(3, 2)), "layer returns a tuple"),
        (lambda: checked_solver(Anderson), "solver is <class .*; it takes an instance"),
        (lambda: checked_solver("anderson"), "solver is 'anderson'; it takes an instance"),
    ],
)
def test_input_of_another_type_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("solver", [Anderson(memory=3), Broyden(memory=3), Inertial(momentum=0.3), Picard(tol=0.3)])
def test_solvers_are_values(solver):
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert "=0.3" in repr(solver) or "memory=3" in repr(solver)


@pytest.mark.parametrize("solver", [Anderson(1e-9, memory=3), Broyden(1e-9, memory=3), Inertial(1e-9), Picard(1e-9)])
def test_leaving_the_batch_changes_no_bit(solver, monkeypatch):
    """With every sample kept to the end, and with samples that leave and histories that start anew."""
    matrix = linear_map(20, 0.9)[2]
    rates = torch.tensor([0.2, 0.3, -2.0, 0.25, 0.9, 0.1, 1.1], dtype=torch.float64)[:, None]

    def layer(x, rate):
        return torch.cos(2 * rate * (x[:, None, :] * matrix).sum(-1)) + rate

    x0 = torch.randn(7, 20, dtype=torch.float64)
    counted = Counted(layer)
    leaving = solver.solve(counted, x0, (rates,))
    assert counted.batches[-1] < 7
    monkeypatch.setattr(loop, "_COMPACTION", 0)
    counted = Counted(layer)
    staying = solver.solve(counted, x0, (rates,))
    assert set(counted.batches) == {7}
    for a, c in zip(leaving[:5], staying[:5], strict=True):
        assert torch.equal(a, c)


def test_a_solution_prints_how_its_samples_ended_without_their_images():
    layer = torch.tensor([0.2, 0.5, 2.0])[:, None]
    for most, ended in ((9, "2 of 3 converged, largest"), (30, "2 of 3 converged, 1 diverged, largest")):
        solution = Picard(tol=1e-2, max_iter=most).solve(lambda x, a: a * x + 1, torch.zeros(3, 40), (layer,))
        told = repr(solution)
        assert told.startswith(f"FixedPointSolution({ended} residual") and len(told) < 120
    assert "tensor" not in repr(Picard().solve(lambda x: x, torch.zeros(0, 4)))


def test_the_solver_itself_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Picard(max_iter=2).solve(lambda x: 2 * x + 1, torch.ones(1, 3))


@pytest.mark.parametrize("solver", [Anderson, Picard])
def test_a_layer_that_writes_over_its_input_is_refused(solver):
    def over_x(x, d):
        return x.mul_(0.5).add_(d)

    def over_d(x, d):
        return d.add_(0.5 * x)

    for layer in (over_x, over_d):
        with pytest.raises(ValueError, match="layer writes over its input; it takes a layer that leaves x"):
            solver().solve(layer, torch.full((4, 2), -3.0), (torch.ones(4, 2),))
    with pytest.raises(TypeError, match="layer returns a tuple; it takes a layer that returns a tensor"):
        solver().solve(lambda x: (x, x), torch.zeros(1, 2))


def test_half_precision_ends_where_its_rounding_is_above_the_tolerance():
    cell = Cell(64).bfloat16()
    d, x0 = torch.randn(3, 64).bfloat16(), torch.zeros(3, 64).bfloat16()
    for solver in (Anderson(tol=1e-5), Picard(tol=1e-5)):
        with pytest.warns(ConvergenceWarning, match=r"tol is below the rounding of torch.bfloat16"):
            _, solution = solve_fixed_point(cell, x0, inputs=(d,), solver=solver)
        assert (solution.iterations < 20).all() and (solution.residual < 8e-3).all()

    def slow(x):
        return 0.96 * x + 1

    solution = Picard(tol=1e-3, max_iter=60).solve(slow, torch.full((1, 4), 100.0).bfloat16())
    assert solution.iterations > 20 or solution.residual < 8e-3
    assert (Picard(tol=0, max_iter=40).solve(slow, torch.ones(1, 4).bfloat16()).iterations == 40).all()
