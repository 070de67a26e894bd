"""Is an implicit network well conditioned, and does its gradient method suit it? `report` measures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jfbfast.diagnostics.history import History, Problem, convergence_history, history_of, problem
from jfbfast.diagnostics.verdicts import rows
from jfbfast.implicit.fixed_point import solve_fixed_point
from jfbfast.implicit.frozen import fixed_map, owner
from jfbfast.implicit.jacobian import Linearisation
from jfbfast.implicit.methods import GRADIENTS, GradientMethod, Implicit
from jfbfast.models.degrad import DEGrad
from jfbfast.models.denoisers import RED
from jfbfast.operators.iterative import holds_samples
from jfbfast.solvers import ConvergenceWarning, FixedPointSolution, FixedPointSolver, Layer, Picard
from jfbfast.spectrum import operator_norm, ritz_values, symmetric_ritz_values

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Report",
    "convergence_history",
    "gradient_agreement",
    "jfb_condition",
    "lipschitz_bound",
    "report",
]


@dataclass(frozen=True)
class Report:
    """What `report` measured, for a batch of B samples; on the CPU, in the order of the batch.

    Attributes:
        contraction_factor: γ, the spectral radius of ∂T/∂x at x*, (B,).
        operator_norm: ‖∂T/∂x‖₂ at x*, (B,).
        ritz_values: of ∂T/∂x at x*, (B, k), complex.
        lipschitz_bound: on γ, (B,); None for a layer that has none.
        jfb_condition: the lower bound on κ(MᵀM), (B,); None without parameters.
        cosine, norm_ratio: of each gradient method's gradient to the exact one, (B,) by name; empty without parameters.
        solution: of the model's own solve, at its own tolerance.
        history: of its solver run on with tol = 0.
        tol: of its solver.
    """

    contraction_factor: Tensor
    operator_norm: Tensor
    ritz_values: Tensor
    lipschitz_bound: Tensor | None
    jfb_condition: Tensor | None
    cosine: dict[str, Tensor]
    norm_ratio: dict[str, Tensor]
    solution: FixedPointSolution
    history: History
    tol: float

    def table(self) -> Table:
        """The report as a table of rich: median and worst sample of each figure, and what the worst means."""
        from rich.table import Table

        table = Table(title=f"{len(self.contraction_factor)} samples at their fixed points", title_justify="left")
        for header, justify in (
            ("", "left"),
            ("median", "right"),
            ("worst", "right"),
            ("verdict on the worst", "left"),
        ):
            table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for name, values, worst, form, verdict in rows(self):
            finite = values[~values.isnan()].double()
            cells = [form.format(float(f(finite))) if finite.numel() else "–" for f in (torch.median, worst)]
            table.add_row(name, *cells, verdict)
        return table

    def plot(self, path: str | Path) -> None:
        """Save the report as a picture: residuals, quality, eigenvalues, cosines."""
        from jfbfast.diagnostics.plots import diagnosis

        diagnosis(self, path)


def lipschitz_bound(model: DEGrad, x: Tensor, d: Tensor) -> Tensor | None:
    """The bound λ/(√λ + √δ)² · ‖∂D‖₂ on the contraction factor of a filtered, preconditioned model at x.

    ∂T/∂x = λP ∂D W has the eigenvalues of ∂D · λWP, ∂D by the image W x that D sees, and the symmetric
    λWP, a function of AᵀA, has the norm max λs/((s + δ)(s + λ)) over s ≥ 0. ‖∂D‖₂ is measured there. With
    averaging α it is 1 − α + α times that.

    Args:
        model: a DE-GRAD.
        x, d: where, (B, C, H, W); d counts where R has an injection.

    Returns:
        (B,), or None where the model is not filtered and preconditioned, with R's weight λ as damping.
    """
    red = model.regularizer
    if model.preconditioner is None or model.log_damping is not None or not isinstance(red, RED) or not red.filtered:
        return None
    with torch.no_grad():
        weight, damping = red.weight, red.filter_damping
        assert damping is not None
        lipschitz = operator_norm(red.denoise, model.blur.filter(x, damping), red.injected(model.blur, d))
        factor = weight / (weight.sqrt() + damping.sqrt()) ** 2 * lipschitz
        alpha = model.averaging.nan_to_num(1.0) if isinstance(model.averaging, Tensor) else model.averaging
        return 1 - alpha + alpha * factor


def jfb_condition(model: DEGrad, x: Tensor, d: Tensor, steps: int = 30) -> Tensor:
    """A lower bound on the condition number of MᵀM, M = (∂T/∂Θ)ᵀ, of each sample at x, (B,).

    JFB's gradient is known to descend where M has full column rank and κ(MᵀM) < 1/γ (Fung et al.,
    2022; Liu, Tong and Zhao, 2024). Ritz values of MᵀM = (∂T/∂Θ)(∂T/∂Θ)ᵀ lie between its extreme
    eigenvalues, so the largest over the smallest, to which its rounding error is added, is at most
    κ. Infinite where Θ has fewer numbers than a sample, since M then has no full column rank.

    Args:
        model: a DE-GRAD.
        x, d: where, (B, C, H, W).
        steps: of Lanczos' method, of two products each.
    """
    return _condition(model.layer, x, (d,), steps)


def _parameters(layer: Layer) -> list[Tensor]:
    """Of the layer's module, those that require a gradient."""
    module = owner(layer)
    return [] if module is None else [p for p in module.parameters() if p.requires_grad]


def _condition(layer: Layer, x: Tensor, inputs: tuple[Tensor, ...], steps: int = 30) -> Tensor:
    parameters = _parameters(layer)
    n = x[:1].numel()
    if sum(p.numel() for p in parameters) < n:
        return torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
    bounds = []
    module = owner(layer)
    whole_batch = holds_samples(module)
    with fixed_map(module):
        for i in range(len(x)):  # the samples share Θ
            rows = slice(i, i + 1)
            evaluated, own = (slice(None), rows) if whole_batch else (rows, slice(None))
            with torch.enable_grad():
                out = layer(x[evaluated].detach(), *(value[evaluated].detach() for value in inputs))[own]
                jacobian = Linearisation(out, parameters)

            def normal(w: Tensor, jacobian: Linearisation = jacobian, rows: slice = rows) -> Tensor:
                return jacobian.jvp(jacobian.vjp(w.view_as(x[rows]))).flatten(1)

            values = symmetric_ritz_values(normal, x[rows].flatten(1), steps)[0]
            rounding = torch.finfo(x.dtype).eps * n * values[-1]
            bounds.append(values[-1] / (values[0].clamp_min(0) + rounding))
    return torch.stack(bounds).to(x.dtype) if bounds else x.new_zeros(0)


def gradient_agreement(
    model: DEGrad, d: Tensor, value: Tensor, cotangent: Tensor, exact: GradientMethod
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Cosine and norm ratio, over all parameters, of each method's gradient to the exact implicit one.

    Each method of `GRADIENTS`, with its defaults, is run as in training: from the model's own start by its own
    solver; one that asks for an estimate which that solver does not make is left out. The exact gradient is
    taken at ``value``. Sample by sample, since each has a gradient of its own.

    Args:
        model: a DE-GRAD.
        d: the measurements, (B, C, H, W).
        value: the fixed points x*, to as high a precision as there is.
        cotangent: ∂ℓ/∂T(x*), like x*.
        exact: the method that solves for the exact gradient.

    Returns:
        By name of the method, (B,) each; NaN where a gradient is zero or not finite.
    """
    return _agreement(problem(model, d, None, (), None), value, cotangent, exact)


def _agreement(
    posed: Problem, value: Tensor, cotangent: Tensor, exact: GradientMethod
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters, whole_batch = _parameters(posed.layer), holds_samples(owner(posed.layer))

    def gradient(i: int, x0: Tensor, solver: FixedPointSolver, method: str | GradientMethod) -> Tensor:
        rows = slice(None) if whole_batch else slice(i, i + 1)
        of_sample = torch.zeros_like(cotangent)
        of_sample[i] = cotangent[i]
        with torch.enable_grad():
            out, _ = solve_fixed_point(
                posed.layer,
                x0[rows],
                inputs=tuple(v[rows] for v in posed.inputs),
                solver=solver,
                gradient=method,
                solve_dtype=None if method is exact else posed.solve_dtype,
            )
            found = torch.autograd.grad(out, parameters, of_sample[rows], allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found]).double()

    estimates = getattr(posed.solver, "estimates_inverse", True)
    names = [name for name, method in GRADIENTS.items() if estimates or method.needs != "inverse"]
    cosine = {name: value.new_full((len(value),), torch.nan) for name in names}
    ratio = {name: column.clone() for name, column in cosine.items()}
    at_value = Picard(tol=0, max_iter=1)  # one evaluation: it stays where it starts
    with fixed_map(owner(posed.layer)):
        for i in range(len(value)):
            reference = gradient(i, value, at_value, exact)
            for name in names:
                found = gradient(i, posed.start, posed.solver, name)
                ratio[name][i] = found.norm() / reference.norm()
                cosine[name][i] = found @ reference / (found.norm() * reference.norm())
    return cosine, ratio


def report(
    model: DEGrad | Callable[..., Tensor],
    d: Tensor | None = None,
    x: Tensor | None = None,
    *,
    x0: Tensor | None = None,
    inputs: Sequence[Tensor] = (),
    solver: FixedPointSolver | None = None,
    iterations: int = 300,
    steps: int = 60,
    seed: int = 0,
) -> Report:
    """Measure the conditioning of a model on a few samples; it stays as it is.

        report(model, d, x)  # a DEGrad
        report(layer, x0=x0, inputs=(d,), solver=jfbfast.Anderson())  # the layer T(x, d) of any implicit network

    An averaging that is to be estimated is estimated on d, for the report alone.

    The point x* is the best iterate of the solver run on with tol = 0. Minutes for samples
    of 64 × 64 on a CPU: small crops and few samples tell as much. Of a module of which no parameter requires a
    gradient, the gradients are those of all its parameters; of a layer that is no module, nor a method of one, there
    are none.

    Args:
        model, d, x0, inputs, solver: as in `convergence_history`.
        x: the truth, like the fixed points, in [−1, 1], for quality and for gradients of ℓ = ½‖T(x*) − x‖²; without it
            the gradients are those of a random cotangent.
        iterations: evaluations of the history.
        steps: of Arnoldi's method, vector-Jacobian products.
        seed: of the random cotangent.

    Raises:
        TypeError: neither a DE-GRAD nor a layer, or one with the other's arguments.
        ValueError: x of another shape than the fixed points; ``iterations`` or ``steps`` below 1.
    """
    with torch.inference_mode(False), warnings.catch_warnings():
        d, x, x0 = (value.clone() if isinstance(value, Tensor) else value for value in (d, x, x0))
        if not isinstance(inputs, Tensor):  # autograd takes none that was made under inference_mode
            inputs = [v.clone() if isinstance(v, Tensor) else v for v in inputs]
        warnings.simplefilter("ignore", ConvergenceWarning)
        posed = problem(model, d, x0, inputs, solver)
        if isinstance(x, Tensor) and x.shape != posed.start.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; it takes that of x0, {tuple(posed.start.shape)}")
        module = owner(posed.layer)
        if module is not None and not any(p.requires_grad for p in module.parameters()):
            posed = posed._replace(layer=copy.deepcopy(posed.layer))
            module = owner(posed.layer)
            assert module is not None
            module.requires_grad_()
        with fixed_map(module):
            return _to_cpu(_measured(posed, x, iterations, steps, seed))


def _measured(posed: Problem, x: Tensor | None, iterations: int, steps: int, seed: int) -> Report:
    layer, inputs = posed.layer, posed.inputs
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
        with torch.no_grad():
            cotangent = layer(value, *inputs) - x
    trained = bool(_parameters(layer))
    exact = Implicit(tol=10 * torch.finfo(value.dtype).eps, max_iter=200)
    cosine, ratio = _agreement(posed, value, cotangent, exact) if trained else ({}, {})
    values, module = ritz_values(layer, value, inputs, steps), owner(layer)
    return Report(
        contraction_factor=values.abs().amax(1),
        operator_norm=operator_norm(layer, value, inputs),
        ritz_values=values,
        lipschitz_bound=lipschitz_bound(module, value, *inputs) if isinstance(module, DEGrad) else None,
        jfb_condition=_condition(layer, value, inputs) if trained else None,
        cosine=cosine,
        norm_ratio=ratio,
        solution=solution,
        history=history,
        tol=posed.solver.tol,
    )


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: item.cpu() for name, item in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(_to_cpu, value))
    if isinstance(value, Report):
        return Report(**{name: _to_cpu(item) for name, item in vars(value).items()})
    return value
