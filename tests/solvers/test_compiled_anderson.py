"""Anderson's method in C++, which takes every decision of an iteration, against the loop of all methods."""

import pytest
import torch

import jfbfast
from helpers.maps import linear_map
from jfbfast import Anderson, Status
from jfbfast.backends import native
from jfbfast.solvers import loop
from jfbfast.solvers.loop import Phase, iterate

pytestmark = pytest.mark.compiled
FIELDS = ("value", "residual", "iterations", "status", "following")


def both(solver, layer, x0, inputs=(), budget=None, **options):
    """The solutions of C++ and of the shared loop with the same kernels."""
    budget = torch.full((len(x0),), solver.max_iter) if budget is None else torch.tensor(budget)
    phase = Phase(layer, x0, inputs, budget, int(budget.min()), int(budget.max()), **options)
    with torch.no_grad():
        return solver._run(phase), iterate(phase, solver.start, solver.tol, solver.atol)


def assert_same(found, expected):
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


class Batch:
    """Samples whose solves end in every way: by the tolerance, the budget, divergence and infinities."""

    def __init__(self, size, dtype):
        matrix = linear_map(size, 0.95)[2].to(dtype)
        rates = torch.tensor([0.2, 0.9, 1.3, -3.0, 40.0, 0.5, 1.0, 0.7], dtype=dtype)[:, None]
        offsets = torch.randn(8, size, dtype=dtype)
        offsets[5, 0] = torch.nan
        x0 = torch.randn(8, size, dtype=dtype)
        x0[6, -1] = torch.inf
        self.x0, self.inputs, self.matrix = x0, (rates, offsets), matrix

    def layer(self, x, rate, offset):
        mixed = (x[:, None, :].double() * self.matrix.double()).sum(-1).to(x.dtype)
        return torch.where(rate.abs() > 2, rate * x, torch.cos(rate * mixed)) + offset

    def captured(self, x):
        return self.layer(x, *self.inputs)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("memory", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_every_sample_ends_with_the_same_bits_as_in_the_shared_loop(dtype, memory, captured):
    batch = Batch(33, dtype)
    solver = Anderson(tol={torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 0.01), max_iter=40, memory=memory)
    layer, inputs = (batch.captured, ()) if captured else (batch.layer, batch.inputs)
    statuses = set()
    for options in ({}, {"budget": [1, 9, 3, 40, 40, 7, 2, 5]}, {"stop_when_stalled": True}, {"floor": 1e-2}):
        found, expected = both(solver, layer, batch.x0, inputs, **options)
        assert_same(found, expected)
        statuses.update(found.status.tolist())
    assert statuses == set(Status)


@pytest.mark.parametrize("size", [1, 2048, 5001])
def test_it_does_the_same_for_vectors_of_any_size_and_any_number_of_threads(size):
    q, b = torch.rand(3, size) * 1.5 - 0.6, torch.randn(3, size)

    def layer(x, q, b):
        return q * torch.tanh(x) + b

    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found, expected = both(Anderson(1e-5), layer, torch.zeros(3, size), (q, b))
            assert_same(found, expected)
    finally:
        torch.set_num_threads(before)


def test_a_history_in_bfloat16_agrees_until_rounding_decides():
    batch = Batch(60, torch.float32)
    solver = Anderson(tol=1e-4, max_iter=30, history_dtype=torch.bfloat16)
    found, expected = both(solver, batch.layer, batch.x0, batch.inputs)
    assert torch.equal(found.status, expected.status)
    assert ((found.iterations - expected.iterations).abs() <= 1 + expected.iterations // 5).all()
    first = both(Anderson(tol=0, max_iter=4, history_dtype=torch.bfloat16), batch.layer, batch.x0, batch.inputs)
    torch.testing.assert_close(first[0].following, first[1].following, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kicked", [2, 4, 9])
def test_the_safeguard_acts_as_in_the_shared_loop(kicked):
    """Where the residual has suddenly grown."""
    calls = []

    def layer(x):
        calls.append(x)
        return 0.8 * torch.cos(x) + (20.0 if len(calls) in (kicked, kicked + 15) else 0.0)

    found, expected = both(Anderson(tol=0, max_iter=15), layer, torch.zeros(2, 7, dtype=torch.float64))
    assert len(calls) == 30
    assert_same(found, expected)


def test_its_constants_are_those_of_the_shared_loop():
    names = ("DIVERGED_GROWTH", "SAFEGUARD_GROWTH", "STALL_FALL", "STALL_WINDOW")
    assert [getattr(native._native, name) for name in names] == [getattr(loop, name) for name in names]


def solve(x, **options):
    return native.AndersonSolve(x, **{"tol": 0.1, "budget": torch.full((len(x),), 9)} | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(torch.zeros(3)), r"x has shape \(3,\); it takes \(B, N\)"),
        (lambda: solve(torch.zeros(4, 3).T), "x is torch.float32 of shape"),
        (lambda: solve(torch.zeros(2, 3, dtype=torch.long)), "x is torch.int64"),
        (lambda: solve(torch.zeros(2, 3), memory=65), "memory is 65; it takes an integer from 1 to 64"),
        (lambda: solve(torch.zeros(2, 3), budget=torch.ones(2)), "budget is torch.float32"),
        (lambda: solve(torch.zeros(2, 3), history_dtype=torch.float16), "history_dtype is torch.float16"),
        (lambda: solve(torch.zeros(2, 3)).step(torch.zeros(2, 3), torch.zeros(2, 4)), "f is torch.float32 of shape"),
        (lambda: solve(torch.zeros(2, 3)).step(torch.zeros(1, 3), torch.zeros(2, 3)), "x is torch.float32 of shape"),
    ],
)
def test_arguments_that_are_passed_by_address_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_solve_ends_when_every_sample_has_stopped():
    state = solve(torch.ones(2, 3), budget=torch.tensor([1, 2]))
    x = state.step(torch.ones(2, 3), torch.zeros(2, 3))
    assert state.running().tolist() == [False, True]
    with pytest.raises(RuntimeError, match="a sample still runs"):
        state.finish()
    state.step(x, x + 1)
    assert state.finish()[2].tolist() == [1, 2]


def test_a_history_too_long_for_it_is_left_to_the_shared_loop():
    with jfbfast.backend("auto"):
        x0 = torch.zeros(1, 5, dtype=torch.float64)
        solution = Anderson(tol=1e-9, memory=native.MAX_MEMORY + 1).solve(lambda x: 0.5 * x + 1, x0)
    assert solution.status.tolist() == [Status.CONVERGED]
