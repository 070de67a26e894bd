"""The 3 × 3 convolution as torch.library ops, and the use of Winograd's convolution in a layer.

``jfbfast::conv3x3``                  weight ∗ x + bias, optionally with a ReLU, or by the adjoint of the weight
``jfbfast::conv3x3_weight_gradient``  the gradients of its weight and bias

The ops take images (B, C, H, W) and return a channels-last tensor. At each call `dispatch.kernels` decides whether
Winograd's convolution or torch's computes it. `convolution` computes torch's conv2d by whatever is fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from jfbfast.backends import dispatch, fused, native
from jfbfast.backends.dispatch import DTYPES, ONEDNN_HAS_BFLOAT16, check_reverse_mode
from jfbfast.backends.fused import Geometry
from jfbfast.backends.tracing import observed, traced, transformed_by_functorch

_LEAST_TOL = 1e-4  # far above the rounding of Winograd's convolution, about 1e-6


def winograd_allowed(tol: float) -> bool:
    """Whether a computation to the relative residual ``tol`` may use Winograd's convolution."""
    return tol >= _LEAST_TOL


def worth_transforming(weight: Tensor, x: Tensor, dtype: torch.dtype, uses: int) -> bool:
    """Whether to transform a weight for so many 3 × 3 convolutions of images like x (B, C, H, W) in ``dtype``."""
    shape = x.shape[0], *x.shape[2:]
    facts: dict[str, Any] = {"dtype": dtype, "channels": weight.shape[:2], "image_shape": shape, "uses": uses}
    return x.dim() == 4 and dispatch.kernels(x.device, "conv3x3", **facts) is native


def transformed_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """The weight as `conv3x3` takes it in ``transformed``; None where Winograd's convolution cannot use it.

    Args:
        weight: [O, C, 3, 3].
        dtype: that of the images; None for the weight's. A float32 weight of bfloat16 images is not rounded.
    """
    kernels = dispatch.kernels(weight.device, "conv3x3", dtype=dtype or weight.dtype, channels=weight.shape[:2])
    return native.winograd_weights(weight.to(torch.float32)) if kernels is native else None


def _kernels(x: Tensor, out_channels: int, uses: float = 1, dtype: torch.dtype | None = None) -> ModuleType:
    """The module that convolves images x (B, C, H, W), in ``dtype`` or their own, to ``out_channels``.

    ``uses`` is that of `dispatch.kernels`.
    """
    batch, channels, height, width = x.shape
    both, shape = (channels, out_channels), (batch, height, width)
    return dispatch.kernels(x.device, "conv3x3", dtype=dtype or x.dtype, channels=both, image_shape=shape, uses=uses)


def _uses(transformed: Tensor | None) -> float:
    return 1 if transformed is None else math.inf


for _name, _signature in (
    (
        "conv3x3",
        "(Tensor x, Tensor weight, Tensor? bias=None, bool relu=False, Tensor? transformed=None, bool adjoint=False) "
        "-> Tensor",
    ),
    ("conv3x3_weight_gradient", "(Tensor x, Tensor gradient) -> (Tensor, Tensor)"),
):
    torch.library.define(f"jfbfast::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)

conv3x3 = torch.ops.jfbfast.conv3x3
conv3x3_weight_gradient = torch.ops.jfbfast.conv3x3_weight_gradient


def _check(name: str, given: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise ValueError unless ``given`` has this shape, and the dtype and the device of x."""
    if given.shape != shape or given.dtype != x.dtype or given.device != x.device:
        raise ValueError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)} on {given.device}; "
            f"it takes {x.dtype} of shape {shape} on {x.device}"
        )


def _conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    transformed: Tensor | None = None,
    adjoint: bool = False,
) -> Tensor:
    check_reverse_mode()
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; it takes float64, float32, bfloat16 or float16 (B, C, H, W)"
        )
    channels, outputs = x.shape[1], weight.shape[1 if adjoint else 0]
    _check("weight", weight, (channels, outputs, 3, 3) if adjoint else (outputs, channels, 3, 3), x)
    if bias is not None:
        _check("bias", bias, (outputs,), x)
    out = _kernels(x, outputs, _uses(transformed)).conv3x3(x, weight, bias, relu, transformed, adjoint)
    return out.contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("jfbfast::conv3x3")
def _conv3x3_like(
    x: Tensor, weight: Tensor, bias: Any = None, relu: bool = False, transformed: Any = None, adjoint: bool = False
) -> Tensor:
    shape = (x.shape[0], weight.shape[1 if adjoint else 0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _conv3x3_weight_gradient(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    check_reverse_mode()
    _check("gradient", gradient, (x.shape[0], gradient.shape[1], *x.shape[2:]), x)
    weight, bias = _kernels(x, gradient.shape[1]).conv3x3_weight_gradient(x, gradient)
    return weight.contiguous(), bias


torch.library.impl("jfbfast::conv3x3", "default", _conv3x3)
torch.library.impl("jfbfast::conv3x3_weight_gradient", "default", _conv3x3_weight_gradient)


@torch.library.register_fake("jfbfast::conv3x3_weight_gradient")
def _conv3x3_weight_gradient_like(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    outputs, inputs = gradient.shape[1], x.shape[1]
    return x.new_empty(outputs, inputs, 3, 3), x.new_empty(outputs)


def _adjoint_of(y: Tensor, weight: Tensor, adjoint: bool = False) -> Tensor:
    """The adjoint of x ↦ conv3x3(x, weight, adjoint=adjoint), applied to y."""
    arguments = y, weight, None, False, None, not adjoint
    if observed(y, weight):
        out: Tensor = conv3x3(*arguments)
        return out
    computed: Tensor = _kernels(y, weight.shape[0 if adjoint else 1]).conv3x3(*arguments)
    return computed


def _weight_gradient(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    compute = (
        conv3x3_weight_gradient if observed(x, gradient) else _kernels(x, gradient.shape[1]).conv3x3_weight_gradient
    )
    found: tuple[Tensor, Tensor] = compute(x, gradient)
    return found


def _keep_conv3x3(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.relu, _, ctx.adjoint = inputs
    ctx.save_for_backward(x, weight, output if ctx.relu else None)


def _conv3x3_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, output = ctx.saved_tensors
    if ctx.relu:
        g = torch.ops.aten.threshold_backward(g, output, 0)
    to_x, to_weight, to_bias = (*ctx.needs_input_grad, False)[:3]  # arguments left out at the end are missing
    by_weight, by_bias = None, None
    if ctx.adjoint:
        by_weight = _weight_gradient(g, x)[0] if to_weight else None
        by_bias = g.sum((0, 2, 3)) if to_bias else None
    elif to_weight or to_bias:
        by_weight, by_bias = _weight_gradient(x, g)
    return (
        _adjoint_of(g, weight, ctx.adjoint) if to_x else None,
        by_weight if to_weight else None,
        by_bias if to_bias else None,
        *(None, None, None),
    )


def _keep_conv3x3_weight_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _conv3x3_weight_gradient_backward(ctx: Any, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
    x, gradient = ctx.saved_tensors
    to_x, to_gradient = ctx.needs_input_grad
    return _adjoint_of(gradient, weight) if to_x else None, conv3x3(x, weight, bias) if to_gradient else None


torch.library.register_autograd("jfbfast::conv3x3", _conv3x3_backward, setup_context=_keep_conv3x3)
torch.library.register_autograd(
    "jfbfast::conv3x3_weight_gradient", _conv3x3_weight_gradient_backward, setup_context=_keep_conv3x3_weight_gradient
)


class _Conv3x3(torch.autograd.Function):
    """Winograd's `conv3x3` with its gradient, where only autograd observes it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = native.conv3x3(*inputs)
        _keep_conv3x3(ctx, (*inputs, False), out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _conv3x3_backward(ctx, g)[:5]


def _by_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, transformed: Tensor | None) -> Tensor:
    """`conv3x3` on the CPU, by as few calls as possible."""
    if not observed(x, weight, bias):
        return native.conv3x3(x, weight, bias, relu, transformed)
    compute: Callable[..., Tensor] = conv3x3 if traced(x, weight, bias) else _Conv3x3.apply
    return compute(x, weight, bias, relu, transformed)


@register_flop_formula(conv3x3)
def _conv3x3_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """The direct convolution, as torch counts its own."""
    return 2 * x[0] * math.prod(x[2:]) * math.prod(weight)


@register_flop_formula(conv3x3_weight_gradient)
def _conv3x3_weight_gradient_flops(x: Sequence[int], gradient: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * 9 * math.prod(x) * gradient[1]


def is_conv3x3(kernel_size: tuple[int, ...], geometry: Geometry) -> bool:
    """Whether torch's zero-padded conv2d with this kernel is `conv3x3`."""
    one = (1, (1, 1), [1, 1])
    stride, padding, dilation, groups = geometry
    return kernel_size == (3, 3) and stride in one and dilation in one and groups == 1 and padding in (*one, "same")


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    relu: bool = False,
    winograd: bool = True,
    transformed: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """torch's conv2d, and a ReLU or an addend if asked for, by the fastest implementation.

    Args:
        input, weight, bias, geometry: as in torch.nn.functional.conv2d.
        relu: whether to apply a ReLU.
        winograd: whether Winograd's convolution may be used.
        transformed: `transformed_weight` of the weight, if that was made.
        addend: a tensor like the output to add to it; not with a ReLU.
    """
    assert addend is None or not relu
    dtype = _computed_in(input, weight)
    if (
        winograd
        and input.dim() == 4
        and is_conv3x3(weight.shape[2:], geometry)
        and dtype is not None
        and _kernels(input, len(weight), _uses(transformed), dtype) is native
        and not transformed_by_functorch()
    ):
        bias = None if bias is None else bias.to(dtype)
        out = _by_winograd(input.to(dtype), weight.to(dtype), bias, relu, transformed)
        return out if addend is None else addend + out
    needed = relu or addend is not None
    if needed and fused.serves(input, weight, bias, geometry, addend) and not transformed_by_functorch():
        return fused.convolution(input, weight, bias, geometry, relu, addend)
    if relu and _onednn_fuses_relu(input, weight, bias, geometry) and not transformed_by_functorch():
        stride, padding, dilation, groups = geometry
        arguments = (padding, stride, dilation, groups)
        return torch.ops.mkldnn._convolution_pointwise(input, weight, bias, *arguments, "relu", [], "")
    out = torch.conv2d(input, weight, bias, *geometry)
    if addend is not None:
        return addend + out
    return torch.relu_(out) if relu else out


def _computed_in(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype in which torch's conv2d computes; None where it raises, or autocast leaves the tensors as they are."""
    if not torch.is_autocast_enabled(input.device.type):
        return input.dtype if input.dtype == weight.dtype else None
    casts = all(t.dtype in (torch.float32, torch.bfloat16) for t in (input, weight))
    return torch.get_autocast_dtype(input.device.type) if casts else None


def _onednn_fuses_relu(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    given = [input, weight] if bias is None else [input, weight, bias]
    return (
        input.device.type == "cpu"
        and dispatch.selected_backend() != "reference"
        and (input.dtype == torch.float32 or (input.dtype == torch.bfloat16 and ONEDNN_HAS_BFLOAT16))
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not isinstance(geometry.padding, str)
        and input.dim() == 4
        and input.numel() > 0
        and all(each.dtype == input.dtype for each in given)
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in given))
    )


def _pointwise_flops(x: Any, weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


_pointwise = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
if _pointwise is not None and _pointwise not in flop_registry:  # torch itself counts nothing for it
    register_flop_formula(_pointwise)(_pointwise_flops)
