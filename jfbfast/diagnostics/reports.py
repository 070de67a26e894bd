"""`report`: measure a model; the result has a verdict on each figure, and draws a picture."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jfbfast.diagnostics.conditioning import (
    agreement_of,
    exact_method,
    jfb_condition,
    lipschitz_bound,
    trained_parameters,
)
from jfbfast.diagnostics.history import Problem, check_truth, history_of, problem
from jfbfast.diagnostics.measurements import Measurements
from jfbfast.diagnostics.verdicts import rows
from jfbfast.implicit.fixed_point import solve_fixed_point
from jfbfast.implicit.frozen import frozen, owner
from jfbfast.models.degrad import DEGrad
from jfbfast.models.implicit_network import ImplicitNetwork
from jfbfast.operators.frame import cut
from jfbfast.solvers import ConvergenceWarning, FixedPointSolver
from jfbfast.spectrum import operator_norm, ritz_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


class Report(Measurements):
    """What `report` measured, as text (by print), a table or a picture; its attributes are those of `Measurements`.

    Example:
        >>> import torch, jfbfast
        >>> x0 = torch.zeros(1, 4)
        >>> measured = jfbfast.diagnostics.report(lambda x: x / 2 + 1, x0=x0, iterations=20)
        >>> measured.contraction_factor, measured.solution.status.tolist()
        (tensor([0.5000], dtype=torch.float64), [0])
        >>> figure = measured.plot("report.png")
    """

    def __repr__(self) -> str:
        """The table as text, instead of all tensors."""
        lines = [("", "median", "worst", "verdict on the worst"), *rows(self)]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {median:>{widths[1]}}  {worst:>{widths[2]}}  {verdict}"
            for name, median, worst, verdict in lines
        )

    def table(self) -> Table:
        """A table of rich: the median and the worst sample of each figure, and a verdict on the worst."""
        from rich.table import Column, Table

        table = Table(
            Column(overflow="fold"),
            Column("median", justify="right", overflow="fold"),
            Column("worst", justify="right", overflow="fold"),
            Column("verdict on the worst", overflow="fold"),
            title=f"{len(self.contraction_factor)} samples at their fixed points",
            title_justify="left",
        )
        for row in rows(self):
            table.add_row(*row)
        return table

    def plot(self, path: str | Path | None = None) -> Figure:
        """A matplotlib figure of the residuals, the quality, the eigenvalues and the cosines; saved if given a path."""
        from jfbfast.diagnostics.plots import diagnosis  # takes matplotlib, which is optional

        figure = diagnosis(self)
        if path is not None:
            figure.savefig(path, dpi=140)
        return figure


def report(
    model: ImplicitNetwork | Callable[..., Any],
    d: Any = None,
    x: Tensor | None = None,
    *,
    x0: Any = None,
    inputs: Sequence[Any] = (),
    solver: FixedPointSolver | None = None,
    iterations: int = 300,
    steps: int = 60,
    seed: int = 0,
) -> Report:
    """Measure how well conditioned a model is on a few samples, without changing it.

    Everything is measured at the fixed point x*, the best iterate of the model's solver with tol = 0. Samples of
    64 × 64 pixels take minutes on a CPU; small crops and few samples tell as much.

    If all parameters are frozen, gradients are taken for every parameter. A layer that is neither a module nor a
    module's method has no gradients to compare. If averaging still has to be estimated, the report estimates it for
    itself.

    Args:
        model, d, x0, inputs, solver: as in `convergence_history`.
        x: the true images in [−1, 1], with the shape of the fixed points; None for a state that is not one real
            tensor. They give the quality, and the gradients
            are those of ℓ = ½‖T(x*) − x‖² within the frame of d. Without them they are for a random cotangent.
        iterations: number of evaluations in the history.
        steps: number of Arnoldi steps for the eigenvalues, each a vector-Jacobian product.
        seed: of the random cotangent.

    Raises:
        TypeError: ``model`` is neither a DE-GRAD nor a layer, or gets the other one's arguments.
        ValueError: x has another shape than the fixed points; ``iterations`` or ``steps`` is below 1.

    Example:
        >>> import torch, jfbfast
        >>> red = jfbfast.RED(lambda x: -0.8 * x, weight=1.0)
        >>> model = jfbfast.DEGrad(jfbfast.GaussianBlur(sigma=0.1), red, preconditioner="exact")
        >>> d = torch.rand(2, 1, 8, 8)
        >>> jfbfast.diagnostics.report(model, d, iterations=20).contraction_factor  # T(x) = (d − 0.8x)/2
        tensor([0.4000, 0.4000], dtype=torch.float64)
    """

    def owned(state: Any) -> Any:  # autograd refuses tensors that were made under inference_mode
        return pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, state)

    with torch.inference_mode(False), warnings.catch_warnings():
        d, x, x0 = owned(d), owned(x), owned(x0)
        inputs = inputs if isinstance(inputs, Tensor) else [owned(value) for value in inputs]
        warnings.simplefilter("ignore", ConvergenceWarning)
        posed = problem(model, d, x0, inputs, solver)
        check_truth(posed, x)
        if x is not None and x.shape != posed.start.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; it takes that of x0, {tuple(posed.start.shape)}")
        module = owner(posed.layer)
        if module is not None and not trained_parameters(posed.layer):
            posed = posed._replace(layer=copy.deepcopy(posed.layer))
            module = owner(posed.layer)
            assert module is not None
            module.requires_grad_()
        with frozen(module):
            return _measured(posed, x, iterations, steps, seed)


def _measured(posed: Problem, x: Tensor | None, iterations: int, steps: int, seed: int) -> Report:
    layer, inputs, module = posed.layer, posed.inputs, owner(posed.layer)
    with torch.no_grad():
        _, solution = solve_fixed_point(
            layer, posed.start, inputs=inputs, solver=posed.solver, solve_dtype=posed.solve_dtype
        )
    history = history_of(posed, x, iterations)
    value = history.solution.value
    if x is None:
        random = torch.Generator().manual_seed(seed)
        cotangent = torch.randn(value.shape, generator=random, dtype=value.dtype).to(value.device)
    else:
        state = layer(value.detach(), *inputs).detach().requires_grad_()
        with torch.enable_grad():
            image = posed.images(state)
            loss = cut(image - x, posed.margin).square().sum() / 2
        (cotangent,) = torch.autograd.grad(loss, state)
    trained = bool(trained_parameters(layer))
    cosine, ratio = agreement_of(posed, value, cotangent, exact_method(value.dtype)) if trained else ({}, {})
    eigenvalues = ritz_values(layer, value, inputs, steps)
    figures = {
        "contraction_factor": eigenvalues.abs().amax(1),
        "operator_norm": operator_norm(layer, value, inputs),
        "ritz_values": eigenvalues,
        "lipschitz_bound": lipschitz_bound(module, value, *inputs) if isinstance(module, DEGrad) else None,
        "jfb_condition": jfb_condition(layer, value, inputs) if trained else None,
        "cosine": cosine,
        "norm_ratio": ratio,
        "solution": posed.packed.of_states(solution),
        "history": posed.in_states(history),
    }
    on_cpu = pytree.tree_map(lambda found: found.cpu() if isinstance(found, Tensor) else found, figures)
    return Report(**on_cpu, tol=posed.solver.tol)
