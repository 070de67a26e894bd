"""A penalty on the layer's Jacobian, which trains an implicit network to contract."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.reference import flat, per_sample
from jfbfast.implicit.frozen import frozen, owner
from jfbfast.models.degrad import DEGrad
from jfbfast.operators.blur import SeparableBlur
from jfbfast.operators.iterative import holds_samples
from jfbfast.solvers import Layer, Status


def _unit(v: Tensor) -> Tensor:
    return F.normalize(flat(v), dim=1).view_as(v)


def _fits(layer: DEGrad | Layer, d: Tensor, x: Tensor) -> bool:
    """Whether x can be a solution for the measurements d; a blur keeps their shape, another operator the batch."""
    blur = isinstance(layer, DEGrad) and isinstance(layer.blur, SeparableBlur)
    return d.shape == x.shape if blur else len(d) == len(x)


def jacobian_penalty(
    layer: DEGrad | Layer, *inputs: Tensor, x: Tensor | None = None, bound: float = 0.7, iterations: int = 3
) -> Tensor:
    """The mean over samples of relu(‖vᵀ ∂T/∂x‖ − bound)², v a unit vector from power iterations v ← (∂T/∂x)ᵀ v.

    ‖vᵀ ∂T/∂x‖ tends to the contraction factor γ where one real eigenvalue dominates, and is at most
    ‖∂T/∂x‖₂ always. The random starts are drawn from torch's generator; v and x are constants of the
    gradient, which costs a differentiation of one vector-Jacobian product. A layer that does not depend on x
    has the Jacobian 0, and the penalty 0.

        restored = model(d)
        loss = F.mse_loss(restored, x) + 1e-4 * jfbfast.jacobian_penalty(model, d)

    Args:
        layer: a `DEGrad`, or a layer T(x, *inputs) as `fixed_point` takes it. It is held still, as in
            the gradient of a solve.
        inputs: of the layer, (B, …); the measurements d of a `DEGrad`.
        x: the point, (B, …); of a `DEGrad` by default the fixed point of its last forward, which must have been
            on these inputs. Samples that diverged there are left out, and so are those of which x or an input is
            not finite.
        bound: what ‖vᵀ ∂T/∂x‖ may be at no cost, at least 0.
        iterations: of the power method, at least 0.

    Returns:
        The penalty, a tensor of shape (), differentiable in the layer's parameters; 0 for no samples.

    Raises:
        ValueError: ``bound`` or ``iterations`` below 0; no ``x`` where the layer holds no solution of the shape that
            these inputs ask for; an input of another batch size than x.
        RuntimeError: under torch.inference_mode().
    """
    checks.non_negative("bound", bound)
    checks.integer("iterations", iterations, 0)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("jacobian_penalty differentiates, which torch.inference_mode() forbids; call it outside")
    usable = None
    if x is None:
        solution = layer.solution if isinstance(layer, DEGrad) else None
        if solution is None or not all(_fits(layer, value, solution.value) for value in inputs):
            raise ValueError(
                "x is None; it takes a tensor, or a DEGrad as layer whose last forward was on these inputs"
            )
        x, usable = solution.value, solution.status != Status.DIVERGED
    for i, value in enumerate(inputs):
        if len(value) != len(x):
            raise ValueError(f"inputs[{i}] has shape {tuple(value.shape)}; it takes the batch size of x, {len(x)}")
    for value in (x, *inputs):
        finite = flat(value.detach()).isfinite().all(1)
        usable = finite if usable is None else usable & finite
    assert usable is not None
    transform = layer.layer if isinstance(layer, DEGrad) else layer
    module = owner(transform)
    if holds_samples(module):  # the batch stays whole, with zeros in the place of what is left out
        x, *inputs_left = (value.masked_fill(~per_sample(usable, value), 0) for value in (x, *inputs))
    else:
        x, *inputs_left = (value[usable] for value in (x, *inputs))
        usable = usable.new_ones(len(x))  # all that are left are

    with frozen(module), torch.enable_grad():
        point = x.detach().requires_grad_()
        out = transform(point, *inputs_left).to(point.dtype) + 0 * point  # which depends on x in any case
        v = _unit(torch.randn_like(point))
        for _ in range(iterations):
            v = _unit(torch.autograd.grad(out, point, v, retain_graph=True)[0])
        (product,) = torch.autograd.grad(out, point, v, create_graph=True)
        if not product.requires_grad:  # a Jacobian that no parameter moves
            product = product + 0 * transform(x.detach(), *inputs_left).to(point.dtype)
    excess = F.relu(flat(product).norm(dim=1) - bound)[usable]
    return excess.square().sum() / max(len(excess), 1)
