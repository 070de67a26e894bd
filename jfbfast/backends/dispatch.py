"""Which implementation computes what: `kernels` is the one rule, and `backend` lets the user choose.

The implementations are modules with functions of the same names and arguments:

- `jfbfast.backends.reference`: the definition of every kernel, in PyTorch, on any device;
- `jfbfast.backends.native`: C++, on the CPU;
- `jfbfast.backends.onednn`: oneDNN, on the CPU, for the change of basis;
- `jfbfast.kernels`: Triton, on a CUDA device, for the separable blur, and for what follows a convolution;
- `jfbfast.backends.cuda`: CUDA, for Anderson's method alone.

Anderson's method is an exception: `native` and `cuda` have the class ``AndersonSolve``, which keeps the state of a
whole solve and takes all decisions of an iteration; `reference` has the parts of an iteration, for the solvers' loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch.autograd import forward_ad

from jfbfast.backends import cuda, native, onednn, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Whether oneDNN computes bfloat16 convolutions on this CPU; torch's own are several times slower.
ONEDNN_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
BACKENDS = ("auto", "reference", "native", "triton")
# Winograd's convolution is faster than torch's if there are at least this many input or output channels. If the weight
# has to be transformed first, there must also be at most this many channels for each tile of 4 × 4 pixels.
_LEAST_CHANNELS = 16
_CHANNELS_PER_TILE = 12  # at most
# In bfloat16, Winograd's convolution multiplies in float32. It does half of the direct convolution's work there, also
# where the CPU multiplies pairs of bfloat16 (AVX512_BF16), but not where it has AMX, which multiplies far more at once.
_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it takes one of {', '.join(map(repr, BACKENDS))}")
    return name


_backend = _checked(os.environ.get("JFBFAST_BACKEND", "auto"), "JFBFAST_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose which kernels compute within the context. The choice applies to all threads of the process.

    Args:
        name: "auto" (C++ on the CPU, Triton and CUDA on a GPU, PyTorch elsewhere), "reference" (PyTorch
            everywhere), "native" (C++; CPU tensors only) or "triton" (CUDA tensors only). The
            environment variable JFBFAST_BACKEND sets the choice outside of any context.

    Raises:
        ValueError: another name.
        RuntimeError: raised by the first operation on tensors that the chosen backend does not support.

    Example:
        >>> import torch, jfbfast
        >>> blur, x = jfbfast.GaussianBlur(5, 1.0), torch.rand(1, 3, 8, 8)
        >>> with jfbfast.backend("reference"):
        ...     plain = blur(x)
        >>> torch.allclose(blur(x), plain, atol=1e-6)
        True
    """
    global _backend
    previous, _backend = _backend, _checked(name, "name")
    try:
        yield
    finally:
        _backend = previous


def selected_backend() -> str:
    """The name of the backend that is chosen now."""
    return _backend


def check_reverse_mode() -> None:
    """Raise NotImplementedError within forward-mode differentiation: torch.library drops an op's tangents silently."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "jfbfast's operators have no forward-mode derivative; take torch.autograd.grad, twice for a "
            "Jacobian-vector product"
        )


@cache
def _triton() -> ModuleType | None:
    return import_module("jfbfast.kernels") if find_spec("triton") else None


def kernels(
    device: torch.device,
    op: Literal["blur", "change_basis", "anderson", "anderson_solve", "conv3x3", "add_relu"],
    *,
    radius: int = 0,
    dtype: torch.dtype = torch.float32,
    memory: int = 0,
    estimate: bool = False,
    channels: Sequence[int] = (),
    image_shape: Sequence[int] | None = None,
    uses: float = 1,
) -> ModuleType:
    """The module that computes ``op`` for tensors on ``device``.

    Args:
        op: "blur" for A x and its gradient steps; "change_basis" for the basis in which AᵀA is diagonal;
            "anderson" for one iteration of Anderson's or Broyden's method;
            "anderson_solve" for a whole solve by Anderson's method, by the class ``AndersonSolve`` if there is one;
            "conv3x3" for the 3 × 3 convolution, by Winograd's algorithm (`native`) where that is faster; "add_relu" for
            what follows a convolution on a CUDA device.
        radius: the larger radius of the two filters of a blur.
        dtype: the dtype of the tensors of an Anderson solve, a convolution or a change of basis.
        memory, estimate: of an Anderson solve: the pairs kept, and whether to estimate the inverse Jacobian.
        channels, uses: of a convolution: its numbers of input and output channels; and how often the weight is used
            once it is transformed for Winograd's algorithm, infinity if it already is.
        image_shape: (B, H, W) of a convolution, None if it is not known yet; (…, H, W) of a change of basis.

    Raises:
        RuntimeError: the user has chosen a backend (`backend`) that cannot serve ``device``.
    """
    kind = device.type
    if op == "change_basis":
        chosen = _backend in ("auto", "native") and onednn.AVAILABLE and kind == "cpu" and dtype == torch.float32
        return onednn if chosen and image_shape and onednn.is_faster(image_shape) else reference
    if op == "conv3x3":
        chosen = _backend in ("auto", "native") and native.AVAILABLE and kind == "cpu"
        storage = dtype == torch.float32 or (dtype == torch.bfloat16 and not _AMX)
        serves = chosen and storage and max(channels) >= _LEAST_CHANNELS
        return native if serves and _winograd_is_faster(max(channels), image_shape, uses) else reference
    if (
        op == "anderson_solve"
        and kind == "cuda"
        and not estimate  # an estimate needs the history, which `cuda` keeps to itself
        and dtype in (torch.float32, torch.float64)
        and memory <= cuda.MAX_MEMORY
        and _backend != "reference"
        and not cuda.unavailable_because(device.index)
    ):
        return cuda
    if _backend == "reference" or (op == "add_relu" and kind != "cuda"):
        return reference
    if kind == "cpu" and op == "anderson_solve" and (estimate or memory > native.MAX_MEMORY):
        return reference
    if kind == "cpu" and _backend in ("auto", "native"):
        if native.AVAILABLE:
            return native
        if _backend == "native":
            raise RuntimeError(f"the backend 'native' is not available: {native.UNAVAILABLE_BECAUSE}")
    if kind == "cuda" and _backend in ("auto", "triton") and (triton := _triton()):
        return triton if op == "add_relu" or (op == "blur" and radius <= triton.MAX_RADIUS) else reference
    if _backend == "auto":
        return reference
    raise RuntimeError(f"the backend {_backend!r} does not serve tensors on {device}")


def _winograd_is_faster(channels: int, image_shape: Sequence[int] | None, uses: float) -> bool:
    """Whether Winograd's convolution of these images beats torch's, for the larger number of channels.

    Small images leave most of its 4 × 4 tiles empty, and transforming the weight pays off over many tiles only.
    """
    if image_shape is None:
        return True
    batch, height, width = image_shape
    tiles = -(-height // 4) * -(-width // 4)
    worth_the_transform = not batch * tiles or _CHANNELS_PER_TILE * uses * batch * tiles >= channels
    return worth_the_transform and 2 * height * width >= 16 * tiles
