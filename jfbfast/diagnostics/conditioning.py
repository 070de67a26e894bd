"""How well conditioned an implicit network is, and how close each gradient method comes to the exact gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jfbfast.diagnostics.history import Problem, problem
from jfbfast.implicit.fixed_point import solve_fixed_point
from jfbfast.implicit.frozen import frozen, owner
from jfbfast.implicit.jacobian import Linearisation
from jfbfast.implicit.methods import GRADIENTS, GradientMethod, Implicit
from jfbfast.implicit.states import packed
from jfbfast.models.degrad import DEGrad
from jfbfast.models.implicit_network import ImplicitNetwork
from jfbfast.models.red import RED
from jfbfast.models.universal import UniversalRED
from jfbfast.operators.iterative import may_hold_sample_data
from jfbfast.solvers import FixedPointSolver, Layer, Picard
from jfbfast.spectrum import operator_norm, symmetric_ritz_values


def lipschitz_bound(model: DEGrad, x: Tensor, d: Tensor) -> Tensor | None:
    """The bound λ/(√λ + √δ)² · ‖∂D‖₂ on the contraction factor of a filtered, preconditioned model at x.

    ∂T/∂x = λP ∂D W has the same eigenvalues as ∂D · λWP. Here ∂D is the Jacobian of the denoiser at its input W x,
    and its norm is measured. The symmetric matrix λWP is a function of AᵀA, and its norm is at most
    max λs/((s + δ)(s + λ)) over the eigenvalues s ≥ 0. With averaging α the bound is 1 − α + α times that product.

    Args:
        model: a DE-GRAD.
        x: the point, (B, C, H, W).
        d: the measurements, (B, C, H, W); they matter only to a denoiser with injection.

    Returns:
        (B,), or None if the model is not filtered and preconditioned, has a damping other than R's weight λ, or has a
        denoiser that also sees x itself, as a `UniversalDEGrad`.

    Example:
        >>> import torch, jfbfast
        >>> red = jfbfast.RED(lambda x: x / 2, weight=1.0, filter_damping="weight")
        >>> model = jfbfast.DEGrad(jfbfast.GaussianBlur(), red, preconditioner="exact")
        >>> x = torch.rand(2, 1, 8, 8)
        >>> jfbfast.diagnostics.lipschitz_bound(model, x, model.blur(x))
        tensor([0.1250, 0.1250], dtype=torch.float64)
    """
    red = model.regularizer
    if model.preconditioner is None or model.log_damping is not None:
        return None
    if not isinstance(red, RED) or not red.filtered or isinstance(red, UniversalRED):
        return None
    with torch.no_grad():
        weight, damping = red.weight, red.filter_damping
        assert damping is not None
        lipschitz = operator_norm(red.denoiser, model.blur.filter(x, damping), red.injected(model.blur, d))
        factor = weight / (weight.sqrt() + damping.sqrt()) ** 2 * lipschitz
        alpha = model.averaging.nan_to_num(1.0) if isinstance(model.averaging, Tensor) else model.averaging
        return 1 - alpha + alpha * factor


def trained_parameters(layer: Layer) -> list[Tensor]:
    """The parameters of the layer's module that require a gradient."""
    module = owner(layer)
    return [] if module is None else [p for p in module.parameters() if p.requires_grad]


def jfb_condition(
    model: ImplicitNetwork | Callable[..., Any], x: Any, d: Tensor | tuple[Any, ...], steps: int = 30
) -> Tensor:
    """A lower bound on the condition number κ(MᵀM) of each sample at x, with M = (∂T/∂Θ)ᵀ.

    JFB's gradient is known to descend where M has full column rank and κ(MᵀM) < 1/γ (Fung et al., 2022; Liu, Tong
    and Zhao, 2024). Lanczos' method gives Ritz values of MᵀM = (∂T/∂Θ)(∂T/∂Θ)ᵀ, which lie between its extreme
    eigenvalues. So the ratio of the largest to the smallest (plus its rounding error) is at most κ.

    Args:
        model: a DE-GRAD, or the layer ``T(x, *inputs)`` of any implicit network: a module or a module's method.
        x: the point, (B, …), or a state of any structure that `fixed_point` takes.
        d: the measurements, (B, C, H, W); for a layer the tuple of its inputs.
        steps: number of Lanczos steps; each takes two products.

    Returns:
        (B,); infinite if there are fewer parameters than numbers in a sample, since M then lacks full column rank.

    Example:
        >>> import torch, jfbfast
        >>> model = jfbfast.DEGrad(jfbfast.GaussianBlur(), jfbfast.DnCNN(channels=1, features=2, depth=2))
        >>> x = torch.rand(1, 1, 8, 8)
        >>> jfbfast.diagnostics.jfb_condition(model, x, model.blur(x))  # 38 parameters, 64 pixels
        tensor([inf])
    """
    layer = model.layer if isinstance(model, ImplicitNetwork) else model
    layer, x, inputs = packed(layer, x, (d,) if isinstance(d, Tensor) else d)[:3]
    parameters, module = trained_parameters(layer), owner(layer)
    n = x[:1].numel()
    if sum(p.numel() * (1 + p.is_complex()) for p in parameters) < n:
        return torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
    whole_batch = may_hold_sample_data(module)
    bounds = x.new_zeros(len(x))
    with frozen(module):
        for i in range(len(x)):  # one by one, since the samples share Θ
            sample = slice(i, i + 1)
            evaluated, own = (slice(None), sample) if whole_batch else (sample, slice(None))
            with torch.enable_grad():
                out = layer(x[evaluated].detach(), *(value[evaluated].detach() for value in inputs))[own]
                jacobian = Linearisation(out, parameters)

            def normal(w: Tensor, jacobian: Linearisation = jacobian, shape: torch.Size = out.shape) -> Tensor:
                return jacobian.jvp(jacobian.vjp(w.view(shape))).flatten(1)

            values = symmetric_ritz_values(normal, x[sample].flatten(1), steps)[0]
            rounding = torch.finfo(x.dtype).eps * n * values[-1]
            bounds[i] = values[-1] / (values[0].clamp_min(0) + rounding)
    return bounds


def gradient_agreement(
    model: ImplicitNetwork | Callable[..., Any],
    d: Any,
    value: Any,
    cotangent: Any,
    exact: GradientMethod | None = None,
    *,
    x0: Any = None,
    inputs: Sequence[Any] = (),
    solver: FixedPointSolver | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compare the gradient of every method with the exact implicit gradient, sample by sample, over all parameters.

    Each method runs as in training, with its defaults, from the model's own start and with its own solver. A method
    is left out if it needs an estimate of the inverse that the solver does not make. The exact gradient is taken at
    ``value``.

    Args:
        model, d, x0, inputs, solver: as in `convergence_history`. A layer is a module or a module's method.
        value: the fixed points x*, as precise as possible, (B, …), with the structure of x0.
        cotangent: ∂ℓ/∂T(x*), with the shape and structure of x*.
        exact: the method that solves for the exact gradient; None for `Implicit` to ten times the rounding of x*.

    Raises:
        TypeError: as `convergence_history`.
        ValueError: a model without parameters that require a gradient; a ``value`` or ``cotangent`` of another shape.

    Returns:
        The cosine to the exact gradient, and the ratio of the norms, as dictionaries from the method's name to a tensor
        (B,), which is NaN where a gradient is zero or not finite.

    Example:
        >>> import torch, jfbfast
        >>> denoiser = jfbfast.NonexpansiveDenoiser(channels=1, features=2, depth=2)
        >>> red = jfbfast.RED(denoiser, filter_damping="weight")
        >>> model = jfbfast.DEGrad(jfbfast.GaussianBlur(), red, preconditioner="exact")
        >>> d = torch.rand(1, 1, 8, 8)
        >>> x = model(d).detach()
        >>> cosine, _ = jfbfast.diagnostics.gradient_agreement(model, d, x, x - d, jfbfast.Implicit(tol=1e-6))
        >>> bool(cosine["jfb"] > 0.8)
        True
    """
    posed = problem(model, d, x0, inputs, solver)
    value, cotangent = (posed.packed.pack(v, name) for v, name in ((value, "value"), (cotangent, "cotangent")))
    for name, given in (("value", value), ("cotangent", cotangent)):
        if given.shape != posed.start.shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; it takes that of x0, {tuple(posed.start.shape)}")
    if not trained_parameters(posed.layer):
        raise ValueError(
            "model has no parameters that require a gradient; it takes a module or a module's method that has some"
        )
    return agreement_of(posed, value, cotangent, exact or exact_method(value.dtype))


def exact_method(dtype: torch.dtype) -> Implicit:
    """The method that solves for the exact gradient, to ten times the rounding of ``dtype``."""
    return Implicit(tol=10 * torch.finfo(dtype).eps, max_iter=200)


def agreement_of(
    posed: Problem, value: Tensor, cotangent: Tensor, exact: GradientMethod
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`gradient_agreement` of a `Problem`."""
    parameters, whole_batch = trained_parameters(posed.layer), may_hold_sample_data(owner(posed.layer))

    def gradient(i: int, x0: Tensor, solver: FixedPointSolver, method: str | GradientMethod) -> Tensor:
        rows = slice(None) if whole_batch else slice(i, i + 1)
        cotangent_of_sample = torch.zeros_like(cotangent)
        cotangent_of_sample[i] = cotangent[i]
        with torch.enable_grad():
            out, _ = solve_fixed_point(
                posed.layer,
                x0[rows],
                inputs=tuple(v[rows] for v in posed.inputs),
                solver=solver,
                gradient=method,
                solve_dtype=None if method is exact else posed.solve_dtype,
            )
            w = cotangent_of_sample[rows]
            # The graph of what an implicit network injects serves every method.
            found = torch.autograd.grad(out, parameters, w, True, allow_unused=True, materialize_grads=True)
        return torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in found]).double()

    estimates = getattr(posed.solver, "estimates_inverse", True)
    names = [name for name, method in GRADIENTS.items() if estimates or method.needs != "inverse"]
    cosine = {name: value.new_full((len(value),), torch.nan) for name in names}
    ratio = {name: column.clone() for name, column in cosine.items()}
    at_value = Picard(tol=0, max_iter=1)  # one evaluation: it stays where it starts
    with frozen(owner(posed.layer)):
        for i in range(len(value)):
            reference = gradient(i, value, at_value, exact)
            for name in names:
                found = gradient(i, posed.start, posed.solver, name)
                ratio[name][i] = found.norm() / reference.norm()
                cosine[name][i] = found @ reference / (found.norm() * reference.norm())
    return cosine, ratio
