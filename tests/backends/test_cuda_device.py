"""jfbfast.backends.cuda over the emulated kernels (tests/backends/cuda/emulate.h), and over the real ones on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import jfbfast
from jfbfast.backends import cuda, dispatch
from jfbfast.backends.cuda import AndersonSolve
from jfbfast.solvers import loop
from jfbfast.solvers.loop import Phase

TESTS = Path(__file__).parent
SOURCES = TESTS.parents[1] / "csrc" / "cuda"
STEPS = 40
HISTORIES = [(torch.float64, None), (torch.float32, None), (torch.float32, torch.bfloat16)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_says_why_it_is_not_available() -> None:
    assert cuda.describe() == "unavailable: torch sees no CUDA device"


def test_a_tensor_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch.float32 of shape \(2, 8\) .* on cpu"):
        AndersonSolve(torch.zeros(2, 8), tol=1e-3)


def test_the_constants_of_the_kernels_are_those_of_python(emulated_module: ModuleType) -> None:
    names = ("RUNNING", *(status.name for status in jfbfast.Status))
    assert [getattr(emulated_module, name) for name in names] == [cuda._RUNNING, *jfbfast.Status]
    assert emulated_module.MAX_MEMORY == cuda.MAX_MEMORY
    assert emulated_module.DIVERGED_GROWTH == loop.DIVERGED_GROWTH
    assert emulated_module.SAFEGUARD_GROWTH == loop.SAFEGUARD_GROWTH
    assert (emulated_module.STALL_FALL, emulated_module.STALL_WINDOW) == (loop.STALL_FALL, loop.STALL_WINDOW)


class Event:
    """What a torch.cuda.Event answers where every copy is already done."""

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["emulated", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU; or the CPU, where jfbfast.backends.cuda takes the emulated kernels for one."""
    if request.param == "cpu":
        module, empty = request.getfixturevalue("emulated_module"), torch.empty
        monkeypatch.setattr(cuda, "_load", lambda: (module, ""))
        monkeypatch.setattr(cuda, "unavailable_because", lambda device: "")
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **kwargs: empty(*shape, **kwargs))
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        rule, gpu = dispatch.kernels, torch.device("cuda", 0)
        monkeypatch.setattr(
            dispatch, "kernels", lambda device, op, **facts: rule(gpu if "solve" in op else device, op, **facts)
        )
    return str(request.param)


class Contraction:
    """x ↦ q ∘ x + b for x (B, N), with another q in [-0.6, 0.9] for each sample."""

    def __init__(self, batch: int, size: int, dtype: torch.dtype, device: str) -> None:
        self.q = (torch.rand(batch, size, dtype=dtype) * 1.5 - 0.6).to(device)
        self.b = torch.randn(batch, size, dtype=dtype).to(device)
        self.start = torch.zeros_like(self.b)

    def __call__(self, x: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.q[rows] * x + self.b[rows]


def solve(problem: Contraction, history: torch.dtype | None = None, tol: float = 1e-5) -> tuple[Tensor, ...]:
    x = problem.start.clone()
    state = AndersonSolve(x, tol=tol, history_dtype=history)
    for _ in range(STEPS):
        state.step(x, problem(x))
    return state.finish()


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def agrees_with_the_solver(batch: int, size: int, dtype: torch.dtype, history: torch.dtype | None, device: str) -> None:
    problem = Contraction(batch, size, dtype, device)
    value, residual, iterations, status, following = solve(problem, history)
    exact = [v.cpu().double() for v in (problem.q, problem.b)]
    expected = jfbfast.Anderson(tol=1e-5, max_iter=STEPS).solve(
        lambda x, q, b: q * x + b, problem.start.cpu().double(), exact
    )
    assert status.tolist() == expected.status.tolist()
    assert (iterations.cpu() - expected.iterations).abs().max() <= 1
    f = problem(value.double())
    claimed = (f - value.double()).norm(dim=1) / f.norm(dim=1)
    torch.testing.assert_close(residual, claimed, rtol=0.02, atol=1e-7)
    ahead = (problem(following) - following).norm(dim=1)
    assert (ahead <= (f - value).norm(dim=1)).all()


@pytest.mark.parametrize(("dtype", "history"), HISTORIES)
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 301)])
def test_it_agrees_with_the_solver_in_float64(
    batch: int, size: int, dtype: torch.dtype, history: torch.dtype | None, device: str
) -> None:
    agrees_with_the_solver(batch, size, dtype, history, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "history"), HISTORIES)
@pytest.mark.parametrize(("batch", "size"), [(16, 49152), (1, 12_000_000), (3, 100_001)])
def test_it_agrees_at_full_size(batch: int, size: int, dtype: torch.dtype, history: torch.dtype | None) -> None:
    agrees_with_the_solver(batch, size, dtype, history, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "history"), HISTORIES)
def test_a_captured_step_replays(dtype: torch.dtype, history: torch.dtype | None) -> None:
    """One graph of layer and step, replayed after a first step without it."""
    problem = Contraction(4, 3000, dtype, "cuda")
    expected = solve(problem, history)
    x = problem.start.clone()
    state = AndersonSolve(x, tol=1e-5, history_dtype=history)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        state.step(x, problem(x))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.step(x, problem(x))
    for _ in range(STEPS - 1):
        graph.replay()
    assert_same(state.finish(), expected)


def test_samples_can_leave_the_batch(device: str) -> None:
    problem = Contraction(6, 130, torch.float32, device)
    problem.q[::2] *= 0.1  # these are done sooner
    expected = solve(problem)
    x, rows = problem.start.clone(), torch.arange(6, device=device)
    state = AndersonSolve(x, tol=1e-5)
    batches = []
    for _ in range(STEPS):
        running = state.running()
        if running.any() and not running.all():
            staying = state.select(running)
            x, rows = x[staying], rows[staying]
        batches.append(len(rows))
        state.step(x, problem(x, rows))
    assert batches[0] == 6 and batches[-1] < 6
    assert not state.running().any()
    assert_same(state.finish(), expected)


def test_a_nan_stays_in_its_sample(device: str) -> None:
    problem = Contraction(3, 50, torch.float32, device)
    expected = solve(problem)
    problem.b[1, 7] = torch.nan
    found = solve(problem)
    assert found[3].tolist() == [jfbfast.Status.CONVERGED, jfbfast.Status.DIVERGED, jfbfast.Status.CONVERGED]
    assert found[0][1].equal(problem.start[1])
    assert_same(tuple(v[::2] for v in found), tuple(v[::2] for v in expected))


def test_a_sample_that_has_spent_its_budget_keeps_its_best_iterate(device: str) -> None:
    problem = Contraction(3, 50, torch.float32, device)
    x, few = problem.start.clone(), 6
    state = AndersonSolve(x, tol=0, budget=torch.tensor([50, few, 50], device=device))
    for _ in range(few):
        state.step(x, problem(x))
    stopped = x[1].clone()
    for _ in range(2):
        state.step(x, problem(x))
    assert torch.equal(x[1], stopped)
    state.running()
    assert state.running().tolist() == [True, False, True]
    found = state.finish()
    assert found[2].tolist() == [few + 2, few, few + 2]
    assert found[3].tolist() == [jfbfast.Status.MAX_ITER] * 3
    f = problem(found[0])
    claimed = (f - found[0]).norm(dim=1) / f.norm(dim=1)
    torch.testing.assert_close(found[1].float(), claimed, rtol=0.02, atol=1e-7)


@pytest.mark.parametrize("inputs", [False, True])
def test_the_solver_evaluates_no_more_than_it_needs(device: str, inputs: bool) -> None:
    """The host is one step behind the device, except where the residuals predict the end."""
    problem = Contraction(5, 130, torch.float32, device)
    calls = []

    def layer(x: Tensor, q: Tensor = problem.q, b: Tensor = problem.b) -> Tensor:
        calls.append(len(x))
        return q * x + b

    given = (problem.q, problem.b) if inputs else ()
    solution = jfbfast.Anderson(tol=1e-4).solve(layer, problem.start, given)
    assert (solution.status == jfbfast.Status.CONVERGED).all()
    assert len(calls) == int(solution.iterations.max())


def test_the_solver_evaluates_once_more_after_a_sudden_end(device: str) -> None:
    problem = Contraction(2, 30, torch.float64, device)
    calls = []

    def layer(x: Tensor) -> Tensor:
        calls.append(len(x))
        return problem(x) if len(calls) < 4 else x.clone()

    solution = jfbfast.Anderson(tol=1e-4).solve(layer, problem.start)
    assert solution.iterations.tolist() == [4, 4] and len(calls) == 5
    assert solution.following is not None
    torch.testing.assert_close(solution.following, solution.value, rtol=0, atol=0)


def test_the_following_iterate_is_the_one_of_the_shared_loop(device: str) -> None:
    """Also for a sample that converges at once, and for one that diverges, which has its value there."""
    problem = Contraction(4, 60, torch.float64, device)
    problem.q[1] = -1e5
    problem.b[2] = 0
    given = (problem.q, problem.b)
    expected = jfbfast.Anderson(tol=1e-4).solve(lambda x, q, b: q * x + b, problem.start, given, estimate=True)
    found = jfbfast.Anderson(tol=1e-4).solve(lambda x, q, b: q * x + b, problem.start, given)
    assert found.status.tolist() == expected.status.tolist() and found.following is not None
    torch.testing.assert_close(found.value, expected.value, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.following[2], problem.start[2])
    rows = [0, 1, 3]
    torch.testing.assert_close(found.following[rows], expected.following[rows], rtol=1e-6, atol=1e-8)  # type: ignore


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("max_iter", [1, 2, 7, 12, 60])
def test_the_solver_takes_two_phases(device: str, max_iter: int, captured: bool) -> None:
    """The coarse layer's images are known to 1e-3; what is claimed is the fine layer's."""
    problem = Contraction(5, 130, torch.float64, device)
    problem.q *= torch.tensor([0.1, 0.2, 0.4, 0.6, 0.7], dtype=torch.float64, device=device)[:, None]
    calls = [0, 0]

    def fine(x: Tensor, q: Tensor = problem.q, b: Tensor = problem.b) -> Tensor:
        calls[0] += 1
        return q * x + b

    def coarse(x: Tensor, q: Tensor = problem.q, b: Tensor = problem.b) -> Tensor:
        calls[1] += 1
        return q * x + b + 1e-3 * torch.sin(1e6 * x)

    inputs = () if captured else (problem.q, problem.b)
    solution = jfbfast.Anderson(tol=1e-9, max_iter=max_iter).solve(fine, problem.start, inputs, coarse=coarse)
    f = problem(solution.value)
    claimed = (f - solution.value).norm(dim=1) / f.norm(dim=1)
    torch.testing.assert_close(solution.residual, claimed, rtol=1e-5, atol=1e-14)
    spent = solution.iterations - solution.coarse_iterations
    late = solution.status == jfbfast.Status.MAX_ITER
    assert (spent >= 1).all() and (solution.iterations <= max_iter).all()
    assert (solution.iterations[late] == max_iter).all()
    assert (solution.coarse_iterations <= min(max_iter - 1, 30)).all()
    assert calls[0] <= max_iter and calls[1] <= max_iter - 1
    if max_iter == 60:
        assert not late.any()


def test_the_solver_stops_where_samples_stall(device: str) -> None:
    problem = Contraction(3, 130, torch.float64, device)
    problem.q *= 0.5
    calls = []

    def rough(x: Tensor) -> Tensor:
        calls.append(x.clone())
        return problem(x) + 1e-3 * torch.sin(1e6 * x)

    budget = torch.full((3,), 400, device=device)
    phase = Phase(rough, problem.start, (), budget, 400, 400, stop_when_stalled=True)
    solution = jfbfast.Anderson(tol=1e-9, max_iter=400)._run(phase)
    assert solution.status.tolist() == [jfbfast.Status.MAX_ITER] * 3
    assert len(calls) < 60 and (solution.residual < 1e-2).all()


def test_an_estimate_takes_the_shared_loop(device: str) -> None:
    problem = Contraction(2, 20, torch.float64, device)
    solution = jfbfast.Anderson(tol=1e-9).solve(problem, problem.start, estimate=True)
    assert solution.inverse is not None
    w = torch.ones_like(problem.start)
    exact = w / (1 - problem.q)
    found = solution.inverse.transpose(w)
    assert ((found - exact).norm(dim=1) < (w - exact).norm(dim=1)).all()


@pytest.mark.parametrize("history", [None, torch.bfloat16])
def test_an_empty_batch(device: str, history: torch.dtype | None) -> None:
    for shape in ((0, 5), (2, 0)):
        x = torch.zeros(shape, device=device)
        state = AndersonSolve(x, tol=1e-3, history_dtype=history)
        state.step(x, x)
        value, *_ = state.finish()
        assert value.shape == shape


def test_a_pair_of_another_shape_or_layout_is_refused(device: str) -> None:
    x = torch.zeros(2, 3, device=device)
    state = AndersonSolve(x, tol=1e-3)
    with pytest.raises(ValueError, match=r"f has \(shape, dtype, device\) \(\(2, 4\)"):
        state.step(x, torch.zeros(2, 4, device=device))
    with pytest.raises(ValueError, match="x has strides"):
        state.step(torch.zeros(3, 2, device=device).T, x)
