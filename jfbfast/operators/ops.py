"""The separable blur as torch.library ops: schema, implementation, fake kernel, autograd and vmap of each.

``jfbfast::blur``          A x, or Aᵀ x
``jfbfast::gradient``      g = Aᵀ(A x − d) + r, or with a step size η the gradient step x − ηg
``jfbfast::tikhonov``      (AᵀA + λI)⁻¹ b
``jfbfast::change_basis``  V* x in the basis where AᵀA is diagonal, (…, W, H), or V x; float32 for half precision

Each takes images (…, H, W) and the two filters with their padding mode, and returns a contiguous tensor. At each
call `dispatch.kernels` decides which module computes it. The convolution's ops are in jfbfast/backends/conv3x3.py.

With the padding mode "valid", A x and d are smaller than x. The kernels blur images into images of the same shape, so
A x is cut to its frame here, and the argument of Aᵀ gets a margin of zeros. Their gradient takes d as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from jfbfast.backends.dispatch import DTYPES, check_reverse_mode, kernels
from jfbfast.backends.tensors import compute_dtype, padded
from jfbfast.backends.tracing import observed
from jfbfast.operators import frame, inverse
from jfbfast.operators.tables import Taps, bands

Filter = Sequence[float]

# torch.compile must not put what a first call caches (tables, factors) into the memory pool of a CUDA graph.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_FILTERS = "float[] taps_y, float[] taps_x, str padding_mode"
for _name, _arguments in (
    ("blur", f"Tensor x, {_FILTERS}, bool adjoint=False"),
    ("gradient", f"Tensor x, Tensor? d, Tensor? r, Tensor? step_size, {_FILTERS}"),
    ("tikhonov", f"Tensor b, Tensor damping, {_FILTERS}"),
    ("change_basis", f"Tensor x, bool back, {_FILTERS}"),
):
    torch.library.define(f"jfbfast::{_name}", f"({_arguments}) -> Tensor", tags=_TAGS)

blur = torch.ops.jfbfast.blur
gradient = torch.ops.jfbfast.gradient
tikhonov = torch.ops.jfbfast.tikhonov
change_basis = torch.ops.jfbfast.change_basis


def _check(name: str, x: Tensor) -> None:
    """Raise ValueError unless x, called ``name``, is images."""
    check_reverse_mode()
    if x.dim() < 2 or x.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}; it takes float64, float32, bfloat16 or float16 "
            "images (…, H, W)"
        )


def _check_like(x: Tensor, name: str, other: Tensor | None, margin: tuple[int, int] = (0, 0)) -> None:
    """Raise ValueError unless ``other`` is None, or has the dtype and the device of x, and its shape without margin."""
    if other is None:
        return
    shape = frame.inner_shape(x.shape, margin)
    if other.shape != shape or other.dtype != x.dtype or other.device != x.device:
        of = "what x is" if margin == (0, 0) else f"a measurement of x {tuple(x.shape)} by padding_mode='valid'"
        raise ValueError(
            f"{name} is {other.dtype} of shape {tuple(other.shape)} on {other.device}; it takes {of}: "
            f"{x.dtype} of shape {shape} on {x.device}"
        )


@torch.library.impl("jfbfast::blur", "default")
def _blur(x: Tensor, taps_y: Filter, taps_x: Filter, padding_mode: str, adjoint: bool = False) -> Tensor:
    _check("x", x)
    taps = Taps(tuple(taps_y), tuple(taps_x), padding_mode)
    x = padded(x, taps.margin) if adjoint else x
    tables = bands(taps, x.shape[-2:], x.dtype, x.device, adjoint)
    out = kernels(x.device, "blur", radius=max(len(taps_y), len(taps_x)) // 2).blur(x, tables)
    return (out if adjoint else frame.cut(out, taps.margin)).contiguous()


@torch.library.impl("jfbfast::gradient", "default")
def _gradient(
    x: Tensor, d: Tensor | None, r: Tensor | None, step_size: Tensor | None, taps_y: Filter, taps_x: Filter, mode: str
) -> Tensor:
    _check("x", x)
    taps = Taps(tuple(taps_y), tuple(taps_x), mode)
    forward = bands(taps, x.shape[-2:], x.dtype, x.device, False)
    adjoint = bands(taps, x.shape[-2:], x.dtype, x.device, True)
    _check_like(x, "d", d, taps.margin)
    _check_like(x, "r", r)
    if step_size is not None and step_size.dim():
        raise ValueError(f"step_size has shape {tuple(step_size.shape)}; it takes a number or a tensor of shape ()")
    module = kernels(x.device, "blur", radius=max(len(taps_y), len(taps_x)) // 2)
    return module.gradient(x, d, r, forward, adjoint, step_size).contiguous()


@torch.library.impl("jfbfast::tikhonov", "default")
def _tikhonov(b: Tensor, damping: Tensor, taps_y: Filter, taps_x: Filter, padding_mode: str) -> Tensor:
    _check("b", b)
    return inverse.tikhonov(b, damping, Taps(tuple(taps_y), tuple(taps_x), padding_mode)).contiguous()


@torch.library.impl("jfbfast::change_basis", "default")
def _change_basis(x: Tensor, back: bool, taps_y: Filter, taps_x: Filter, padding_mode: str) -> Tensor:
    _check("x", x)
    return inverse.change_basis(x, Taps(tuple(taps_y), tuple(taps_x), padding_mode), back).contiguous()


@torch.library.register_fake("jfbfast::change_basis")
def _like_coefficients(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x.mT, dtype=compute_dtype(x.dtype), memory_format=torch.contiguous_format)


@torch.library.register_fake("jfbfast::blur")
def _like_blurred(x: Tensor, taps_y: Filter, taps_x: Filter, padding_mode: str, adjoint: bool = False) -> Tensor:
    margin = Taps(tuple(taps_y), tuple(taps_x), padding_mode).margin
    return _like_first(padded(x, margin) if adjoint else frame.cut(x, margin))


@torch.library.register_fake("jfbfast::gradient")
@torch.library.register_fake("jfbfast::tikhonov")
def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def changed_basis(x: Tensor, back: bool, taps: Taps) -> Tensor:
    """``jfbfast::change_basis``, by as few calls as possible."""
    if observed(x):
        found: Tensor = change_basis(x, back, *taps)
        return found
    return inverse.change_basis(x, taps, back)


def _keep_blur(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.filters, ctx.adjoint = inputs


def _blur_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return blur(g, *ctx.filters, not ctx.adjoint), None, None, None, None


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, d, r, step_size, *ctx.filters = inputs
    ctx.save_for_backward(*((x, d, r) if ctx.needs_input_grad[3] else (None, None, None)), step_size)


def _gradient_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, d, r, step_size = ctx.saved_tensors
    to_x, to_d, to_r, to_step_size, *_ = ctx.needs_input_grad
    weight = 1 if step_size is None else -step_size  # the factor of Aᵀ(A x − d) + r in the output
    return (
        gradient(g, None, None, step_size, *ctx.filters) if to_x else None,
        (-weight * blur(g, *ctx.filters)).to(g.dtype) if to_d else None,
        (weight * g).to(g.dtype) if to_r else None,
        inverse.scalar_gradient(g, gradient(x, d, r, None, *ctx.filters), step_size) if to_step_size else None,
        *(None, None, None),
    )


def _keep_tikhonov(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, damping, *ctx.filters = inputs
    ctx.save_for_backward(damping, output if ctx.needs_input_grad[1] else None)


def _tikhonov_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    damping, x = ctx.saved_tensors
    u = tikhonov(g, damping, *ctx.filters)
    return u, inverse.scalar_gradient(u, x, damping) if ctx.needs_input_grad[1] else None, None, None, None


def _keep_change(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.back, *ctx.filters = inputs
    ctx.dtype = x.dtype


def _change_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return change_basis(g, not ctx.back, *ctx.filters).to(ctx.dtype), None, None, None, None


torch.library.register_autograd("jfbfast::change_basis", _change_backward, setup_context=_keep_change)
torch.library.register_autograd("jfbfast::blur", _blur_backward, setup_context=_keep_blur)
torch.library.register_autograd("jfbfast::gradient", _gradient_backward, setup_context=_keep_gradient)
torch.library.register_autograd("jfbfast::tikhonov", _tikhonov_backward, setup_context=_keep_tikhonov)


def _to_front(info: Any, tensor: Any, dim: int | None) -> Any:
    """Move the batch dimension to the front; expand a tensor that has none."""
    if tensor is None:
        return None
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


@torch.library.register_vmap("jfbfast::blur")
def _blur_vmap(info: Any, dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return blur(_to_front(info, x, dims[0]), *rest), 0


@torch.library.register_vmap("jfbfast::change_basis")
def _change_vmap(info: Any, dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return change_basis(_to_front(info, x, dims[0]), *rest), 0


@torch.library.register_vmap("jfbfast::gradient")
def _gradient_vmap(
    info: Any, dims: Any, x: Tensor, d: Any, r: Any, step_size: Any, *filters: Any
) -> tuple[Tensor, int]:
    x, d, r = (_to_front(info, image, dim) for image, dim in zip((x, d, r), dims[:3], strict=True))
    if dims[3] is None:
        return gradient(x, d, r, step_size, *filters), 0
    step_size = step_size.reshape(-1, *[1] * (x.dim() - 1))
    return (x - step_size * gradient(x, d, r, None, *filters)).to(x.dtype), 0


@torch.library.register_vmap("jfbfast::tikhonov")
def _tikhonov_vmap(info: Any, dims: Any, b: Tensor, damping: Tensor, *filters: Any) -> tuple[Tensor, int]:
    b = _to_front(info, b, dims[0])
    if dims[1] is not None:
        damping = damping.movedim(dims[1], 0)
        damping = damping.reshape(len(damping), *[1] * (b.dim() - damping.dim()), *damping.shape[1:])
    return tikhonov(b, damping, *filters), 0


@register_flop_formula(blur)
def _blur_flops(
    x: Sequence[int], taps_y: Filter, taps_x: Filter, padding_mode: str, adjoint: bool = False, **_: Any
) -> int:
    """The two passes over images of the larger shape, those on the side of x."""
    y, x_ = Taps(tuple(taps_y), tuple(taps_x), padding_mode).margin if adjoint else (0, 0)
    *planes, height, width = x
    return 2 * math.prod(planes) * (height + 2 * y) * (width + 2 * x_) * (len(taps_y) + len(taps_x))


@register_flop_formula(gradient)
def _gradient_flops(x: Sequence[int], d: Any, r: Any, step_size: Any, *filters: Any, **__: Any) -> int:
    """A and Aᵀ."""
    return 2 * math.prod(x) * sum(map(len, filters[:2])) * 2


@register_flop_formula(change_basis)
def _change_flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    """The two products with the singular vectors."""
    return 2 * math.prod(x) * (x[-2] + x[-1])


@register_flop_formula(tikhonov)
def _tikhonov_flops(b: Sequence[int], *_: Any, **__: Any) -> int:
    """The four products with the singular vectors."""
    return 4 * math.prod(b) * (b[-2] + b[-1])
