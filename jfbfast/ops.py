"""The operators as torch.library ops: schema, backend, fake kernel, autograd and vmap of each.

``jfbfast::blur``            A x, or Aᵀ x
``jfbfast::gradient``        Aᵀ(A x − d) + r
``jfbfast::gradient_step``   x − η(Aᵀ(A x − d) + r)
``jfbfast::solve``           (AᵀA + λI)⁻¹ b
``jfbfast::conv3x3``         weight ∗ x + bias, and a ReLU
``jfbfast::conv3x3_weight_gradient``  what backward through it gives the weight and the bias

Every op of the operator takes images (…, H, W) and the two filters with their padding mode, and returns a
contiguous tensor; the convolution takes (B, C, H, W) and returns a channels-last one. Which twin
computes it is decided at each call, by `kernels_for`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from jfbfast import inverse, native, reference
from jfbfast.inverse import Taps, bands

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "reference", "native", "triton")


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it takes one of {', '.join(map(repr, BACKENDS))}")
    return name


_backend = _checked_backend(os.environ.get("JFBFAST_BACKEND", "auto"), "JFBFAST_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose, within the context, what computes the kernels; the choice holds for the whole process.

    Args:
        name: "auto" (C++ on the CPU, Triton on CUDA, PyTorch elsewhere), "reference" (PyTorch
            everywhere), "native" (C++; CPU tensors only) or "triton" (CUDA tensors only). The
            environment variable JFBFAST_BACKEND sets what holds outside any context.

    Raises:
        ValueError: another name.
        RuntimeError: at the first op, where the backend asked for cannot serve its tensors.
    """
    global _backend
    previous, _backend = _backend, _checked_backend(name, "name")
    try:
        yield
    finally:
        _backend = previous


def selected_backend() -> str:
    """The backend that holds now."""
    return _backend


def kernels_for(device: torch.device) -> ModuleType:
    """The module whose functions serve tensors on ``device``: reference, native or jfbfast.kernels."""
    if _backend == "reference":
        return reference
    if _backend in ("auto", "native") and device.type == "cpu":
        if native.AVAILABLE:
            return native
        if _backend == "native":
            raise RuntimeError(f"the backend 'native' is not available: {native.WHY_NOT}")
    if _backend in ("auto", "triton") and device.type == "cuda" and find_spec("triton"):
        return import_module("jfbfast.kernels")
    if _backend == "auto":
        return reference
    raise RuntimeError(f"the backend {_backend!r} does not serve tensors on {device}")


def _kernels(x: Tensor, taps: Taps) -> ModuleType:
    kernels = kernels_for(x.device)
    limit = getattr(kernels, "MAX_RADIUS", None)
    if limit is not None and max(len(taps.y), len(taps.x)) // 2 > limit:
        return reference
    return kernels


def _check(**images: Tensor | None) -> None:
    """Images of one shape, dtype and device; the first sets what the others must be."""
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


_FILTERS = "float[] taps_y, float[] taps_x, str padding_mode"
for _schema in (
    f"blur(Tensor x, {_FILTERS}, bool adjoint=False) -> Tensor",
    f"gradient(Tensor x, Tensor? d, Tensor? r, {_FILTERS}) -> Tensor",
    f"gradient_step(Tensor x, Tensor? d, Tensor? r, Tensor step_size, {_FILTERS}) -> Tensor",
    f"solve(Tensor b, Tensor damping, {_FILTERS}) -> Tensor",
    "conv3x3(Tensor x, Tensor weight, Tensor? bias=None, bool relu=False, Tensor? transformed=None) -> Tensor",
    "conv3x3_weight_gradient(Tensor x, Tensor gradient) -> (Tensor, Tensor)",
):
    _name, _signature = _schema.split("(", 1)
    torch.library.define(f"jfbfast::{_name}", f"({_signature}", tags=torch.Tag.pt2_compliant_tag)

blur = torch.ops.jfbfast.blur
gradient = torch.ops.jfbfast.gradient
gradient_step = torch.ops.jfbfast.gradient_step
solve = torch.ops.jfbfast.solve
conv3x3 = torch.ops.jfbfast.conv3x3
conv3x3_weight_gradient = torch.ops.jfbfast.conv3x3_weight_gradient

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


def transformed_weight(weight: Tensor) -> Tensor | None:
    """What `conv3x3` can be given as ``transformed``, to be made once for a weight; None where it would not be used."""
    return native.winograd_weights(weight) if _winograd_takes(weight, *weight.shape[:2]) else None


def winograd_serves(x: Tensor, out_channels: int) -> bool:
    """Winograd's convolution is there for such an x (B, C, H, W), and faster.

    With few channels its transforms cost too much, and with small images most of its 4 × 4 tiles are empty.
    """
    height, width = x.shape[-2:]
    filled = 2 * height * width >= 16 * -(-height // 4) * -(-width // 4)
    return filled and _winograd_takes(x, x.shape[1], out_channels)


def _winograd_takes(tensor: Tensor, *channels: int) -> bool:
    available = _backend in ("auto", "native") and native.AVAILABLE
    return available and tensor.device.type == "cpu" and tensor.dtype == torch.float32 and min(channels) >= 16


def _check_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; it takes float64, float32, bfloat16 or float16 (B, C, H, W)"
        )
    for name, given, shape in (("weight", weight, (len(weight), x.shape[1], 3, 3)), ("bias", bias, (len(weight),))):
        if given is not None and (given.shape != shape or given.dtype != x.dtype or given.device != x.device):
            raise ValueError(
                f"{name} is {given.dtype} of shape {tuple(given.shape)} on {given.device}; "
                f"it takes {x.dtype} of shape {shape} on {x.device}"
            )


@torch.library.impl("jfbfast::conv3x3", "default")
def _conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, transformed: Tensor | None = None
) -> Tensor:
    _check_conv3x3(x, weight, bias)
    if winograd_serves(x, len(weight)):
        return native.conv3x3(x, weight, bias, relu, transformed)
    return reference.conv3x3(x, weight, bias, relu).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("jfbfast::conv3x3")
def _conv3x3_like(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("jfbfast::blur")
@torch.library.register_fake("jfbfast::gradient")
@torch.library.register_fake("jfbfast::gradient_step")
@torch.library.register_fake("jfbfast::solve")
def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl("jfbfast::conv3x3_weight_gradient", "default")
def _conv3x3_weight_gradient(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], gradient.shape[1], *x.shape[2:])
    if gradient.shape != shape or gradient.dtype != x.dtype or gradient.device != x.device:
        raise ValueError(
            f"gradient is {gradient.dtype} of shape {tuple(gradient.shape)} on {gradient.device}; "
            f"it takes {x.dtype} of shape {shape} on {x.device}"
        )
    kernels = native if winograd_serves(x, gradient.shape[1]) else reference
    weight, bias = kernels.conv3x3_weight_gradient(x, gradient)
    return weight.contiguous(), bias


@torch.library.register_fake("jfbfast::conv3x3_weight_gradient")
def _conv3x3_weight_gradient_like(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    outputs, inputs = gradient.shape[1], x.shape[1]
    return x.new_empty(outputs, inputs, 3, 3), x.new_empty(outputs)


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
    ctx.save_for_backward(inputs[1], output)


def _solve_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    damping, x = ctx.saved_tensors
    u = solve(g, damping, *ctx.filters)
    to_damping = None
    if ctx.needs_input_grad[1]:
        wide = reference.band_dtype(g.dtype)
        to_damping = -(u.to(wide) * x.to(wide)).sum_to_size(damping.shape).to(damping.dtype)
    return u, to_damping, None, None, None


def _adjoint(weight: Tensor) -> Tensor:
    """The weight of the adjoint convolution."""
    return weight.transpose(0, 1).flip(2, 3)


def _keep_conv3x3(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.relu, _ = inputs
    ctx.save_for_backward(x, weight, output if ctx.relu else None)


def _conv3x3_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, output = ctx.saved_tensors
    if ctx.relu:
        g = torch.ops.aten.threshold_backward(g, output, 0)
    to_x, to_weight, to_bias = (*ctx.needs_input_grad, False)[:3]  # which ends with the last argument that was given
    by_weight, by_bias = conv3x3_weight_gradient(x, g) if to_weight or to_bias else (None, None)
    return (
        conv3x3(g, _adjoint(weight)) if to_x else None,
        by_weight if to_weight else None,
        by_bias if to_bias else None,
        *(None, None),
    )


def _keep_conv3x3_weight_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _conv3x3_weight_gradient_backward(ctx: Any, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
    x, gradient = ctx.saved_tensors
    to_x, to_gradient = ctx.needs_input_grad
    return conv3x3(gradient, _adjoint(weight)) if to_x else None, conv3x3(x, weight, bias) if to_gradient else None


torch.library.register_autograd("jfbfast::conv3x3", _conv3x3_backward, setup_context=_keep_conv3x3)
torch.library.register_autograd(
    "jfbfast::conv3x3_weight_gradient", _conv3x3_weight_gradient_backward, setup_context=_keep_conv3x3_weight_gradient
)
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
