"""A penalty on the layer's Jacobian, which trains an implicit network to contract."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.tensors import flat, per_sample
from jfbfast.implicit.frozen import frozen, owner
from jfbfast.models.implicit_network import ImplicitNetwork
from jfbfast.operators import frame
from jfbfast.operators.blur import SeparableBlur
from jfbfast.operators.convolution import Blur
from jfbfast.operators.iterative import may_hold_sample_data
from jfbfast.solvers import Layer, Status


def _unit(v: Tensor) -> Tensor:
    return F.normalize(flat(v), dim=1).view_as(v)


def _fits(layer: ImplicitNetwork | Layer, d: Tensor, x: Tensor) -> bool:
    """Whether x can be a solution for the measurements d: a blur tells d's shape, any operator only their number."""
    if isinstance(layer, ImplicitNetwork) and isinstance(layer.blur, (SeparableBlur, Blur)):
        return tuple(d.shape) == frame.inner_shape(x.shape, layer.blur.margin)
    return len(d) == len(x)


def jacobian_penalty(
    layer: ImplicitNetwork | Layer, *inputs: Tensor, x: Tensor | None = None, bound: float = 0.7, iterations: int = 3
) -> Tensor:
    """The mean over samples of relu(‖vᵀ ∂T/∂x‖ − bound)², with a unit vector v from power iterations v ← (∂T/∂x)ᵀ v.

    If one real eigenvalue of ∂T/∂x dominates, ‖vᵀ ∂T/∂x‖ tends to the contraction factor γ. It is never more than
    ‖∂T/∂x‖₂. The random starts come from torch's generator. The gradient treats v and x as constants; it costs the
    differentiation of one vector-Jacobian product. A layer that does not depend on x has the penalty 0.

    Args:
        layer: a `DEGrad` or another `ImplicitNetwork`, or a layer ``T(x, *inputs)`` as for `fixed_point`. It is
            evaluated in eval(), as in the gradient of a solve.
        inputs: of the layer, (B, …); for an `ImplicitNetwork` the measurements d.
        x: the point, (B, …). None takes the fixed points of an `ImplicitNetwork`'s last forward, which must have been
            on these inputs, and leaves out the samples that diverged in it. Samples with a value that is not finite,
            in x or in an input, are left out too.
        bound: ‖vᵀ ∂T/∂x‖ up to which the penalty is zero, at least 0.
        iterations: of the power method, at least 0.

    Returns:
        The penalty, a tensor of shape (), differentiable in the layer's parameters; 0 for no samples.

    Raises:
        ValueError: ``bound`` or ``iterations`` below 0; no ``x`` and no solution of the shape that these inputs need;
            an input with another batch size than x.
        RuntimeError: under torch.inference_mode().

    Example:
        >>> import torch, jfbfast
        >>> layer = lambda x, d: 0.9 * x + d  # ∂T/∂x = 0.9, which is 0.2 above the bound
        >>> x = torch.zeros(2, 4)
        >>> round(jfbfast.jacobian_penalty(layer, x, x=x, bound=0.7).item(), 4)
        0.04
    """
    checks.non_negative("bound", bound)
    checks.integer("iterations", iterations, 0)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("jacobian_penalty differentiates, which torch.inference_mode() forbids; call it outside")
    diverged = None
    if x is None:
        solution = layer.solution if isinstance(layer, ImplicitNetwork) else None
        if solution is None or not all(_fits(layer, value, solution.value) for value in inputs):
            raise ValueError(
                "x is None; it takes a tensor, or a DEGrad as layer whose last forward was on these inputs"
            )
        x, diverged = solution.value, solution.status == Status.DIVERGED
    if isinstance(layer, ImplicitNetwork):
        inputs = (*inputs, *layer._usable_injected(*inputs))
    for i, value in enumerate(inputs):
        if len(value) != len(x):
            raise ValueError(f"inputs[{i}] has shape {tuple(value.shape)}; it takes the batch size of x, {len(x)}")
    usable = torch.stack([flat(value.detach()).isfinite().all(1) for value in (x, *inputs)]).all(0)
    if diverged is not None:
        usable &= ~diverged
    transform = layer.layer if isinstance(layer, ImplicitNetwork) else layer
    module = owner(transform)
    if may_hold_sample_data(module):  # the batch stays whole; the samples that are left out become zeros
        x, *inputs_left = (value.masked_fill(~per_sample(usable, value), 0) for value in (x, *inputs))
    else:
        x, *inputs_left = (value[usable] for value in (x, *inputs))
        usable = usable[usable]

    with frozen(module), torch.enable_grad():
        point = x.detach().requires_grad_()
        out = transform(point, *inputs_left).to(point.dtype) + 0 * point  # so that it depends on x in any case
        v = _unit(torch.randn_like(point))
        for _ in range(iterations):
            v = _unit(torch.autograd.grad(out, point, v, retain_graph=True)[0])
        (product,) = torch.autograd.grad(out, point, v, create_graph=True)
        if not product.requires_grad:  # no parameter changes the Jacobian
            product = product + 0 * transform(x.detach(), *inputs_left).to(point.dtype)
    excess = F.relu(flat(product).norm(dim=1) - bound)[usable]
    return excess.square().sum() / max(len(excess), 1)
