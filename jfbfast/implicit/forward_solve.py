"""The forward solve of an implicit network: without gradients, with its module held still and prepared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast.backends import graphs
from jfbfast.backends.precision import precision_for
from jfbfast.implicit.autograd import ImplicitLayer
from jfbfast.implicit.frozen import frozen, materialised_weights
from jfbfast.implicit.graphs import CapturedLayer
from jfbfast.implicit.prepared import prepared
from jfbfast.solvers import Anderson, FixedPointSolution, FixedPointSolver, Layer


class ForwardSolve(NamedTuple):
    """How to find the fixed point of a layer, without gradients.

    Attributes:
        implicit: the layer.
        solver: solves for the fixed point.
        solve_dtype, compiled, captured: ``solve_dtype``, ``compile_solve`` and ``cuda_graph`` of `fixed_point`.
    """

    implicit: ImplicitLayer
    solver: FixedPointSolver
    solve_dtype: torch.dtype | None = None
    compiled: bool = False
    captured: bool = False

    def find(self, x0: Tensor, inputs: tuple[Tensor, ...], estimate: bool = False) -> FixedPointSolution:
        """Find the fixed point, starting at x0.

        Low-precision results are verified by the application that follows, if that runs in full precision.

        Args:
            x0, inputs: as in `fixed_point`.
            estimate: whether the solution must have an ``inverse``.
        """
        solver, autocast = self.solver, autocast_dtype(x0)
        dtype = self.solve_dtype or autocast
        fine, leaving = self._prepared(None, inputs, x0)
        with self._held_still(x0.device):
            if dtype is None:
                return solver.solve(fine, x0, leaving, estimate=estimate)
            coarse, _ = self._prepared(dtype, inputs, x0)
            if solver.tol == 0 and self.solve_dtype is None:
                return solver.solve(coarse, x0, leaving, estimate=estimate)  # all max_iter evaluations under autocast
            verify = self.solve_dtype is not None and autocast is not None
            return solver.solve(fine, x0, leaving, coarse=coarse, verify=verify, estimate=estimate)

    def finish(self, solution: FixedPointSolution, rejected: Tensor, inputs: tuple[Tensor, ...]) -> FixedPointSolution:
        """Continue in full precision with those of the rejected samples that only low precision has evaluated."""
        rows = (rejected & (solution.iterations == solution.coarse_iterations)).nonzero()[:, 0]
        if not len(rows):
            return solution
        assert solution.following is not None
        start, solver, spent = solution.following, self.solver, solution.iterations[rows]
        if isinstance(solver, FixedPointSolver):
            solver = replace(solver, max_iter=solver.max_iter - int(spent.max()))
        fine, leaving = self._prepared(None, inputs)
        if leaving:
            start, leaving = start[rows], tuple([i[rows] for i in leaving])
        with self._held_still(start.device):
            found = solver.solve(fine, start, leaving)
        own = slice(None) if leaving else rows
        return solution.replaced(
            rows,
            value=found.value[own],
            residual=found.residual[own],
            iterations=found.iterations[own] + spent,
            status=found.status[own],
        )

    def _prepared(
        self, dtype: torch.dtype | None, inputs: tuple[Tensor, ...], whole: Tensor | None = None
    ) -> tuple[Layer, tuple[Tensor, ...]]:
        """The prepared layer and the inputs to pass to it; if the batch stays whole, the layer holds them instead.

        Solves of a batch like ``whole`` may be captured.
        """
        prepare = partial(prepared, self.implicit.layer, dtype, tol=self.solver.tol, compiled=self.compiled)
        inputs = tuple([i.detach() for i in inputs])
        if self.captured and whole is not None and self.implicit.module is not None:
            if whole.is_cuda:
                key = getattr(self.implicit.layer, "__func__", None), dtype
                return CapturedLayer(prepare, self.implicit.module, len(whole), key), inputs
            graphs.note(f"x0 is on {whole.device}")
        layer = prepare(given=self.implicit.convolutions)
        return ((lambda x: layer(x, *inputs)), ()) if self.implicit.stays_whole else (layer, inputs)

    @contextmanager
    def _held_still(self, device: torch.device) -> Iterator[None]:
        modules, weights = self.implicit.modules, self.implicit.weights
        with frozen(modules), precision_for(self.solver.tol, device), materialised_weights(modules, weights):
            yield
        torch.clear_autocast_cache()  # else torch up to 2.12 reuses the solve's casts, which have no gradient


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the caller's autocast on x's device, or None."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def check_capturable(implicit: ImplicitLayer, solver: FixedPointSolver, compiled: bool) -> None:
    """Raise ValueError for what ``cuda_graph`` does not take."""
    if implicit.module is None:
        raise ValueError("layer is a function, whose numbers may change; cuda_graph takes a module or a method of one")
    if not isinstance(solver, Anderson):
        raise ValueError(f"solver is {solver}; cuda_graph takes Anderson")
    if compiled:
        raise ValueError("compile_solve is True; cuda_graph takes False")
    if implicit.stays_whole:
        raise ValueError(
            "layer has an operator that may hold data of each sample; cuda_graph takes a SeparableBlur or a Blur"
        )
