"""Functions that torch.compile is to leave as they are, and calls of ops that only their implementation needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter, type(None))
F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Function decorator: torch.compile does not trace the function, nor what it calls.

    ``torch.compiler.disable`` does this too, but imports torch's compiler, which takes a second or more. This waits
    until somebody else has imported it, since before that nobody can be tracing.
    """
    disabled: list[F] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return cast(F, call)


def transformed_by_functorch() -> bool:
    """Whether torch.func's transforms or forward-mode differentiation are active."""
    functorch, forward = torch._C._functorch.peek_interpreter_stack(), torch.autograd.forward_ad._current_level
    return functorch is not None or forward >= 0


def observed(*tensors: Tensor | None) -> bool:
    """Whether an op called with these tensors has more to do than to compute: for autograd, tracing or a transform.

    Otherwise its implementation may be called itself: the calls in between cost more than a small image does.
    """
    differentiated = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    return differentiated or traced(*tensors)


def traced(*tensors: Tensor | None) -> bool:
    """Whether tracing, a transform or a dispatch mode observes an op called with these tensors, besides autograd."""
    return (
        torch.compiler.is_compiling()
        or any([type(t) not in _PLAIN for t in tensors])  # a subclass may have its own dispatch
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or transformed_by_functorch()
    )
