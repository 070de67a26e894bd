"""The inverse of I − ∂T/∂x that a solve's history holds, against dense inverses."""

from dataclasses import replace

import pytest
import torch

import jfbfast
from helpers.maps import Counted, linear_map
from jfbfast import Anderson, Broyden, Inertial, Picard, Status


def dense_inverse(matrix):
    return torch.linalg.inv(torch.eye(len(matrix), dtype=matrix.dtype) - matrix)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("memory", [6, 10])
def test_a_history_that_spans_the_space_gives_the_exact_inverse(backend, memory):
    """With 5 differences, a basis, and with more of them."""
    n = 5
    layer, _, matrix, _ = linear_map(n, 0.9)
    x0 = torch.randn(3, n, dtype=torch.float64)
    with jfbfast.backend(backend):
        solution = Anderson(tol=1e-9, memory=memory).solve(layer, x0, estimate=True)
    w = torch.randn(3, n, dtype=torch.float64)
    expected = w @ dense_inverse(matrix)
    torch.testing.assert_close(solution.inverse.transpose(w), expected, rtol=1e-5, atol=1e-5)


def test_andersons_inverse_is_exact_on_what_its_history_spans():
    """⟨Eᵀw, Δg⟩ = ⟨w, (I − J)⁻¹Δg⟩ = −⟨w, Δx⟩ for every difference of the history; and E is I off it."""
    n, memory = 30, 4
    layer, _, matrix, _ = linear_map(n, 0.8)
    iterates = []

    def recorded(x):
        iterates.append(x.clone())
        return layer(x)

    solver = Anderson(tol=0, max_iter=7, memory=memory, regularization=1e-14)
    solution = solver.solve(recorded, torch.zeros(1, n, dtype=torch.float64), estimate=True)
    w = torch.randn(1, n, dtype=torch.float64)
    found = solution.inverse.transpose(w)[0]
    x = torch.cat(iterates[-memory:])
    g = torch.stack([layer(i) - i for i in x])
    delta_x, delta_g = x.diff(dim=0), g.diff(dim=0)
    torch.testing.assert_close(delta_g @ found, -delta_x @ w[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(delta_g @ found, delta_g @ (w[0] @ dense_inverse(matrix)), rtol=1e-6, atol=1e-8)
    basis = torch.linalg.qr(delta_g.T)[0]
    torch.testing.assert_close(found - basis @ (basis.T @ found), w[0] - basis @ (basis.T @ w[0]))


def test_broydens_inverse_is_minus_h():
    n, steps = 12, 6
    matrix = linear_map(n, 0.8)[2]
    iterates, images = [], []

    def layer(x):
        f = torch.tanh(x @ matrix.T) + 1
        iterates.append(x[0].clone())
        images.append(f[0].clone())
        return f

    for memory in (3, 20):
        iterates.clear(), images.clear()
        solver = Broyden(tol=0, max_iter=steps, memory=memory)
        solution = solver.solve(layer, torch.zeros(1, n, dtype=torch.float64), estimate=True)
        x, f = torch.stack(iterates), torch.stack(images)
        inverse = -torch.eye(n, dtype=torch.float64)
        for s, y in list(zip(x.diff(dim=0), (f - x).diff(dim=0), strict=True))[-memory:]:
            inverse += torch.outer(s - inverse @ y, s @ inverse) / (s @ inverse @ y)
        w = torch.randn(1, n, dtype=torch.float64)
        torch.testing.assert_close(solution.inverse.transpose(w)[0], -inverse.T @ w[0], rtol=1e-8, atol=1e-8)


def problem(dtype=torch.float64):
    matrix = linear_map(16, 0.9)[2].to(dtype)
    rates = torch.tensor([0.9, 0.1, 0.6, 0.3, 0.8], dtype=dtype)[:, None]
    offsets = torch.randn(5, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))

    def layer(x, rate, offset):
        return torch.tanh(rate * (x[:, None, :] * matrix).sum(-1)) + offset

    return layer, torch.zeros(5, 16, dtype=dtype), (rates, offsets)


@pytest.mark.parametrize("solver", [Anderson, Broyden])
def test_samples_that_leave_keep_their_estimates_in_the_order_of_the_batch(solver):
    layer, x0, inputs = problem()
    counted = Counted(layer)
    solution = solver(tol=1e-9).solve(counted, x0, inputs, estimate=True)
    assert counted.batches[-1] < 5
    w = torch.randn(5, 16, dtype=torch.float64)
    found = solution.inverse.transpose(w)
    plain = solver(tol=1e-9).solve(layer, x0, inputs)
    for a, c in zip(solution[:5], plain[:5], strict=True):
        assert torch.equal(a, c)
    assert plain.inverse is None
    for i in range(5):
        one = slice(i, i + 1)
        alone = solver(tol=1e-9).solve(layer, x0[one], tuple(v[one] for v in inputs), estimate=True)
        torch.testing.assert_close(alone.inverse.transpose(w[one]), found[one], rtol=1e-10, atol=1e-10)


VARIANTS = [
    (Anderson(1e-9), torch.float64),
    (Broyden(1e-9), torch.float64),
    (Anderson(1e-4), torch.float32),
    (Broyden(1e-4), torch.float32),
    (Anderson(1e-4, history_dtype=torch.bfloat16), torch.float32),
]


@pytest.mark.parametrize(("solver", "dtype"), VARIANTS)
def test_the_estimate_is_nearer_to_the_inverse_than_the_identity_is(solver, dtype):
    layer, x0, inputs = problem(dtype)
    solution = solver.solve(layer, x0, inputs, estimate=True)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, *i: layer(x[None], *(v[None] for v in i))[0]))
    inverse = torch.linalg.inv(torch.eye(16, dtype=dtype) - jacobian(solution.value, *inputs))
    w = torch.randn(5, 16, dtype=dtype)
    exact = torch.einsum("bij,bi->bj", inverse, w)
    found = solution.inverse.transpose(w)
    assert found.dtype == dtype
    error, identity = ((v - exact).norm(dim=1) for v in (found, w))
    assert (error[[0, 2, 4]] < identity[[0, 2, 4]]).all()
    assert (error < 1.1 * identity).all()


@pytest.mark.parametrize(("solver", "dtype"), VARIANTS)
def test_it_maps_the_newest_change_of_the_residual_to_that_of_the_iterate(solver, dtype):
    """The secant condition, (I − J)⁻¹Δg = −Δx: ⟨Eᵀw, Δg⟩ = −⟨w, Δx⟩."""
    whole, _, (rates, offsets) = problem(dtype)
    iterates = []

    def layer(x):
        iterates.append(x.clone())
        return whole(x, rates, offsets)

    solution = replace(solver, tol=0, max_iter=7).solve(layer, torch.zeros(5, 16, dtype=dtype), estimate=True)
    before, newest = iterates[-2:]
    delta_x = newest - before
    delta_g = whole(newest, rates, offsets) - whole(before, rates, offsets) - delta_x
    w = torch.randn(5, 16, dtype=dtype)
    found = (solution.inverse.transpose(w) * delta_g).sum(1) / delta_g.norm(dim=1)
    expected = -(w * delta_x).sum(1) / delta_g.norm(dim=1)
    tolerance = 0.05 if getattr(solver, "history", None) else {torch.float64: 1e-6, torch.float32: 0.02}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", [Anderson, Broyden])
def test_half_precision_and_images(solver):
    x0 = torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16)
    solution = solver(tol=0.01).solve(lambda x: 0.5 * x.cos() + 1, x0, estimate=True)
    w = torch.ones_like(x0)
    found = solution.inverse.transpose(w)
    assert found.dtype == torch.bfloat16 and found.shape == w.shape and found.isfinite().all()
    slope = -0.5 * solution.value.float().sin()
    torch.testing.assert_close(found.float(), 1 / (1 - slope), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("solver", [Anderson, Broyden])
def test_a_sample_without_a_history_has_the_identity(solver):
    layer, x0, (rates, offsets) = problem()
    offsets = offsets.clone()
    offsets[1, 0] = torch.nan
    x0[2] = solver(1e-12, 200).solve(layer, x0, (rates, offsets)).value[2]  # done at the first evaluation
    solution = solver(tol=1e-6).solve(layer, x0, (rates, offsets), estimate=True)
    assert solution.status[1] == Status.DIVERGED and solution.iterations[2] == 1
    w = torch.randn(5, 16, dtype=torch.float64)
    found = solution.inverse.transpose(w)
    assert torch.equal(found[[1, 2]], w[[1, 2]])
    assert found.isfinite().all() and (found[[0, 3, 4]] != w[[0, 3, 4]]).any()


def test_an_impossible_estimate_is_refused():
    for solver in (Picard, Inertial):
        with pytest.raises(ValueError, match=f"{solver.__name__} keeps no history for it, Anderson and Broyden do"):
            solver().solve(lambda x: x, torch.zeros(2, 3), estimate=True)
    solution = Anderson().solve(lambda x: x, torch.zeros(2, 3), estimate=True)
    with pytest.raises(ValueError, match=r"w has shape \(2, 4\); it takes that of the solution, \(2, 3\)"):
        solution.inverse.transpose(torch.zeros(2, 4))
    empty = torch.zeros(0, 3)
    assert Broyden().solve(lambda x: x, empty, estimate=True).inverse.transpose(empty).shape == (0, 3)


@pytest.mark.parametrize("solver", [Anderson(), Anderson(memory=2), Broyden(), Broyden(memory=2)])
def test_pairs_that_the_safeguard_dropped_have_no_part_in_the_estimate(solver):
    """It acts in the second of five evaluations, for the first sample alone."""
    x, f = torch.randn(2, 5, 2, 9, dtype=torch.float64)
    out = torch.empty_like(x[0])

    def estimate(first):
        iteration = solver.start(x[first])
        for k in range(first, 5):
            iteration.measure(x[k], f[k])
            iteration.advance(x[k], f[k], torch.tensor([k == 1, False]), out)
        return iteration.inverse(torch.arange(2), f[4])

    w = torch.randn(2, 9, dtype=torch.float64)
    found, without = estimate(0).transpose(w), estimate(1).transpose(w)
    torch.testing.assert_close(found[0], without[0])
    assert solver.memory == 2 or not torch.allclose(found[1], without[1])
