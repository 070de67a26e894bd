"""The solve of a layer, evaluated in its prepared form: first in low precision, and in full with what that leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from jfbfast.backends.precision import precision_for
from jfbfast.implicit.autograd import TracedLayer
from jfbfast.implicit.frozen import fixed_map, materialised_weights
from jfbfast.implicit.prepared import prepared
from jfbfast.solvers import FixedPointSolution, FixedPointSolver, Layer


class Solve:
    """The solve of one layer, prepared for it: in low precision first where that is asked for, or autocast is on."""

    def __init__(
        self, traced: TracedLayer, solver: FixedPointSolver, solve_dtype: torch.dtype | None, compiled: bool
    ) -> None:
        self.traced, self.solver, self.solve_dtype, self.compiled = traced, solver, solve_dtype, compiled

    def __call__(self, x0: Tensor, inputs: tuple[Tensor, ...], estimate: bool) -> FixedPointSolution:
        """The solution; what low precision found is measured in full by the application that follows, if that is."""
        solver, autocast = self.solver, autocast_dtype(x0)
        dtype = self.solve_dtype or autocast
        given, captured = self._shared(inputs)
        with self._still(x0):
            coarse = None if dtype is None else self._prepared(dtype, captured)
            if coarse is not None and solver.tol == 0 and self.solve_dtype is None:
                return solver.solve(coarse, x0, given, estimate=estimate)  # whose evaluations the caller counts
            late = cache(partial(self._prepared, None, captured))  # at its first evaluation, which may never come
            verify = self.solve_dtype is not None and autocast is not None
            return solver.solve(
                lambda *arguments: late()(*arguments), x0, given, coarse=coarse, verify=verify, estimate=estimate
            )

    def finish(self, solution: FixedPointSolution, rejected: Tensor, inputs: tuple[Tensor, ...]) -> FixedPointSolution:
        """Of these samples, those that low precision alone has found go on in full; of the others the value stands."""
        unmeasured = rejected & (solution.iterations == solution.coarse_iterations)
        if not unmeasured.any():
            return solution
        assert solution.following is not None
        rows = unmeasured.nonzero()[:, 0]
        given, captured = self._shared(inputs)
        some: Any = rows if given else slice(None)
        spent = solution.iterations[rows]
        solver = self.solver
        if isinstance(solver, FixedPointSolver):
            solver = replace(solver, max_iter=solver.max_iter - int(spent.max()))
        with self._still(solution.value):
            layer, left = self._prepared(None, captured), tuple(i[some] for i in given)
            found = solver.solve(layer, solution.following[some], left)
        own = slice(None) if given else rows
        return solution.replaced(
            rows,
            value=found.value[own],
            residual=found.residual[own],
            iterations=found.iterations[own] + spent,
            status=found.status[own],
        )

    def _shared(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The inputs to hand to the solver, of which samples take their slices along, and those to capture whole."""
        inputs = tuple(i.detach() for i in inputs)
        return ((), inputs) if self.traced.whole_batch else (inputs, ())

    def _prepared(self, dtype: torch.dtype | None, captured: tuple[Tensor, ...]) -> Layer:
        layer = prepared(self.traced.layer, dtype, tol=self.solver.tol, compiled=self.compiled)
        return (lambda x: layer(x, *captured)) if captured else layer

    @contextmanager
    def _still(self, x: Tensor) -> Iterator[None]:
        module = self.traced.module
        with fixed_map(module), precision_for(self.solver.tol, x.device), materialised_weights(module):
            yield
        torch.clear_autocast_cache()  # up to torch 2.12 it hands casts without a gradient to the trace that follows


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the caller's autocast on x's device, or None."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
