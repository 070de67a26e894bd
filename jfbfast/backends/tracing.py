"""Functions that torch.compile is to leave as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

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
