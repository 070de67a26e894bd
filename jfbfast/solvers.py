"""Fixed-point solvers: x = T(x; inputs), sample by sample, without gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from jfbfast import cuda, native, ops, reference

Layer = Callable[..., Tensor]

_DIVERGED_GROWTH = 1e4  # of ‖T(x) − x‖ or ‖T(x)‖ over their first values' sum
_CUDA_POLL = 4  # iterations between two looks at whether every sample is done


_SAFEGUARD_GROWTH = 4  # of ‖T(x) − x‖ over its lowest value since the safeguard last acted
_TINY = torch.finfo(torch.float64).tiny


class Status(IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    MAX_ITER = 1
    DIVERGED = 2


class ConvergenceWarning(UserWarning):
    """Some samples of a batch did not reach the tolerance asked for."""


class FixedPointSolution(NamedTuple):
    """What a solve found, in the order of the batch.

    Attributes:
        value: the iterate x, (B, …); for a sample that did not converge, the one of the lowest
            ‖T(x) − x‖; NaN for a sample that never had a finite one.
        residual: ‖T(x) − x‖ / ‖T(x)‖ at ``value``, (B,), measured in float32 or wider.
        iterations: evaluations of T, (B,).
        status: a `Status` as an int64 tensor, (B,).
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    status: Tensor


class Iteration(Protocol):
    """What one solve of one method keeps between evaluations, on flat iterates (B, N)."""

    def measure(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Take the pair (x, f = T(x)); return ‖f − x‖ and ‖f‖, each (B,)."""
        ...

    def advance(self, x: Tensor, f: Tensor, grown: Tensor, out: Tensor) -> Tensor:
        """The next iterate, in ``out`` or not; ``grown`` (B,) marks samples to safeguard."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these samples alone."""
        ...


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The rows of a where the mask holds and of b elsewhere; on the CPU no copy where all rows agree."""
    if mask.device.type == "cpu":
        if mask.all():
            return a
        if not mask.any():
            return b
    return torch.where(mask[:, None], a, b)


def _put(solution: FixedPointSolution, rows: Tensor, found: FixedPointSolution, which: Tensor | slice) -> None:
    for target, source in zip(solution, found, strict=True):
        target[rows] = source[which]


def _finished(solution: FixedPointSolution, x0: Tensor) -> FixedPointSolution:
    """In the shape of x0; a sample without any finite iterate is NaN throughout."""
    unusable = solution.residual.isnan() & ~x0.reshape(solution.value.shape).isfinite().all(1)
    return solution._replace(
        value=torch.where(unusable[:, None], torch.nan, solution.value).view(x0.shape),
        residual=solution.residual.to(reference.band_dtype(x0.dtype)),
    )


@dataclass(frozen=True)
class FixedPointSolver(ABC):
    """The loop that every method shares: stopping, freezing, statuses, compaction.

    A sample stops as CONVERGED when ‖T(x) − x‖ ≤ tol·‖T(x)‖ + atol, and as DIVERGED when either
    norm is not finite or exceeds 10⁴ times the sum of the two at the first evaluation. It is frozen from there
    on, and leaves the batch once half of the batch has. No sample's values touch another's.

    Args:
        tol: relative tolerance; 0 runs to ``max_iter``.
        max_iter: evaluations of T at most; kept exactly.
        atol: absolute tolerance, in units of ‖x‖ over a sample.

    Raises:
        ValueError: a negative or non-finite tolerance; ``max_iter`` below 1.
    """

    tol: float = 1e-3
    max_iter: int = 50
    atol: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tol", "atol"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it takes a finite number of at least 0")
        if not isinstance(self.max_iter, Integral) or self.max_iter < 1:
            raise ValueError(f"max_iter is {self.max_iter}; it takes an integer of at least 1")

    @abstractmethod
    def start(self, x: Tensor) -> Iteration:
        """A fresh iteration for flat iterates like ``x`` (B, N)."""

    @torch.compiler.disable
    def solve(self, layer: Layer, x0: Tensor, inputs: Sequence[Tensor] = ()) -> FixedPointSolution:
        """Solve x = layer(x, *inputs) for each sample of the batch.

        Args:
            layer: T, a map of (B, …) to the same shape that treats each sample by itself.
            x0: the start, (B, …), floating point; the iterates have its dtype.
            inputs: tensors (B, …) of which each sample owns a slice. Samples leave the batch only
                where there are inputs, since a layer that captured its data could not follow.

        Raises:
            ValueError: x0 without a batch dimension or not floating point, an input of another batch
                size, or a layer that changes the shape.
        """
        if x0.dim() < 1 or not x0.is_floating_point():
            raise ValueError(
                f"x0 is {x0.dtype} of shape {tuple(x0.shape)}; it takes a floating-point tensor of shape (B, …)"
            )
        for i, value in enumerate(inputs):
            if value.shape[:1] != x0.shape[:1]:
                raise ValueError(
                    f"inputs[{i}] has shape {tuple(value.shape)}; it takes the batch size of x0, ({x0.shape[0]}, …)"
                )
        with torch.no_grad():
            return self._solve(layer, x0.detach(), tuple(inputs))

    def _solve(self, layer: Layer, x0: Tensor, inputs: tuple[Tensor, ...]) -> FixedPointSolution:
        batch, shape, device = x0.shape[0], x0.shape[1:], x0.device
        x = x0.reshape(batch, shape.numel()).clone(memory_format=torch.contiguous_format)
        found = FixedPointSolution(
            value=x,
            residual=torch.full((batch,), torch.nan, dtype=torch.float64, device=device),
            iterations=torch.zeros(batch, dtype=torch.long, device=device),
            status=torch.full((batch,), Status.MAX_ITER, dtype=torch.long, device=device),
        )
        solution = FixedPointSolution(*(field.clone() for field in found))
        rows = torch.arange(batch, device=device)
        active = torch.ones(batch, dtype=torch.bool, device=device)
        lowest = torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
        guarded = lowest  # the lowest since the safeguard last acted
        bound: Tensor | None = None
        iteration = self.start(x)
        buffers = [torch.empty_like(x) for _ in range(3)]

        for evaluation in range(1, self.max_iter + 1) if batch else ():
            f = self._evaluate(layer, x.view(-1, *shape), inputs)
            residual, image = iteration.measure(x, f)
            bound = _DIVERGED_GROWTH * (residual + image) if bound is None else bound

            finite = residual.isfinite() & image.isfinite()
            converged = active & finite & (residual <= self.tol * image + self.atol)
            outgrown = (residual > bound) | (image > bound)
            diverged = active & ~converged & (~finite | outgrown)
            improved = converged | (active & ~diverged & (residual < lowest))
            lowest = torch.where(improved, residual, lowest)
            found = FixedPointSolution(
                value=_where(improved, x, found.value),
                residual=torch.where(improved, residual / image.clamp_min(_TINY), found.residual),
                iterations=found.iterations + active,
                status=found.status.masked_fill(converged, Status.CONVERGED).masked_fill(diverged, Status.DIVERGED),
            )
            active = active & ~converged & ~diverged
            if evaluation == self.max_iter:
                break
            if device.type == "cpu" or evaluation % _CUDA_POLL == 0:
                remaining = int(active.sum())
                if remaining == 0:
                    break
                if inputs and remaining <= len(rows) // 2:
                    _put(solution, rows[~active], found, ~active)
                    x, f, residual, lowest, guarded, rows, *inputs_left = (
                        v[active] for v in (x, f, residual, lowest, guarded, rows, *inputs)
                    )
                    inputs, bound = tuple(inputs_left), bound[active]
                    found = FixedPointSolution(*(field[active] for field in found))
                    iteration.select(active)
                    active = torch.ones_like(rows, dtype=torch.bool)
                    buffers = [torch.empty_like(x) for _ in range(3)]

            grown = residual > _SAFEGUARD_GROWTH * guarded
            guarded = torch.where(grown, residual, torch.minimum(guarded, residual))
            free = next(b for b in buffers if b is not x and b is not found.value)
            following = iteration.advance(x, f, grown, out=free)
            x = _where(active, following, x)

        _put(solution, rows, found, slice(None))
        return _finished(solution, x0)

    @staticmethod
    def _evaluate(layer: Layer, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        f = layer(x, *inputs)
        if f.shape != x.shape:
            raise ValueError(
                f"layer maps shape {tuple(x.shape)} to {tuple(f.shape)}; it takes a layer that keeps the shape"
            )
        return f.to(x.dtype).reshape(len(x), x.shape[1:].numel())


@dataclass(frozen=True)
class Picard(FixedPointSolver):
    """The plain iteration x ← T(x). Arguments as in `FixedPointSolver`."""

    def start(self, x: Tensor) -> Iteration:
        return _PicardIteration()


class _PicardIteration:
    def measure(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm
        return norm(f - x, dim=1, dtype=torch.float64), norm(f, dim=1, dtype=torch.float64)

    def advance(self, x: Tensor, f: Tensor, grown: Tensor, out: Tensor) -> Tensor:
        return out.copy_(f)  # not f itself: a layer may write its next output over it

    def select(self, rows: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration, type II: x ← Σ αᵢ T(xᵢ), α = argmin ‖Σ αᵢ (T(xᵢ) − xᵢ)‖ with Σ αᵢ = 1.

    Over the last ``memory`` pairs of each sample (Walker and Ni, 2011, without damping). Where a
    sample's residual grows to four times its lowest, its history is dropped and it takes the damped
    step x + ½(T(x) − x).

    Args:
        tol, max_iter, atol: as in `FixedPointSolver`.
        memory: pairs (x, T(x)) kept, at least 1; 1 is the plain iteration.
        regularization: ε of the weights' penalty ε Σ αᵢ²‖T(xᵢ) − xᵢ‖², relative to the residuals.
        history: torch.bfloat16 keeps the history of float32 iterates in half the memory: residuals, and
            differences of images, beside the newest images in float32; None keeps it in the iterates' dtype.

    Raises:
        ValueError: as in `FixedPointSolver`; ``memory`` below 1; ``regularization`` not positive; another
            ``history``, or one in bfloat16 for iterates that are not float32.
    """

    memory: int = 5
    regularization: float = 1e-10
    history: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.memory, Integral) or self.memory < 1:
            raise ValueError(f"memory is {self.memory}; it takes an integer of at least 1")
        if not 0 < self.regularization < math.inf:
            raise ValueError(f"regularization is {self.regularization}; it takes a positive number")
        if self.history not in (None, torch.bfloat16):
            raise ValueError(f"history is {self.history}; it takes None or torch.bfloat16")

    def start(self, x: Tensor) -> Iteration:
        return _AndersonIteration(x, self.memory, self.regularization, self.history)

    def _solve(self, layer: Layer, x0: Tensor, inputs: tuple[Tensor, ...]) -> FixedPointSolution:
        if self.history is not None and x0.dtype != torch.float32:
            raise ValueError(f"history is {self.history}, which takes float32 iterates; x0 is {x0.dtype}")
        if (
            x0.is_cuda
            and x0.dtype in (torch.float32, torch.float64)
            and self.memory <= cuda.MAX_MEMORY
            and ops.selected_backend() != "reference"
            and not cuda.why_not(x0.get_device())
        ):
            return self._solve_on_device(layer, x0, inputs)
        return super()._solve(layer, x0, inputs)

    def _solve_on_device(self, layer: Layer, x0: Tensor, inputs: tuple[Tensor, ...]) -> FixedPointSolution:
        """The same loop with every decision of an iteration taken on the GPU, which the host never waits for."""
        batch, shape = x0.shape[0], x0.shape[1:]
        x = x0.reshape(batch, shape.numel()).clone(memory_format=torch.contiguous_format)
        state = cuda.AndersonCuda(
            x,
            tol=self.tol,
            atol=self.atol,
            memory=self.memory,
            regularization=self.regularization,
            history=self.history,
        )
        for evaluation in range(1, self.max_iter + 1) if batch else ():
            state.step(x, self._evaluate(layer, x.view(-1, *shape), inputs))
            if evaluation % _CUDA_POLL == 0:
                running = state.running()
                remaining = int(running.sum())
                if remaining == 0:
                    break
                if inputs and remaining <= len(running) // 2:
                    rows = state.select(running)
                    x, inputs = x[rows], tuple(v[rows] for v in inputs)
        return _finished(FixedPointSolution(*state.finish()), x0)


class _AndersonIteration:
    """The residuals gᵢ = T(xᵢ) − xᵢ, the images T(xᵢ) and the Gram matrix ⟨gᵢ, gⱼ⟩, in a ring.

    The images are the layer's own outputs. A history in bfloat16 keeps the differences of successive
    images in their place, and only the newest image.
    """

    def __init__(self, x: Tensor, memory: int, regularization: float, history: torch.dtype | None) -> None:
        batch = len(x)
        self.kernels = native if ops.kernels_for(x.device) is native else reference
        self.regularization = regularization
        self.residuals = torch.zeros(memory, *x.shape, dtype=history or x.dtype, device=x.device)
        self.differences = None if history is None else torch.zeros_like(self.residuals)
        self.images: list[Tensor] = []  # by slot; with differences the newest alone
        self.gram = torch.zeros(batch, memory, memory, dtype=torch.float64, device=x.device)
        self.valid = torch.zeros(batch, memory, dtype=torch.bool, device=x.device)
        self.pairs = 0
        self.reused_output = False

    @property
    def slot(self) -> int:
        """Of the newest pair."""
        return (self.pairs - 1) % len(self.residuals)

    @property
    def filled(self) -> int:
        return min(self.pairs, len(self.residuals))

    def measure(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        if any(image.data_ptr() == f.data_ptr() for image in self.images):
            self.reused_output = True  # the layer wrote over an earlier output of its own: begin anew, with copies
            self.valid[:] = False
        self.pairs += 1
        self.valid[:, self.slot] = True
        norms = self.kernels.anderson_append(x, f, self.residuals, self.gram, self.slot, self.filled)
        residual, image = norms.sqrt().unbind(1)
        return residual, image

    def advance(self, x: Tensor, f: Tensor, grown: Tensor, out: Tensor) -> Tensor:
        filled = self.filled
        newest = torch.arange(self.valid.shape[1], device=x.device) == self.slot
        self.valid &= newest | ~grown[:, None]
        alpha = self.kernels.anderson_weights(
            self.gram[:, :filled, :filled], self.valid[:, :filled], self.regularization
        )
        kept = f.clone() if self.reused_output else f
        if self.differences is None:
            self.images[self.slot : self.slot + 1] = [kept]
            following = self.kernels.anderson_mix(alpha, self.images, out=out)
        else:
            previous = self.images[0] if self.images else None
            following = self.kernels.anderson_mix_differences(alpha, f, previous, self.differences, self.slot, out=out)
            self.images = [kept]
        if x.is_cuda or grown.any():
            following = torch.where(grown[:, None], torch.lerp(x, f, 0.5), following)
        return following

    def select(self, rows: Tensor) -> None:
        self.residuals = self.residuals[:, rows]
        self.differences = None if self.differences is None else self.differences[:, rows]
        self.images = [image[rows] for image in self.images]
        self.gram = self.gram[rows]
        self.valid = self.valid[rows]
