"""Anderson acceleration: by compiled code that takes every decision of an iteration, or by the loop of all methods."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.backends import dispatch, reference
from jfbfast.backends.tensors import compute_dtype
from jfbfast.solvers.base import FixedPointSolver
from jfbfast.solvers.estimate import LowRank
from jfbfast.solvers.loop import Iteration, Phase, few_remain
from jfbfast.solvers.solution import FixedPointSolution


@dataclass(frozen=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration, type II: x ← Σ αᵢ T(xᵢ), α = argmin ‖Σ αᵢ (T(xᵢ) − xᵢ)‖ with Σ αᵢ = 1.

    The sums run over the last ``memory`` pairs of each sample (Walker and Ni, 2011, without damping). Safeguard: if
    a sample's residual grows to four times its lowest, its history is dropped and it takes the damped step
    x + ½(T(x) − x).

    Args:
        tol, max_iter, atol: as in `FixedPointSolver`.
        memory: number of pairs (x, T(x)) to keep, at least 1; 1 is the plain iteration.
        regularization: ε in the penalty ε Σ αᵢ²‖T(xᵢ) − xᵢ‖² on the weights, relative to the residuals.
        history_dtype: torch.bfloat16 stores the history of float32 iterates in half the memory (residuals, and
            differences of successive T(x), with the newest T(x) in float32); None stores it in the iterates' dtype.

    Raises:
        ValueError: as in `FixedPointSolver`; ``memory`` below 1; ``regularization`` not positive; another
            ``history_dtype``, or torch.bfloat16 for iterates that are not float32.

    Example:
        >>> import torch, jfbfast
        >>> d = torch.ones(2, 3)
        >>> solution = jfbfast.Anderson(tol=1e-5).solve(lambda x, d: 0.5 * x + d, torch.zeros(2, 3), (d,))
        >>> solution.value[0], solution.iterations
        (tensor([2., 2., 2.]), tensor([3, 3]))
    """

    estimates_inverse: ClassVar[bool] = True

    memory: int = 5
    regularization: float = 1e-10
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("memory", self.memory, 1)
        checks.positive("regularization", self.regularization)
        if self.history_dtype not in (None, torch.bfloat16):
            raise ValueError(f"history_dtype is {self.history_dtype}; it takes None or torch.bfloat16")

    def start(self, x: Tensor) -> Iteration:
        return _AndersonIteration(x, self.memory, self.regularization, self.history_dtype)

    def _run(self, phase: Phase) -> FixedPointSolution:
        x0 = phase.start
        if self.history_dtype is not None and x0.dtype != torch.float32:
            raise ValueError(f"history_dtype is {self.history_dtype}, which takes float32 iterates; x0 is {x0.dtype}")
        kernels = dispatch.kernels(
            x0.device, "anderson_solve", dtype=x0.dtype, memory=self.memory, estimate=phase.estimate
        )
        if hasattr(kernels, "AndersonSolve"):
            by_graphs = getattr(phase.layer, "replayed", None)
            if by_graphs is not None:
                found = by_graphs(phase, self, partial(self._start, kernels.AndersonSolve, phase))
                if found is not None:
                    return found
            return self._run_compiled(phase, kernels.AndersonSolve)
        return super()._run(phase)

    def _run_compiled(self, phase: Phase, solve: Any) -> FixedPointSolution:
        """The same as `iterate`, with all that an iteration does besides the layer in compiled code.

        Args:
            solve: the class `AndersonSolve` of a backend. On a GPU, its ``running`` is one step behind.
        """
        x, inputs = phase.flat_start(), phase.inputs
        state = self._start(solve, phase, x, phase.budget)
        for _ in range(phase.longest):
            x = state.step(x, phase.evaluate(x, inputs))
            running = state.running()
            remaining = sum(running.tolist())
            if remaining == 0:
                break
            if inputs and few_remain(remaining, len(x)):
                rows = state.select(running)
                x, inputs = x[rows], tuple([v[rows] for v in inputs])
        value, residual, iterations, status, following = state.finish()
        return FixedPointSolution(value, residual, iterations, status, following=following)

    def _start(self, solve: Any, phase: Phase, x: Tensor, budget: Tensor) -> Any:
        return solve(
            x,
            tol=self.tol,
            atol=self.atol,
            memory=self.memory,
            regularization=self.regularization,
            history_dtype=self.history_dtype,
            budget=budget,
            stall_floor=phase.stall_floor,
        )


class _AndersonIteration(Iteration):
    """The residuals gᵢ = T(xᵢ) − xᵢ, the images T(xᵢ) and the Gram matrix ⟨gᵢ, gⱼ⟩, in ring buffers.

    The images are the layer's own outputs. A history in bfloat16 stores the differences of successive
    images instead, and only the newest image.
    """

    def __init__(self, x: Tensor, memory: int, regularization: float, history_dtype: torch.dtype | None) -> None:
        batch = len(x)
        self.kernels = dispatch.kernels(x.device, "anderson")
        self.regularization = regularization
        self.residuals = torch.zeros(memory, *x.shape, dtype=history_dtype or x.dtype, device=x.device)
        self.differences = None if history_dtype is None else torch.zeros_like(self.residuals)
        self.images: list[Tensor] = []  # by slot; only the newest if there are differences
        self.gram = torch.zeros(batch, memory, memory, dtype=torch.float64, device=x.device)
        self.valid = torch.zeros(batch, memory, dtype=torch.bool, device=x.device)
        self.pairs = 0
        self.reused_output = False

    @property
    def slot(self) -> int:
        """The slot of the newest pair."""
        return (self.pairs - 1) % len(self.residuals)

    @property
    def filled(self) -> int:
        return min(self.pairs, len(self.residuals))

    def measure(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        if any(image.data_ptr() == f.data_ptr() for image in self.images):
            self.reused_output = (
                True  # the layer reuses its output's memory: drop the history, and keep copies from now on
            )
            self.valid[:] = False
        self.pairs += 1
        self.valid[:, self.slot] = True
        norms = self.kernels.anderson_append(x, f, self.residuals, self.gram, self.slot, self.filled)
        residual, image = norms.unbind(1)
        return residual, image

    def advance(self, x: Tensor, f: Tensor, grown: Tensor, out: Tensor) -> Tensor:
        filled = self.filled
        newest = torch.arange(self.valid.shape[1], device=x.device) == self.slot
        self.valid &= newest | ~grown[:, None]
        gram, valid = self.gram[:, :filled, :filled], self.valid[:, :filled]
        alpha = self.kernels.anderson_weights(gram, valid, self.regularization)
        kept = f.clone() if self.reused_output else f
        if self.differences is None:
            self.images[self.slot : self.slot + 1] = [kept]
            following = self.kernels.anderson_mix(alpha, self.images, out=out)
        else:
            previous = self.images[0] if self.images else None
            following = reference.anderson_mix_differences(alpha, f, previous, self.differences, self.slot, out=out)
            self.images = [kept]
        if x.is_cuda or grown.any():
            following = torch.where(grown[:, None], torch.lerp(x, f, 0.5), following)
        return following

    def inverse(self, rows: Tensor, f: Tensor) -> LowRank:
        """I − ΔF (ΔGᵀΔG)⁻¹ ΔGᵀ, which maps each ΔG = (∂T/∂x − I) ΔX to −ΔX because ΔF = ΔX + ΔG.

        ΔF and ΔG are the differences of the older images and residuals to the newest. ΔGᵀΔG is regularised like the
        weights, by at least the rounding of the history. It is used through its Cholesky factor: with
        LLᵀ = ΔGᵀΔG, U = ΔF L⁻ᵀ and V = ΔG L⁻ᵀ.
        """
        wide = compute_dtype(f.dtype)
        memory = len(self.residuals)
        older = [(self.slot - age) % memory for age in range(1, self.filled)]
        residual = self.residuals[self.slot][rows].to(wide)
        delta_g = residual.new_empty(len(older), *residual.shape)
        delta_f = torch.empty_like(delta_g)
        newer = f[rows].to(wide)
        for k, slot in enumerate(older):
            delta_g[k] = self.residuals[slot][rows].to(wide) - residual
            if self.differences is None:
                delta_f[k] = self.images[slot][rows].to(wide) - newer
            elif k == 0:
                delta_f[k] = self.images[0][rows] - newer
            else:
                delta_f[k] = delta_f[k - 1] - self.differences[older[k - 1]][rows]
        products = torch.einsum("kbn,lbn->bkl", delta_g.double(), delta_g.double())
        norm = products.diagonal(dim1=1, dim2=2).sqrt()
        scale = torch.where(self.valid[rows][:, older] & (norm > 0), 1 / norm, 0)
        epsilon = max(self.regularization, torch.finfo(self.residuals.dtype).eps)
        cosines = products * scale[:, :, None] * scale[:, None, :]
        system = cosines + torch.diag_embed(torch.where(scale > 0, epsilon, 1.0))
        factor = torch.linalg.cholesky_ex(system)[0]
        inverse = torch.linalg.solve_triangular(factor, torch.diag_embed(scale), upper=False).to(wide)
        return LowRank(*(torch.einsum("kbn,blk->lbn", delta, inverse) for delta in (delta_f, delta_g)))

    def select(self, rows: Tensor) -> None:
        self.residuals = self.residuals[:, rows]
        self.differences = None if self.differences is None else self.differences[:, rows]
        self.images = [image[rows] for image in self.images]
        self.gram = self.gram[rows]
        self.valid = self.valid[rows]
