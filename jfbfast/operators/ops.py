"""The operators as torch.library ops: schema, backend, fake kernel, autograd and vmap of each.

``jfbfast::blur``            A x, or Aᵀ x
``jfbfast::gradient``        Aᵀ(A x − d) + r
``jfbfast::gradient_step``   x − η(Aᵀ(A x − d) + r)
``jfbfast::solve``           (AᵀA + λI)⁻¹ b

Each takes images (…, H, W) and the two filters with their padding mode, and returns a contiguous tensor. Which
twin computes it is decided at each call, by `kernels`. The convolution's ops are in jfbfast/backends/conv3x3.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from jfbfast.backends import reference
from jfbfast.backends.dispatch import DTYPES, check_reverse_mode, kernels
from jfbfast.operators import inverse
from jfbfast.operators.tables import Taps, bands


def _kernels(x: Tensor, taps: Taps) -> ModuleType:
    return kernels(x.device, "blur", radius=max(len(taps.y), len(taps.x)) // 2)


def _check(**images: Tensor | None) -> None:
    """Images of one shape, dtype and device; the first sets what the others must be."""
    check_reverse_mode()
    (first, x), *others = images.items()
    assert x is not None
    if x.dim() < 2 or x.dtype not in DTYPES:
        raise ValueError(
            f"{first} is {x.dtype} of shape {tuple(x.shape)}; it takes float64, float32, bfloat16 or float16 "
            "images (…, H, W)"
        )
    for name, y in others:
        if y is not None and (y.shape != x.shape or y.dtype != x.dtype or y.device != x.device):
            raise ValueError(
                f"{name} is {y.dtype} of shape {tuple(y.shape)} on {y.device}; it takes what {first} is: "
                f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )


def _tables(x: Tensor, taps: Taps, adjoint: bool) -> reference.Bands:
    return bands(taps, (x.shape[-2], x.shape[-1]), x.dtype, x.device, adjoint)


# What a first call caches (tables, factors) must not lie in the memory of a graph of torch.compile's.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_FILTERS = "float[] taps_y, float[] taps_x, str padding_mode"
for _schema in (
    f"blur(Tensor x, {_FILTERS}, bool adjoint=False) -> Tensor",
    f"gradient(Tensor x, Tensor? d, Tensor? r, {_FILTERS}) -> Tensor",
    f"gradient_step(Tensor x, Tensor? d, Tensor? r, Tensor step_size, {_FILTERS}) -> Tensor",
    f"solve(Tensor b, Tensor damping, {_FILTERS}) -> Tensor",
):
    _name, _signature = _schema.split("(", 1)
    torch.library.define(f"jfbfast::{_name}", f"({_signature}", tags=_TAGS)

blur = torch.ops.jfbfast.blur
gradient = torch.ops.jfbfast.gradient
gradient_step = torch.ops.jfbfast.gradient_step
solve = torch.ops.jfbfast.solve

Filter = Sequence[float]


def _taps(taps_y: Filter, taps_x: Filter, padding_mode: str) -> Taps:
    return Taps(tuple(taps_y), tuple(taps_x), padding_mode)


@torch.library.impl("jfbfast::blur", "default")
def _blur(x: Tensor, taps_y: Filter, taps_x: Filter, padding_mode: str, adjoint: bool = False) -> Tensor:
    _check(x=x)
    taps = _taps(taps_y, taps_x, padding_mode)
    return _kernels(x, taps).blur(x, _tables(x, taps, adjoint)).contiguous()


@torch.library.impl("jfbfast::gradient", "default")
def _gradient(
    x: Tensor, d: Tensor | None, r: Tensor | None, taps_y: Filter, taps_x: Filter, padding_mode: str
) -> Tensor:
    _check(x=x, d=d, r=r)
    taps = _taps(taps_y, taps_x, padding_mode)
    return _kernels(x, taps).gradient(x, d, r, _tables(x, taps, False), _tables(x, taps, True)).contiguous()


@torch.library.impl("jfbfast::gradient_step", "default")
def _gradient_step(
    x: Tensor,
    d: Tensor | None,
    r: Tensor | None,
    step_size: Tensor,
    taps_y: Filter,
    taps_x: Filter,
    padding_mode: str,
) -> Tensor:
    _check(x=x, d=d, r=r)
    if step_size.dim():
        raise ValueError(f"step_size has shape {tuple(step_size.shape)}; it takes a number or a tensor of shape ()")
    taps = _taps(taps_y, taps_x, padding_mode)
    forward, adjoint = (_tables(x, taps, a) for a in (False, True))
    return _kernels(x, taps).gradient_step(x, d, r, step_size, forward, adjoint).contiguous()


@torch.library.impl("jfbfast::solve", "default")
def _solve(b: Tensor, damping: Tensor, taps_y: Filter, taps_x: Filter, padding_mode: str) -> Tensor:
    _check(b=b)
    taps = _taps(taps_y, taps_x, padding_mode)
    return inverse.solve(b, damping, taps, _kernels(b, taps)).contiguous()


@torch.library.register_fake("jfbfast::blur")
@torch.library.register_fake("jfbfast::gradient")
@torch.library.register_fake("jfbfast::gradient_step")
@torch.library.register_fake("jfbfast::solve")
def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_filters(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.filters = tuple(a for a in inputs if isinstance(a, (list, str)))


def _keep_blur(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep_filters(ctx, inputs, output)
    ctx.adjoint = inputs[-1]


def _blur_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return blur(g, *ctx.filters, not ctx.adjoint), None, None, None, None


def _gradient_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    to_x, to_d, to_r, *_ = ctx.needs_input_grad
    return (
        gradient(g, None, None, *ctx.filters) if to_x else None,
        -blur(g, *ctx.filters) if to_d else None,
        g if to_r else None,
        *(None, None, None),
    )


def _keep_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep_filters(ctx, inputs, output)
    x, d, r, step_size = inputs[:4]
    ctx.save_for_backward(*((x, d, r) if ctx.needs_input_grad[3] else (None, None, None)), step_size)


def _step_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, d, r, step_size = ctx.saved_tensors
    to_x, to_d, to_r, to_step_size, *_ = ctx.needs_input_grad
    return (
        gradient_step(g, None, None, step_size, *ctx.filters) if to_x else None,
        (step_size * blur(g, *ctx.filters)).to(g.dtype) if to_d else None,
        (-step_size * g).to(g.dtype) if to_r else None,
        -_inner(g, gradient(x, d, r, *ctx.filters)).to(step_size.dtype) if to_step_size else None,
        *(None, None, None),
    )


def _inner(u: Tensor, v: Tensor) -> Tensor:
    wide = reference.band_dtype(u.dtype)
    return (u.to(wide) * v.to(wide)).sum()


def _keep_solve(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep_filters(ctx, inputs, output)
    ctx.save_for_backward(inputs[1], output if ctx.needs_input_grad[1] else None)


def _solve_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    damping, x = ctx.saved_tensors
    u = solve(g, damping, *ctx.filters)
    to_damping = None
    if ctx.needs_input_grad[1]:
        wide = reference.band_dtype(g.dtype)
        to_damping = -(u.to(wide) * x.to(wide)).sum_to_size(damping.shape).to(damping.dtype)
    return u, to_damping, None, None, None


torch.library.register_autograd("jfbfast::blur", _blur_backward, setup_context=_keep_blur)
torch.library.register_autograd("jfbfast::gradient", _gradient_backward, setup_context=_keep_filters)
torch.library.register_autograd("jfbfast::gradient_step", _step_backward, setup_context=_keep_step)
torch.library.register_autograd("jfbfast::solve", _solve_backward, setup_context=_keep_solve)


def _to_front(info: Any, tensor: Any, dim: int | None) -> Any:
    """The batch dimension first, made by expansion where the tensor has none."""
    if tensor is None:
        return None
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


@torch.library.register_vmap("jfbfast::blur")
def _blur_vmap(info: Any, dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return blur(_to_front(info, x, dims[0]), *rest), 0


@torch.library.register_vmap("jfbfast::gradient")
def _gradient_vmap(info: Any, dims: Any, x: Tensor, d: Any, r: Any, *filters: Any) -> tuple[Tensor, int]:
    images = (_to_front(info, image, dim) for image, dim in zip((x, d, r), dims[:3], strict=True))
    return gradient(*images, *filters), 0


@torch.library.register_vmap("jfbfast::gradient_step")
def _step_vmap(info: Any, dims: Any, x: Tensor, d: Any, r: Any, step_size: Tensor, *filters: Any) -> tuple[Tensor, int]:
    x, d, r = (_to_front(info, image, dim) for image, dim in zip((x, d, r), dims[:3], strict=True))
    if dims[3] is None:
        return gradient_step(x, d, r, step_size, *filters), 0
    step_size = step_size.reshape(-1, *[1] * (x.dim() - 1))
    return (x - step_size * gradient(x, d, r, *filters)).to(x.dtype), 0


@torch.library.register_vmap("jfbfast::solve")
def _solve_vmap(info: Any, dims: Any, b: Tensor, damping: Tensor, *filters: Any) -> tuple[Tensor, int]:
    b = _to_front(info, b, dims[0])
    if dims[1] is not None:
        damping = damping.movedim(dims[1], 0)
        damping = damping.reshape(len(damping), *[1] * (b.dim() - damping.dim()), *damping.shape[1:])
    return solve(b, damping, *filters), 0


def _blur_flops(x: Sequence[int], taps_y: Filter, taps_x: Filter, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * (len(taps_y) + len(taps_x))


def _gradient_flops(x: Sequence[int], d: Any, r: Any, *filters: Any, **__: Any) -> int:
    """Of A and Aᵀ; ``filters`` may come behind a step size."""
    return 2 * _blur_flops(x, *filters[-3:])


def _solve_flops(b: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the four products with singular vectors."""
    return 4 * math.prod(b) * (b[-2] + b[-1])


register_flop_formula(blur)(_blur_flops)
register_flop_formula([gradient, gradient_step])(_gradient_flops)
register_flop_formula(solve)(_solve_flops)
