"""The loop that all methods share: evaluate one layer until every sample of a batch has finished."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jfbfast.backends.tensors import flat
from jfbfast.solvers.estimate import InverseEstimate, LowRank
from jfbfast.solvers.solution import FixedPointSolution, Status

Layer = Callable[..., Tensor]

DIVERGED_GROWTH = 1e4  # ‖T(x) − x‖ or ‖T(x)‖ over the sum of their first values: the sample has diverged
SAFEGUARD_GROWTH = 4  # ‖T(x) − x‖ over its lowest value since the safeguard last acted: it acts again
STALL_FALL = 0.7  # a residual that has not stalled falls to this share …
STALL_WINDOW = 5  # … in this many evaluations
_COMPACTION = 0.5  # the share of running samples at which the finished ones leave the batch
TINY = torch.finfo(torch.float64).tiny


class Iteration(ABC):
    """The state of one method during one solve, on flat iterates (B, N)."""

    @abstractmethod
    def measure(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Record the pair (x, f = T(x)); return ‖f − x‖ and ‖f‖, each (B,)."""

    @abstractmethod
    def advance(self, x: Tensor, f: Tensor, grown: Tensor, out: Tensor) -> Tensor:
        """Return the next iterate, which may be written to ``out``; ``grown`` (B,) marks the samples to safeguard.

        ``x`` keeps its values until the next pair has been measured.
        """

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep only these samples, bool (B,)."""

    def inverse(self, rows: Tensor, f: Tensor) -> LowRank:
        """Estimate (I − ∂T/∂x)⁻¹ of these samples, (b,) indices, from the pairs so far; f is the newest T(x)."""
        raise NotImplementedError


def norms(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """‖f − x‖ and ‖f‖ of each sample, (B,), float64, for f = T(x)."""
    residual, image = flat(f - x), flat(f)
    norm = torch.linalg.vector_norm
    return norm(residual, dim=1, dtype=torch.float64), norm(image, dim=1, dtype=torch.float64)


def evaluate(layer: Layer, name: str, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """layer(x, *inputs), in the dtype of x.

    Raises:
        TypeError: the layer does not return a tensor.
        ValueError: the layer changes the shape, returns complex numbers, or writes over x or an input.
    """
    given = [value for value in (x, *inputs) if not value.is_inference()]
    versions = [value._version for value in given]
    f = layer(x, *inputs)
    if not isinstance(f, Tensor):
        raise TypeError(f"{name} returns a {type(f).__name__}; it takes a layer that returns a tensor")
    if [value._version for value in given] != versions:
        raise ValueError(f"{name} writes over its input; it takes a layer that leaves x and the inputs as they are")
    if f.shape != x.shape:
        raise ValueError(
            f"{name} maps shape {tuple(x.shape)} to {tuple(f.shape)}; it takes a layer that keeps the shape"
        )
    if f.is_complex():
        raise ValueError(f"{name} returns {f.dtype} for an x of {x.dtype}; it takes a complex x0 in `fixed_point`")
    return f.to(x.dtype)


@dataclass(frozen=True)
class Phase:
    """The iteration of one layer: a whole solve, or its coarse or fine phase.

    Attributes:
        layer: T; errors call it ``name``.
        start: the first iterate, (B, …).
        inputs: tensors (B, …) for the layer.
        budget: the most evaluations of each sample, at least 1, (B,).
        shortest, longest: the least and the largest budget.
        stop_when_stalled: whether a sample stops when it has stalled (`Stall`).
        floor: a relative residual; a sample that stalls at or below it stops even without ``stop_when_stalled``.
        estimate: whether to return an `InverseEstimate`.
    """

    layer: Layer
    start: Tensor
    inputs: tuple[Tensor, ...]
    budget: Tensor
    shortest: int
    longest: int
    stop_when_stalled: bool = False
    estimate: bool = False
    name: str = "layer"
    floor: float = 0.0

    @property
    def stall_floor(self) -> float | None:
        """The largest relative residual at which a stalled sample stops; None if none does."""
        return torch.inf if self.stop_when_stalled else self.floor or None

    def flat_start(self) -> Tensor:
        """A copy of the start, (B, N)."""
        return flat(self.start).clone(memory_format=torch.contiguous_format)

    def evaluate(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """T(x) for flat iterates, in their dtype."""
        images = x.view(len(x), *self.start.shape[1:])
        return evaluate(self.layer, self.name, images, inputs).reshape(x.shape)


class Stall:
    """Finds stalled samples: their lowest ‖T(x) − x‖ has not fallen by 30% in 5 evaluations."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.mark = torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
        self.since = torch.zeros(batch, dtype=torch.long, device=device)

    def update(self, lowest: Tensor) -> Tensor:
        """Take the lowest residuals after another evaluation; return the mask of stalled samples, (B,)."""
        fell = lowest <= STALL_FALL * self.mark
        self.mark = torch.where(fell, lowest, self.mark)
        self.since = torch.where(fell, 0, self.since + 1)
        return self.since >= STALL_WINDOW

    def select(self, rows: Tensor) -> None:
        self.mark, self.since = self.mark[rows], self.since[rows]


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The rows of ``a`` where the mask is true and of ``b`` elsewhere; no copy on the CPU if all rows agree."""
    if mask.device.type == "cpu":
        if mask.all():
            return a
        if not mask.any():
            return b
    return torch.where(mask[:, None], a, b)


class _Samples:
    """The state of each sample that is still in the batch."""

    def __init__(self, x: Tensor, budget: Tensor) -> None:
        batch, device = len(x), x.device
        self.rows = torch.arange(batch, device=device)  # their rows in the original batch
        self.budget = budget
        self.active = torch.ones(batch, dtype=torch.bool, device=device)
        self.value = self.following = x
        self.residual = torch.full((batch,), torch.nan, dtype=torch.float64, device=device)  # relative, at value
        self.iterations = torch.zeros(batch, dtype=torch.long, device=device)
        self.status = torch.full((batch,), Status.MAX_ITER, dtype=torch.long, device=device)
        self.lowest = torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
        self.guarded = self.lowest  # the lowest residual since the safeguard last acted
        self.bound = self.lowest  # above it a norm means divergence

    def judge(self, x: Tensor, residual: Tensor, image: Tensor, tol: float, atol: float) -> Tensor:
        """Find the samples that have converged, diverged or spent their budget, from ‖T(x) − x‖ and ‖T(x)‖.

        Returns:
            A mask of the samples whose value is now their newest iterate, (B,).
        """
        finite = residual.isfinite() & image.isfinite()
        converged = self.active & finite & (residual <= tol * image + atol)
        outgrown = (residual > self.bound) | (image > self.bound)
        diverged = self.active & ~converged & (~finite | outgrown)
        improved = converged | (self.active & ~diverged & (residual < self.lowest))
        self.lowest = torch.where(improved, residual, self.lowest)
        self.value = _where(improved, x, self.value)
        self.residual = torch.where(improved, residual / image.clamp_min(TINY), self.residual)
        self.iterations = self.iterations + self.active
        self.status = self.status.masked_fill(converged, Status.CONVERGED).masked_fill(diverged, Status.DIVERGED)
        self.active = self.active & ~converged & ~diverged & (self.iterations < self.budget)
        return improved

    def step(self, following: Tensor, before: Tensor, improved: Tensor) -> Tensor:
        """Move to the next iterates and return them; ``before`` is the mask of active samples before this evaluation.

        A sample that has just finished stays at the iterate after its value. If its value is not the newest iterate, it
        stays at its value.
        """
        ended = before & ~self.active
        self.following = _where(ended & ~improved, self.value, self.following)
        self.following = _where(ended & improved, following, self.following)
        return _where(self.active, following, self.following)

    def grown(self, residual: Tensor) -> Tensor:
        """A mask of the samples whose residual has grown so much that the safeguard acts, (B,)."""
        grown = residual > SAFEGUARD_GROWTH * self.guarded
        self.guarded = torch.where(grown, residual, torch.minimum(self.guarded, residual))
        return grown

    def found(self) -> tuple[Tensor, ...]:
        """The value, residual, iterations, status and following iterate of each row."""
        return self.value, self.residual, self.iterations, self.status, self.following

    def put(self, solution: tuple[Tensor, ...], which: Tensor | slice) -> None:
        """Write the results of these rows to their places in the original batch."""
        for target, source in zip(solution, self.found(), strict=True):
            target[self.rows[which]] = source[which]

    def select(self, rows: Tensor) -> None:
        for name, field in vars(self).items():
            setattr(self, name, field[rows])


def few_remain(remaining: int, rows: int) -> bool:
    """Whether so few rows of the batch still run that the others leave it."""
    return remaining <= _COMPACTION * rows


def iterate(phase: Phase, start: Callable[[Tensor], Iteration], tol: float, atol: float) -> FixedPointSolution:
    """Run one phase. The value is returned flat, (B, N), and the residual in float64."""
    x, inputs, device = phase.flat_start(), phase.inputs, phase.start.device
    iteration = start(x)
    samples = _Samples(x, phase.budget)
    floor = phase.stall_floor
    stall = None if floor is None else Stall(len(x), device)
    inverse = InverseEstimate(phase.start.shape) if phase.estimate else None
    solution = tuple(torch.empty_like(field) for field in samples.found())
    buffers = [torch.empty_like(x) for _ in range(3)]

    for evaluation in range(1, phase.longest + 1):
        f = phase.evaluate(x, inputs)
        residual, image = iteration.measure(x, f)
        if evaluation == 1:
            samples.bound = DIVERGED_GROWTH * (residual + image)
        before = samples.active
        improved = samples.judge(x, residual, image, tol, atol)
        if stall is not None and floor is not None:
            samples.active = samples.active & ~(stall.update(samples.lowest) & (samples.residual <= floor))
        ended = before & ~samples.active & (samples.status != Status.DIVERGED)
        if inverse is not None and ended.any():
            inverse.put(samples.rows[ended], iteration.inverse(ended.nonzero()[:, 0], f))

        # The following iterates fill a buffer only when all samples have ended.
        free = next(buffer for buffer in buffers if buffer is not x and buffer is not samples.value)
        following = iteration.advance(x, f, samples.grown(residual), out=free)
        x = samples.step(following, before, improved)
        remaining = int(samples.active.sum())
        if remaining == 0:
            break
        if inputs and few_remain(remaining, len(x)):
            running = samples.active
            samples.put(solution, ~running)
            x, *inputs_left = (v[running] for v in (x, *inputs))
            inputs = tuple(inputs_left)
            iteration.select(running)
            if stall is not None:
                stall.select(running)
            samples.select(running)
            buffers = [torch.empty_like(x) for _ in range(3)]

    if len(x) == len(phase.start):
        solution = samples.found()
    else:
        samples.put(solution, slice(None))
    value, relative, iterations, status, following = solution
    return FixedPointSolution(value, relative, iterations, status, inverse=inverse, following=following)
