"""What computes the kernels: C++, Triton or PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch.autograd import forward_ad

from jfbfast.backends import native, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Whether oneDNN computes bfloat16 convolutions on this CPU; torch's own are several times slower.
ONEDNN_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
BACKENDS = ("auto", "reference", "native", "triton")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it takes one of {', '.join(map(repr, BACKENDS))}")
    return name


_backend = _checked(os.environ.get("JFBFAST_BACKEND", "auto"), "JFBFAST_BACKEND")


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
    previous, _backend = _backend, _checked(name, "name")
    try:
        yield
    finally:
        _backend = previous


def selected_backend() -> str:
    """The backend that holds now."""
    return _backend


def check_reverse_mode() -> None:
    """Raise NotImplementedError within forward-mode differentiation: torch.library drops an op's tangents silently."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "jfbfast's operators have no forward-mode derivative; take torch.autograd.grad, twice for a "
            "Jacobian-vector product"
        )


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
