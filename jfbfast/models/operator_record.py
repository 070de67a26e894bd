"""What a model's state_dict records of its operator A: a description in its metadata, but none of A's buffers."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from jfbfast.implicit.frozen import has_running_statistics
from jfbfast.operators.blur import SeparableBlur
from jfbfast.operators.convolution import Blur
from jfbfast.operators.iterative import IterativeOperator
from jfbfast.operators.physics import PhysicsOperator


def described(operator: Any) -> str:
    """What A is, in words that differ for different A: its class with its settings, or with a digest of its buffers."""
    if operator is None:
        return "the operator of each call"
    if isinstance(operator, (SeparableBlur, Blur)):
        return repr(operator)
    if isinstance(operator, IterativeOperator):
        return described(operator.operator)
    if isinstance(operator, PhysicsOperator):
        operator = operator.physics
    sha = hashlib.sha256()
    for name, buffer in _fixed_buffers(operator).items():
        if "noise_model" not in name.split("."):  # the noise of a physics is no part of A
            sha.update(f"{name} {tuple(buffer.shape)}".encode())
            sha.update(buffer.detach().cpu().to(torch.complex64).contiguous().numpy().tobytes())
    return f"{type(operator).__name__} with buffers {sha.hexdigest()[:8]}"


def _fixed_buffers(operator: Any) -> dict[str, Tensor]:
    """The buffers in the state_dict of A by name, without running statistics, which are learnt."""
    if not isinstance(operator, nn.Module):
        return {}
    saved = operator.state_dict()
    return {
        name: buffer
        for path, module in operator.named_modules()
        if not has_running_statistics(module)
        for name, buffer in module.named_buffers(path, recurse=False)
        if name in saved
    }


def record_operator(model: Any, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Remove the buffers of A from a state_dict, since they are not weights; record in its metadata what A is."""
    for name in _fixed_buffers(model.blur):
        state.pop(f"{prefix}blur.{name}", None)
    metadata["operator"] = model.trained_for()


def keep_operator(model: Any, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Leave the buffers of A as they are, whatever the state_dict has; warn if it was recorded for another A."""
    state.update({f"{prefix}blur.{name}": buffer for name, buffer in _fixed_buffers(model.blur).items()})
    own, theirs = model.trained_for(), metadata.get("operator")
    if theirs not in (None, own):
        warnings.warn(f"the weights are from a model for {theirs}; this model is for {own}", stacklevel=2)
