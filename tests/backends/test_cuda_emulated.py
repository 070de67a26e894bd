"""The CUDA Anderson kernels on the CPU: fibers for threads, under AddressSanitizer (tests/backends/cuda)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.sources import Patch, copy_sources
from jfbfast.backends import reference

TESTS = Path(__file__).parent
SOURCES = TESTS.parents[1] / "csrc" / "cuda"
RUNNING, CONVERGED, MAX_ITER, DIVERGED = -1, 0, 1, 2
REGULARIZATION = 1e-10

FLAGS = ["-std=c++17", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def compile_driver(folder: Path, *flags: str, patch: Patch | None = None) -> Path:
    """Compile the emulated kernels, with a patch to the sources if one is given."""
    sources = copy_sources(SOURCES, folder, patch)
    driver = folder / "driver"
    includes = [f"-I{sources}", f"-I{TESTS / 'cuda'}"]
    command = ["g++", *FLAGS, *flags, *includes, str(TESTS / "cuda" / "driver.cpp"), "-o", str(driver)]
    subprocess.run(command, check=True)
    return driver


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    return compile_driver(tmp_path_factory.mktemp("emulated"), "-O1", *warnings)


class Emulated:
    """One solve by the emulated kernels, in a process of its own."""

    def __init__(
        self,
        driver: Path,
        x: Tensor,
        *,
        memory: int,
        differences: bool = False,
        tol: float = 0.0,
        atol: float = 0.0,
        seed: int = 1,
    ) -> None:
        self.x = x
        self.samples = len(x)
        arguments = (str(x.dtype).removeprefix("torch."), int(differences), memory, *x.shape, tol, atol)
        command = [str(driver), *map(str, arguments), str(REGULARIZATION), str(seed)]
        pipe = subprocess.PIPE
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # the driver leaves that to its exit
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
        self._write(x)

    def __enter__(self) -> Emulated:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def _write(self, tensor: Tensor, command: bytes = b"") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + tensor.numpy().tobytes())
        self.process.stdin.flush()

    def _read(self, dtype: torch.dtype, *shape: int) -> Tensor:
        assert self.process.stdout is not None
        out = torch.empty(shape, dtype=dtype)
        data = self.process.stdout.read(out.nbytes)
        if len(data) < out.nbytes:
            raise RuntimeError(self.process.communicate()[1].decode())
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)

    def step(self, f: Tensor) -> Tensor:
        self._write(f.to(self.x.dtype), b"s")
        self.x = self._read(self.x.dtype, *self.x.shape)
        return self.x

    def select(self, rows: list[int]) -> None:
        """Go on with these rows of x alone; once a solve."""
        self._write(torch.tensor([len(rows), *rows], dtype=torch.int32), b"r")
        self.x = self.x[rows]

    def finish(self) -> tuple[Tensor, ...]:
        """value, following, residual (relative), status and iterations."""
        self._write(torch.empty(0), b"e")
        batch = self.samples
        value, following = (self._read(self.x.dtype, batch, self.x.shape[1]) for _ in range(2))
        residual = self._read(torch.float64, batch)
        status, iterations = self._read(torch.int32, batch), self._read(torch.int32, batch)
        complaint = self.process.communicate()[1].decode()
        if self.process.returncode:
            raise RuntimeError(complaint)
        return value, following, residual, status, iterations


class Plain:
    """The same step in float64 by jfbfast.backends.reference, one sample after another.

    The pairs are rebuilt from the newest one and the differences between neighbours, which a
    history of differences rounds to bfloat16.
    """

    def __init__(
        self, x: Tensor, *, memory: int, differences: bool = False, tol: float = 0.0, atol: float = 0.0
    ) -> None:
        batch = len(x)
        self.memory, self.differences, self.tol, self.atol = memory, differences, tol, atol
        self.history: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(batch)]  # newest first
        self.status, self.iterations = [RUNNING] * batch, [0] * batch
        self.value = x.clone()
        self.following: list[Tensor | None] = [None] * batch  # of those that converged
        self.residual = [torch.nan] * batch
        self.lowest = [torch.inf] * batch
        self.guarded = [torch.inf] * batch
        self.first: list[tuple[float, float] | None] = [None] * batch

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        """The next iterates in float64, for the x and f that the kernels were given."""
        return torch.stack([self._step(i, a, b) for i, (a, b) in enumerate(zip(x, f, strict=True))])

    def _step(self, i: int, x: Tensor, f: Tensor) -> Tensor:
        if self.status[i] != RUNNING:
            return x.double()
        g = f - x
        residual, image = g.double().norm().item(), f.double().norm().item()
        self.iterations[i] += 1
        first = self.first[i] = self.first[i] or (residual, image)
        finite = residual < torch.inf and image < torch.inf
        converged = finite and residual <= self.tol * image + self.atol
        if not converged and (not finite or max(residual, image) > 1e4 * sum(first)):
            self.status[i] = DIVERGED
            return x.double()
        if converged or residual < self.lowest[i]:
            self.lowest[i], self.residual[i], self.value[i] = residual, residual / image, x
        self.history[i] = [(g, f), *self.history[i]][: self.memory]
        if not converged and residual > 4 * self.guarded[i]:
            self.guarded[i] = residual
            del self.history[i][1:]
            return (x.double() + f.double()) / 2
        self.guarded[i] = min(self.guarded[i], residual)
        residuals, images = (self._pairs(vectors) for vectors in zip(*self.history[i], strict=True))
        gram = residuals @ residuals.T
        alpha = reference.anderson_weights(gram[None], torch.ones(1, len(gram), dtype=torch.bool), REGULARIZATION)
        mixed = reference.anderson_mix(alpha, [image[None] for image in images])[0] if residual > 0 else f.double()
        if converged:
            self.status[i], self.following[i] = CONVERGED, mixed
        return mixed

    def _pairs(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """What the history holds of these vectors, newest first."""
        if not self.differences:
            return torch.stack(vectors).double()
        steps = [(a - b).bfloat16().double() for a, b in pairwise(vectors)]
        newest = vectors[0].double()
        return newest - torch.stack([torch.zeros_like(newest), *steps]).cumsum(0)


def contraction(batch: int, size: int) -> tuple[Tensor, Callable[..., Tensor]]:
    """A start and a layer x ↦ q ∘ x + b, with another q in [-0.6, 0.9] for each sample."""
    generator = torch.Generator().manual_seed(size)
    q = torch.rand(batch, size, generator=generator, dtype=torch.float64) * 1.5 - 0.6
    b = torch.randn(batch, size, generator=generator, dtype=torch.float64)

    def layer(x: Tensor, rows: list[int] | slice = slice(None)) -> Tensor:
        return q[rows] * x.double() + b[rows]

    return torch.zeros(batch, size, dtype=torch.float64), layer


def assert_solved(emulated: Emulated, plain: Plain, tolerance: float) -> None:
    value, following, residual, status, iterations = emulated.finish()
    torch.testing.assert_close(value, plain.value, rtol=tolerance, atol=tolerance)
    for found, mixed, kept in zip(following, plain.following, value, strict=True):
        torch.testing.assert_close(
            found.double(), kept.double() if mixed is None else mixed, rtol=tolerance, atol=tolerance
        )
    expected = torch.tensor(plain.residual, dtype=torch.float64)
    torch.testing.assert_close(residual, expected, rtol=tolerance, atol=0, equal_nan=True)
    assert status.tolist() == [MAX_ITER if s == RUNNING else s for s in plain.status]
    assert iterations.tolist() == plain.iterations


def compare(
    driver: Path,
    batch: int,
    size: int,
    memory: int,
    dtype: torch.dtype = torch.float32,
    differences: bool = False,
    seed: int = 1,
    steps: int = 9,
) -> None:
    """Every step of a solve, each from the pairs that the kernels themselves had."""
    x0, layer = contraction(batch, size)
    x = x0.to(dtype)
    plain = Plain(x, memory=memory, differences=differences)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-6
    with Emulated(driver, x, memory=memory, differences=differences, seed=seed) as emulated:
        for _ in range(steps):
            f = layer(x).to(dtype)
            expected = plain.step(x, f)
            x = emulated.step(f)
            torch.testing.assert_close(x.double(), expected, rtol=tolerance, atol=tolerance)
        assert_solved(emulated, plain, tolerance)


HISTORIES = [(torch.float64, False), (torch.float32, False), (torch.float32, True)]


@pytest.mark.parametrize(("dtype", "differences"), HISTORIES, ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "size", "memory"),
    [(1, 1, 2), (3, 7, 3), (3, 4, 2), (1, 64, 4), (3, 1001, 5), (2, 2500, 6), (1, 4096, 12), (1, 31, 16)],
)
def test_steps_agree_with_the_reference(
    driver: Path, batch: int, size: int, memory: int, dtype: torch.dtype, differences: bool
) -> None:
    compare(driver, batch, size, memory, dtype, differences, steps=memory + 3)


def test_memory_of_one_is_the_plain_iteration(driver: Path) -> None:
    x0, layer = contraction(3, 65)
    x = x0.float()
    with Emulated(driver, x, memory=1) as emulated:
        for _ in range(3):
            f = layer(x).float()
            x = emulated.step(f)
            assert x.equal(f)


@pytest.mark.parametrize("differences", [False, True])
def test_thread_order_changes_nothing(driver: Path, differences: bool) -> None:
    """Bit for bit: no sum depends on the order of threads or blocks, and no barrier is missing."""
    x0, layer = contraction(2, 2052)
    runs = []
    for seed in range(4):
        x = x0.float()
        with Emulated(driver, x, memory=4, differences=differences, seed=seed) as emulated:
            for _ in range(5):
                x = emulated.step(layer(x))
            runs.append((x, *emulated.finish()))
    for run in runs[1:]:
        assert all(a.equal(b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("differences", [False, True])
def test_samples_that_leave_do_not_change_the_others(driver: Path, differences: bool) -> None:
    x0, layer = contraction(4, 70)
    found = []
    for staying in ([0, 1, 2, 3], [1, 3]):
        x, rows = x0.float(), [0, 1, 2, 3]
        with Emulated(driver, x, memory=3, differences=differences) as emulated:
            for step in range(7):
                if step == 4:
                    emulated.select(staying)
                    x, rows = x[staying], staying
                x = emulated.step(layer(x, rows))
            found.append([field[[1, 3]] for field in emulated.finish()])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def scripted(driver: Path, norms: list[list[float]], differences: bool, tol: float = 0.0) -> None:
    """A solve whose residual norms are chosen: norms[step][sample]."""
    generator = torch.Generator().manual_seed(0)
    batch, size = len(norms[0]), 37
    x = torch.randn(batch, size, generator=generator)
    plain = Plain(x, memory=3, differences=differences, tol=tol)
    with Emulated(driver, x, memory=3, differences=differences, tol=tol) as emulated:
        for wanted in norms:
            g = torch.randn(batch, size, generator=generator)
            f = x + g / g.norm(dim=1, keepdim=True) * torch.tensor(wanted)[:, None]
            frozen = [status != RUNNING for status in plain.status]
            expected = plain.step(x, f)
            following = emulated.step(f)
            assert following[frozen].equal(x[frozen])
            torch.testing.assert_close(following.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
            x = following
        assert_solved(emulated, plain, 1e-5)


def test_every_status_is_reached(driver: Path) -> None:
    nan, inf = torch.nan, torch.inf
    norms = [
        #  converges, at once, runs on, diverges, NaN at once, NaN later, Inf, ‖f‖ outgrows, safeguard
        [1.00, 1e-9, 1.0, 1.0, nan, 1.0, 1.0, 1.0, 1.0],
        [0.50, 5.00, 0.9, 2.1, 1.0, 0.5, 0.5, 1.0, 0.3],
        [0.20, 5.00, 0.8, 3e5, 1.0, nan, inf, 1e8, 1.5],
        [1e-9, 5.00, 0.7, 0.1, 1.0, 0.1, 0.1, 1.0, 0.2],
        [5.00, 5.00, 0.9, 0.1, 1.0, 0.1, 0.1, 1.0, 0.25],
    ]
    for differences in (False, True):
        scripted(driver, norms, differences, tol=1e-6)


@pytest.mark.parametrize("differences", [False, True])
def test_the_best_iterate_outlives_its_slot(driver: Path, differences: bool) -> None:
    """The lowest residual long before the end, and in the newest pairs."""
    norms = [[1.0, 1.0, 1.0], [0.1, 0.9, 0.9], *([0.15, 0.9, 0.9] for _ in range(5)), [0.15, 0.8, 0.9]]
    scripted(driver, [*norms, [0.15, 0.85, 0.7]], differences)


@pytest.mark.parametrize(("dtype", "differences"), HISTORIES, ids=["float64", "float32", "bfloat16"])
def test_a_whole_solve_agrees_with_the_solver(driver: Path, dtype: torch.dtype, differences: bool) -> None:
    """To the tolerance, in as many evaluations as in float64 within one, frozen from there on."""
    x0, layer = contraction(3, 301)
    tol = 1e-5
    x, exact = x0.to(dtype), x0.clone()
    plain = Plain(exact, memory=5, tol=tol)
    with Emulated(driver, x, memory=5, differences=differences, tol=tol) as emulated:
        for _ in range(40):
            x = emulated.step(layer(x))
            exact = plain.step(exact, layer(exact))
        value, following, residual, status, iterations = emulated.finish()
    assert status.tolist() == [CONVERGED] * 3
    for count, expected in zip(iterations.tolist(), plain.iterations, strict=True):
        assert abs(count - expected) <= 1
    assert x.equal(following) and not x.equal(value)
    claimed = (layer(value) - value.double()).norm(dim=1) / layer(value).norm(dim=1)
    torch.testing.assert_close(residual, claimed, rtol=0.02, atol=0)
    assert claimed.max() <= 1.02 * tol


BROKEN = {
    "the blocks' sums are read before they are written": (
        "append.cu",
        "    __syncthreads();\n    const int k",
        "    const int k",
    ),
    "products are read before they are summed": (
        "update.cu",
        "sum_partials(a, sample, products);\n    __syncthreads();",
        "sum_partials(a, sample, products);",
    ),
    "a store one past the end": ("mix.cu", "store(newest + i, image);", "store(newest + i + 1, image);"),
    "the Gram matrix shifted along its columns alone": ("update.cu", "stored[t - n - 1]", "stored[t - 1]"),
    "every sample has the history of the first": ("device.cuh", "slot * a.samples + sample", "slot * a.samples"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_is_caught(fault: str, tmp_path: Path) -> None:
    broken = compile_driver(tmp_path, "-O0", patch=BROKEN[fault])
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in (1, 2):
            compare(broken, batch=2, size=259, memory=3, seed=seed, steps=6)


def test_a_frozen_sample_that_moves_is_caught(tmp_path: Path) -> None:
    patch = ("update.cu", "a.action[sample] = kRest;", "a.action[sample] = kMix;")
    broken = compile_driver(tmp_path, "-O0", patch=patch)
    with pytest.raises(AssertionError):
        scripted(broken, [[1.0], [1e-9], [1.0]], False, tol=1e-6)
