"""A convolution with its bias, an addend and a ReLU on a CUDA device, without a pass of its own for each.

cuDNN has one call for convolution, bias and ReLU. Nobody says for which shapes and dtypes it has an engine, and it is
passed uninitialised memory as an addend with the factor 0. So the first result for each kind of convolution is compared
with that of the separate operations, and what fails is computed by these: the convolution, and one pass for the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from jfbfast.backends import dispatch

_MOST_KINDS = 4096  # of convolutions that are remembered
# The largest error of a fused result relative to the largest number before the ReLU, by what the convolution rounds to.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOLERANCE_TF32 = 1e-2


class Geometry(NamedTuple):
    """What torch's conv2d takes besides the tensors, in its order."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


_why_not: dict[tuple[Any, ...], str] = {}  # by kind: why the fused call is not used; an empty string if it is


def serves(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, addend: Tensor | None = None
) -> bool:
    """Whether `convolution` may compute this convolution: images on a CUDA device with cuDNN, without gradients."""
    tensors = [t for t in (input, weight, bias, addend) if t is not None]
    return (
        input.is_cuda
        and dispatch.selected_backend() != "reference"
        and input.dim() == 4
        and input.numel() > 0
        and not isinstance(geometry.padding, str)
        and all(t.dtype == input.dtype for t in tensors)
        and torch.backends.cudnn.is_acceptable(input)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    relu: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    """weight ∗ input + bias + addend, and a ReLU if asked for; the addend is like the output."""
    separate = (input, weight, bias, geometry, relu, addend)
    if not relu or bias is None or addend is not None:
        return _separately(*separate)
    pairs = [(v, v) if isinstance(v, int) else tuple(v) for v in geometry[:3]]
    precision = _float32_precision()
    layout = input.is_contiguous(memory_format=torch.channels_last)
    kind = (input.device, input.dtype, input.shape, weight.shape, layout, *pairs, geometry.groups, precision)
    arguments = (input, weight, bias, *pairs, geometry.groups)
    if kind not in _why_not:
        if torch.cuda.is_current_stream_capturing():  # the comparison would wait for the device
            return _separately(*separate)
        if len(_why_not) >= _MOST_KINDS:
            _why_not.clear()
        _why_not[kind] = _compared(arguments, _separately(*separate[:-2], False, None))
    return _separately(*separate) if _why_not[kind] else torch.ops.aten.cudnn_convolution_relu(*arguments)


def _separately(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool, addend: Tensor | None
) -> Tensor:
    if not relu and addend is None:  # torch adds a bias in one pass too
        return torch.conv2d(input, weight, bias, *geometry)
    out = torch.conv2d(input, weight, None, *geometry)
    if addend is not None and addend.shape != out.shape:
        raise ValueError(f"addend has shape {tuple(addend.shape)}; it takes that of the output, {tuple(out.shape)}")
    return dispatch.kernels(out.device, "add_relu").add_relu(out, bias, addend, relu)


def _compared(arguments: tuple[Any, ...], linear: Tensor) -> str:
    """Why cuDNN's fused call is not right for these arguments, whose result before the ReLU is ``linear``; or ""."""
    torch.full_like(linear, torch.nan)  # freed at once, so that this is what the uninitialised addend holds
    try:
        fused = torch.ops.aten.cudnn_convolution_relu(*arguments)
    except RuntimeError as refusal:
        return str(refusal).splitlines()[0]
    reduced = linear.dtype == torch.float32 and _float32_precision() != "ieee"
    tolerance = _TOLERANCE_TF32 if reduced else _TOLERANCE[linear.dtype]
    if fused.shape != linear.shape:
        return f"it gives the shape {tuple(fused.shape)} in place of {tuple(linear.shape)}"
    wide = linear.double()
    error = float((fused.double() - wide.relu()).abs().max() / wide.abs().max().clamp_min(torch.finfo(wide.dtype).tiny))
    return "" if error <= tolerance else f"its error is {error:.1e}, above {tolerance:g}"


def _float32_precision() -> str:
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return str(convolutions.fp32_precision)


def describe() -> str:
    """For how many kinds of convolutions cuDNN's fused call is used, and why it is not for others."""
    reasons = sorted({why for why in _why_not.values() if why})
    used = sum(not why for why in _why_not.values())
    return f"used for {used} kinds of convolutions so far" + "".join(f"; not for others: {why}" for why in reasons)
