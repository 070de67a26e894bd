"""Solves by CUDA graphs (jfbfast/implicit/graphs.py) over the emulated kernels, with graphs that record and replay."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jfbfast
from jfbfast.backends import cuda, dispatch, graphs
from jfbfast.implicit.graphs import Graphs, _fingerprint


class Recorded:
    """A torch.cuda.CUDAGraph: its calls, each with the tensors that it had, whose memory it keeps."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.addresses: list[tuple[Tensor, int]] = []
        self.replays = 0

    def replay(self) -> None:
        assert all(tensor.data_ptr() == address for tensor, address in self.addresses), "a captured address changed"
        self.replays += 1
        for call in self.calls:
            call()


class Recorder(TorchDispatchMode):
    """Records what is computed within the context; the host may not read a number from it."""

    def __init__(self, graph: Recorded) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.graph.addresses += [(tensor, tensor.data_ptr()) for tensor in (*given, *tensors)]

        def call() -> None:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(tensors, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.graph.calls.append(call)
        return out


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, emulated_module: ModuleType) -> Iterator[list[Recorded]]:
    """The graphs that were made, where the CPU takes itself for a GPU."""
    recording: list[Recorded] = []
    found: list[Recorded] = []
    empty, rule, step = torch.empty, dispatch.kernels, cuda.AndersonSolve.step

    def new_graph() -> Recorded:
        found.append(Recorded())
        return found[-1]

    @contextmanager
    def capture(graph: Recorded, **options: Any) -> Iterator[None]:
        recording.append(graph)
        try:
            with Recorder(graph):
                yield
        finally:
            recording.pop()

    def recorded_step(self: cuda.AndersonSolve, x: Tensor, f: Tensor) -> Tensor:
        assert f.is_contiguous()
        if recording:
            rows = self._rows
            given = (x.data_ptr(), f.data_ptr(), 0 if rows is None else rows.data_ptr(), len(x))
            recording[-1].calls.append(lambda: self._state.step(0, 0, *given))
            recording[-1].addresses += [(t, t.data_ptr()) for t in (x, f, rows) if t is not None]
        return step(self, x, f)

    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)
    patch = monkeypatch.setattr
    patch(cuda, "_load", lambda: (emulated_module, ""))
    patch(cuda, "unavailable_because", lambda device: "")
    patch(torch.Tensor, "is_cuda", True)
    patch(torch, "empty", lambda *shape, pin_memory=False, **kwargs: empty(*shape, **kwargs))
    patch(torch.cuda, "device", lambda device: nullcontext())
    patch(torch.cuda, "current_stream", lambda device=None: stream)
    patch(torch.cuda, "Stream", lambda: stream)
    patch(torch.cuda, "stream", lambda stream: nullcontext())
    patch(torch.cuda, "Event", lambda: event)
    patch(torch.cuda, "CUDAGraph", new_graph)
    patch(torch.cuda, "graph", capture)
    patch(torch.cuda, "graph_pool_handle", lambda: None)
    patch(cuda.AndersonSolve, "step", recorded_step)
    gpu = torch.device("cuda", 0)
    patch(dispatch, "kernels", lambda device, op, **facts: rule(gpu if "solve" in op else device, op, **facts))
    yield found


def network(norm: str | None = "batch", captured: bool = True, **options: Any) -> jfbfast.DEGrad:
    torch.manual_seed(0)
    denoiser = jfbfast.DnCNN(1, 4, 4, norm=norm, residual=True, identity_start=True)  # type: ignore[arg-type]
    red = jfbfast.RED(denoiser, filter_damping="weight")
    options.setdefault("solver", jfbfast.Anderson(tol=1e-4))
    return jfbfast.DEGrad(jfbfast.GaussianBlur(5, 1.0), red, preconditioner="exact", cuda_graph=captured, **options)


def eager(model: jfbfast.DEGrad) -> jfbfast.DEGrad:
    """A copy that does not use graphs."""
    other = copy.deepcopy(model)
    other.cuda_graph = False
    return other


def images(batch: int = 5, size: int = 12) -> Tensor:
    torch.manual_seed(1)
    return jfbfast.GaussianBlur(5, 1.0)(
        torch.rand(batch, 1, size, size + 3) * torch.arange(1, batch + 1).view(-1, 1, 1, 1)
    )


def assert_same(model: jfbfast.DEGrad, d: Tensor, tolerance: float = 1e-5, x0: Tensor | None = None) -> None:
    """The model gives what it gives without graphs, with the same solution."""
    expected = eager(model)
    torch.testing.assert_close(model(d, x0=x0), expected(d, x0=x0), rtol=tolerance, atol=tolerance)
    assert model.solution is not None and expected.solution is not None
    assert model.solution.iterations.equal(expected.solution.iterations)
    assert model.solution.status.equal(expected.solution.status)


def test_a_replayed_solve_is_the_eager_one(made: list[Recorded]) -> None:
    model = network().eval()
    d = images()
    assert_same(model, d)
    evaluations = int(model.solution.iterations.max())  # type: ignore[union-attr]
    x0 = eager(model)(d).detach()
    x0[0] = 0  # the other samples are done at once
    assert_same(model, d, x0=x0)
    evaluations += int(model.solution.iterations.max())  # type: ignore[union-attr]
    assert len(made) == 5  # batches of 5, 3, 2 and 1, and the first evaluation
    assert made[4].replays == 2
    assert sum(graph.replays for graph in made[1:4]) > 0  # samples have left
    assert evaluations <= sum(graph.replays for graph in made) <= evaluations + 1  # a sudden end


@pytest.mark.parametrize("norm", ["batch", None])
def test_training_changes_the_weights_that_are_replayed(made: list[Recorded], norm: str | None) -> None:
    """Parameters, running statistics and spectral norms; the eager copy takes the same steps."""
    model = network(norm).train()
    other = eager(model)
    d = images()
    outs = []
    for net in (model, other):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            out = net(d)
            (out - 1).square().mean().backward()
            optimizer.step()
        outs.append(net(d).detach())
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    assert len(made) == 5
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_copied_would_be_stale(made: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().eval()
    model(images())
    with torch.no_grad():
        model.regularizer.denoiser.layers[0].weight.mul_(1.5)
        model.regularizer.log_weight.add_(0.3)
    assert_same(model, images())
    with torch.no_grad():
        model.regularizer.log_weight.add_(0.7)
    copies = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: copies(to[-2:], of[-2:]) if len(to) > 2 else None)
    with pytest.raises(jfbfast.ConvergenceWarning, match="5 of 5 samples"):  # the last application finds it out
        model(images())


def test_shapes_dtypes_and_attributes_have_graphs_of_their_own(made: list[Recorded]) -> None:
    model = network().eval()
    graph_count = []
    for d in (images(2), images(2, 9), images(2)):
        assert_same(model, d)
        graph_count.append(len(made))
    assert graph_count == [3, 6, 6]
    model.averaging = 0.7
    assert_same(model, images(2))
    assert len(made) == 9
    model.set_measurement(jfbfast.GaussianBlur(3, 0.7), 0.0)
    assert_same(model, images(2))
    assert len(made) == 12


class Slotted:
    """An object whose attribute is in a slot."""

    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 1.0

    def times(self, x: Tensor) -> Tensor:
        return self.gain * x


@pytest.mark.parametrize(
    "hold", (lambda s: s, lambda s: s.times, lambda s: partial(Slotted.times, s), lambda s: deque([s]))
)
def test_a_change_of_what_an_attribute_holds_is_noticed(hold: Callable[[Slotted], Any]) -> None:
    module, slotted = nn.Module(), Slotted()
    module.held = hold(slotted)
    before = _fingerprint(module)[0]
    assert _fingerprint(module)[0] == before
    slotted.gain = 2.0
    assert _fingerprint(module)[0] != before


def test_two_phases_have_graphs_of_their_own(made: list[Recorded]) -> None:
    model = network(solve_dtype=torch.bfloat16).eval()
    for _ in range(2):
        assert_same(model, images(2), 1e-3)
    assert [graph.replays for graph in made if graph.replays][-1] >= 2
    assert made[2].replays == 2


def test_the_cache_is_bounded_and_leaves_with_the_module(made: list[Recorded]) -> None:
    model = network().eval()
    for size in range(8, 14):
        model(images(1, size))
    cache = vars(model)["_solve_graphs"]
    assert isinstance(cache, Graphs) and len(cache) == 4
    assert not vars(copy.deepcopy(model))["_solve_graphs"] and not pickle.loads(pickle.dumps(cache))
    gone = weakref.ref(next(iter(cache.values())))
    made.clear()
    del model, cache
    gc.collect()
    assert gone() is None


class Reads(nn.Module):
    """A layer that reads a number, and may change an attribute."""

    def __init__(self, reads: bool = False, counts: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.reads, self.counts, self.calls = reads, counts, 0

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        self.calls += self.counts
        return x * (float(self.weight.detach()) if self.reads else self.weight) + d


def solved(layer: Any, d: Tensor, **options: Any) -> Tensor:
    return jfbfast.fixed_point(layer, torch.zeros_like(d), inputs=(d,), cuda_graph=True, **options)


def test_what_waits_for_the_device_is_evaluated_eagerly_with_a_reason(
    made: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_reasons", type(graphs._reasons)())
    layer, d = Reads(reads=True), torch.ones(2, 3)
    for _ in range(2):
        torch.testing.assert_close(solved(layer, d), 2 * d, rtol=1e-2, atol=1e-2)
    assert "2 evaluated eagerly: RuntimeError: operation not permitted" in graphs.describe()
    hooked = Reads()
    hooked.register_forward_hook(lambda *_: None)
    solved(hooked, d)
    assert "1 evaluated eagerly: the layer has a forward hook" in graphs.describe()


def test_a_layer_whose_attributes_always_change_is_captured_sixteen_times(made: list[Recorded]) -> None:
    layer, d = Reads(counts=True), torch.ones(1, 3)
    for _ in range(18):
        torch.testing.assert_close(solved(layer, d), 2 * d, rtol=1e-2, atol=1e-2)
    assert len(made) == 32
    assert "captured 16 times" in graphs.describe()


class Scales(nn.Module):
    """A layer with a number in a list, in an array and in an object, any of which may be changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.listed, self.array, self.held = {"scales": [0.5]}, np.ones(1), SimpleNamespace(scale=1.0)

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        return x * self.weight * self.listed["scales"][0] * float(self.array[0]) * self.held.scale + d


def test_a_layer_with_an_attribute_that_is_nested_too_deeply_is_solved_eagerly(made: list[Recorded]) -> None:
    layer, d = Scales(), torch.ones(1, 3)
    for _ in range(3000):
        layer.held = SimpleNamespace(scale=1.0, next=layer.held)
    torch.testing.assert_close(solved(layer, d), 2 * d, rtol=1e-2, atol=1e-2)
    assert made == [] and "nested too deeply" in graphs.describe()


def test_an_attribute_that_is_changed_in_place_is_seen(made: list[Recorded]) -> None:
    layer, d = Scales(), torch.ones(1, 3)
    solved(layer, d)
    torch.testing.assert_close(solved(layer, d), 2 * d, rtol=1e-2, atol=1e-2)
    assert len(made) == 2  # the first evaluation, and the others
    layer.listed["scales"][0] = 0.25
    torch.testing.assert_close(solved(layer, d), d / 0.75, rtol=1e-2, atol=1e-2)
    layer.array[0] = 2
    torch.testing.assert_close(solved(layer, d), 2 * d, rtol=1e-2, atol=1e-2)
    layer.held.scale = -1.0
    torch.testing.assert_close(solved(layer, d), d / 1.5, rtol=1e-2, atol=1e-2)


def test_what_cannot_be_captured_is_refused() -> None:
    d = torch.ones(1, 3)
    with pytest.raises(ValueError, match="layer is a function"):
        solved(lambda x, d: 0.5 * x + d, d)
    with pytest.raises(ValueError, match=r"solver is Picard.*; cuda_graph takes Anderson"):
        solved(Reads(), d, solver=jfbfast.Picard())
    with pytest.raises(ValueError, match="compile_solve is True; cuda_graph takes False"):
        solved(Reads(), d, compile_solve=True)
    with pytest.raises(ValueError, match="cuda_graph is True; it takes a state that is one real tensor"):
        solved(Reads(), d, callback=lambda *_: None)


def test_on_the_cpu_the_solve_is_eager() -> None:
    layer, d = Reads(), torch.ones(2, 3)
    torch.testing.assert_close(solved(layer, d), 2 * d, rtol=1e-2, atol=1e-2)
    assert "x0 is on cpu" in graphs.describe()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_on_a_gpu_training_is_the_same_with_graphs(dtype: torch.dtype | None) -> None:
    model = network(solve_dtype=dtype).cuda().train()
    other, d = eager(model), images().cuda()
    losses = []
    for net in (model, other):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            loss = (net(d) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-3)
    assert [graph for graph in vars(model)["_solve_graphs"].values() if isinstance(graph, str)] == []


@pytest.mark.gpu
def test_on_a_gpu_samples_leave_by_halves() -> None:
    model = network().cuda().eval()
    d = images().cuda()
    x0 = eager(model)(d).detach()
    x0[0] = 0
    for start in (None, x0):
        assert_same(model, d, 1e-4, start)
