"""Where a layer's convolutions are Winograd's: in a solve, and in the trace that carries the gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jfbfast import ops

_LEAST_TOL = 1e-4  # the rounding of Winograd's convolution is about 1e-6, and what asks for less must not see it


def winograd_allowed(tol: float) -> bool:
    """Whether what is to reach the relative residual ``tol`` may use Winograd's convolution."""
    return tol >= _LEAST_TOL


def is_conv3x3(
    kernel_size: tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: str | int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    groups: int,
) -> bool:
    """Whether a zero-padded convolution with these arguments of torch's conv2d is `ops.conv3x3`."""
    one = (1, (1, 1), [1, 1])
    return kernel_size == (3, 3) and stride in one and dilation in one and groups == 1 and padding in (*one, "same")


class WinogradConvolutions(TorchFunctionMode):
    """Within, torch's conv2d is `ops.conv3x3` where that is Winograd's convolution; under autocast it stays torch's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            return _conv2d(*args, **kwargs)
        return func(*args, **kwargs)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    taken = (
        is_conv3x3(tuple(weight.shape[2:]), stride, padding, dilation, groups)
        and input.dim() == 4
        and ops.winograd_serves(input, len(weight))
        and not torch.is_autocast_enabled("cpu")
        and not _transformed()
    )
    if taken:
        out: Tensor = ops.conv3x3(input, weight, bias)
        return out
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _transformed() -> bool:
    """Within torch.func's transforms or forward-mode differentiation, which our op has no rules for."""
    functorch, forward = torch._C._functorch.peek_interpreter_stack(), torch.autograd.forward_ad._current_level
    return functorch is not None or forward >= 0


def winograd_convolutions(tol: float) -> AbstractContextManager[object]:
    """`WinogradConvolutions` where ``tol`` allows it."""
    return WinogradConvolutions() if winograd_allowed(tol) else nullcontext()
