"""The CPU kernels: the functions of ``reference`` in C++ (csrc/), which get addresses and shapes.

Where the compiled module is missing, ``AVAILABLE`` is False and ``WHY_NOT`` says why. The environment variable
JFBFAST_ISA bounds the instruction set that is used: "avx512", "avx2" or "baseline".
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch.utils.dlpack  # before the compiled module, so that both share one OpenMP runtime
from torch import Tensor

from .reference import Bands, band_dtype

_ISAS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "baseline"}
if (_bound := os.environ.get("JFBFAST_ISA")) and _bound not in _ISAS:
    raise ValueError(f"JFBFAST_ISA is {_bound!r}; it takes one of {', '.join(map(repr, _ISAS))}")

_native: ModuleType | None = None
WHY_NOT = ""
try:
    _native = import_module("jfbfast._native")
except ImportError as error:
    WHY_NOT = f"the compiled module jfbfast._native did not load: {error}".splitlines()[0]
AVAILABLE = not WHY_NOT

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


def _threads() -> int:
    """torch's thread count; one in a forked child, where OpenMP's threads no longer exist."""
    return 1 if _forked else torch.get_num_threads()


def _module() -> ModuleType:
    if _native is None:
        raise RuntimeError(f"no C++ kernels: {WHY_NOT}")
    return _native


def describe() -> str:
    """The kernels in use, such as "C++ (AVX-512, OpenMP, 2 threads)"."""
    if _native is None:
        return f"unavailable: {WHY_NOT}"
    threads = f"OpenMP, {_threads()} threads" if _native.openmp else "1 thread"
    return f"C++ ({_ISAS[_native.isa]}, {threads})"


def _dtype(dtype: torch.dtype) -> object:
    return getattr(_module().DType, str(dtype).removeprefix("torch."))


def _check(name: str, tensor: Tensor, shape: Sequence[int], *dtypes: torch.dtype, written: bool = False) -> None:
    """Of what C++ reads or writes by its address: the shape, one of these dtypes, the CPU; contiguous if written."""
    wrong = tensor.shape != tuple(shape) or tensor.dtype not in dtypes or tensor.device.type != "cpu"
    if wrong or (written and not tensor.is_contiguous()):
        raise ValueError(
            f"{name}: got {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()} on "
            f"{tensor.device}, want {'contiguous ' if written else ''}{' or '.join(map(str, dtypes))} "
            f"of shape {tuple(shape)} on cpu"
        )


def _contiguous(name: str, tensor: Tensor | None, like: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    _check(name, tensor, like.shape, like.dtype)
    return tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _planes(x: Tensor) -> tuple[int, int, int]:
    height, width = x.shape[-2:]
    return x.shape[:-2].numel(), height, width


def _tables(bands: Bands, x: Tensor) -> Bands:
    for table, n in zip(bands[:2], x.shape[-2:], strict=True):
        _check("bands", table, (n, *table.shape[1:]), band_dtype(x.dtype))
    return Bands(bands.y.contiguous(), bands.x.contiguous(), bands.circular)


def _bands(tables: Bands) -> tuple[tuple[int, int], tuple[int, int]]:
    y, x = ((table.data_ptr(), table.shape[1] // 2) for table in tables[:2])
    return y, x


_POOLED = 1 << 16  # bytes from which a fresh allocation costs more than asking the pool


def _empty(
    shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """An uninitialised result, never a view; a large one in memory that an earlier result had (csrc/pool.cpp).

    torch cannot `resize_` the storage of such a large one, which is not from its own allocator.
    """
    if math.prod(shape) * dtype.itemsize < _POOLED:
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)
    strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
    return torch.utils.dlpack.from_dlpack(_module().empty(list(shape), list(strides), _dtype(dtype)))


def blur(x: Tensor, bands: Bands) -> Tensor:
    """As `reference.blur`."""
    x, tables = x.contiguous(), _tables(bands, x)
    out = _empty(x.shape, x.dtype)
    if x.numel():
        _module().blur(
            _dtype(x.dtype), _address(x), _address(out), _planes(x), *_bands(tables), tables.circular, _threads()
        )
    return out


def _gradient(
    x: Tensor,
    d: Tensor | None,
    r: Tensor | None,
    step_size: Tensor | None,
    bands: Bands,
    adjoint: Bands,
) -> Tensor:
    x, d, r = x.contiguous(), _contiguous("d", d, x), _contiguous("r", r, x)
    tables, adjoint_tables = _tables(bands, x), _tables(adjoint, x)
    out = _empty(x.shape, x.dtype)
    if x.numel():
        _module().gradient(
            _dtype(x.dtype),
            *(_address(t) for t in (x, d, r, out)),
            _planes(x),
            *_bands(tables),
            *_bands(adjoint_tables),
            tables.circular,
            step_size is not None,
            0.0 if step_size is None else float(step_size),
            _threads(),
        )
    return out


def gradient(x: Tensor, d: Tensor | None, r: Tensor | None, bands: Bands, adjoint: Bands) -> Tensor:
    """As `reference.gradient`."""
    return _gradient(x, d, r, None, bands, adjoint)


def gradient_step(
    x: Tensor, d: Tensor | None, r: Tensor | None, step_size: Tensor, bands: Bands, adjoint: Bands
) -> Tensor:
    """As `reference.gradient_step`."""
    return _gradient(x, d, r, step_size, bands, adjoint)


def anderson_append(x: Tensor, f: Tensor, residuals: Tensor, gram: Tensor, slot: int, filled: int) -> Tensor:
    """As `reference.anderson_append`."""
    memory, (samples, size) = len(residuals), x.shape
    _check("f", f, x.shape, x.dtype)
    _check("residuals", residuals, (memory, samples, size), x.dtype, torch.bfloat16, written=True)
    _check("gram", gram, (samples, memory, memory), torch.float64, written=True)
    if not 0 <= slot < filled <= memory:
        raise ValueError(f"slot, filled: got {slot} and {filled}, want 0 <= slot < filled <= {memory}")
    x, f = x.contiguous(), f.contiguous()
    norms = torch.zeros(samples, 2, dtype=torch.float64, device="cpu")
    if samples:
        _module().anderson_append(
            _dtype(x.dtype),
            _dtype(residuals.dtype),
            x.data_ptr(),
            f.data_ptr(),
            [residual.data_ptr() for residual in residuals[:filled]],
            slot,
            gram.data_ptr(),
            norms.data_ptr(),
            memory,
            samples,
            size,
            _threads(),
        )
    return norms


def anderson_weights(gram: Tensor, valid: Tensor, regularization: float) -> Tensor:
    """As `reference.anderson_weights`."""
    samples, memory = valid.shape
    _check("gram", gram, (samples, memory, memory), torch.float64)
    _check("valid", valid, (samples, memory), torch.bool)
    gram, valid = gram.contiguous(), valid.contiguous()
    alpha = torch.empty(valid.shape, dtype=torch.float64, device="cpu")
    if alpha.numel():
        _module().anderson_weights(gram.data_ptr(), valid.data_ptr(), regularization, alpha.data_ptr(), samples, memory)
    return alpha


def anderson_mix(alpha: Tensor, images: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """As `reference.anderson_mix`; ``out`` [B, N], contiguous, gets the result where it is given."""
    (samples, size), dtype = images[0].shape, images[0].dtype
    alpha = alpha.to(torch.float64).contiguous()
    _check("alpha", alpha, (samples, len(images)), torch.float64)
    for image in images:
        _check("images", image, (samples, size), dtype)
    kept = [image.contiguous() for image in images]
    out = torch.empty_like(kept[0]) if out is None else out
    _check("out", out, (samples, size), dtype, written=True)
    if out.numel():
        _module().anderson_mix(
            _dtype(dtype),
            alpha.data_ptr(),
            [image.data_ptr() for image in kept],
            out.data_ptr(),
            samples,
            size,
            _threads(),
        )
    return out


def anderson_mix_differences(
    alpha: Tensor,
    f: Tensor,
    previous: Tensor | None,
    differences: Tensor,
    slot: int,
    out: Tensor | None = None,
) -> Tensor:
    """As `reference.anderson_mix_differences`; ``out`` [B, N], contiguous, gets the result where it is given."""
    memory, filled, (samples, size) = len(differences), alpha.shape[1], f.shape
    if not 1 <= filled <= memory:
        raise ValueError(f"alpha: got {filled} pairs, want 1 to the {memory} of the history")
    _check("alpha", alpha, (samples, filled), alpha.dtype)
    _check("differences", differences, (memory, samples, size), f.dtype, torch.bfloat16, written=True)
    f = f.contiguous()
    out = torch.empty_like(f) if out is None else out
    _check("out", out, f.shape, f.dtype, written=True)
    if not out.numel():
        return out
    if previous is None or filled == 1:
        return out.copy_(f)
    _check("previous", previous, f.shape, f.dtype)
    previous = previous.contiguous()
    ring = [(slot - age) % memory for age in range(filled)]
    weights = (1 - alpha[:, ring].to(torch.float64).cumsum(1))[:, : filled - 1].contiguous()
    _module().anderson_mix_differences(
        _dtype(f.dtype),
        _dtype(differences.dtype),
        weights.data_ptr(),
        f.data_ptr(),
        previous.data_ptr(),
        [differences[j].data_ptr() for j in ring[:-1]],
        out.data_ptr(),
        samples,
        size,
        _threads(),
    )
    return out


def winograd_weights(weight: Tensor) -> Tensor:
    """G g Gᵀ of each kernel of a float32 weight [out, in, 3, 3], laid out for this CPU's `conv3x3`."""
    out_channels, in_channels = weight.shape[:2]
    _check("weight", weight, (out_channels, in_channels, 3, 3), torch.float32)
    weight = weight.contiguous()
    out = torch.empty(_module().winograd_size(in_channels, out_channels), dtype=torch.float32, device="cpu")
    _module().winograd_weights(weight.data_ptr(), out.data_ptr(), in_channels, out_channels, _threads())
    return out


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, transformed: Tensor | None = None
) -> Tensor:
    """As `reference.conv3x3`, in float32 and channels-last; ``transformed`` is `winograd_weights` of the weight."""
    batch, channels, height, width = x.shape
    out_channels = len(weight)
    _check("x", x, x.shape, torch.float32)
    _check("weight", weight, (out_channels, channels, 3, 3), torch.float32)
    transformed = winograd_weights(weight) if transformed is None else transformed
    _check("transformed", transformed, (_module().winograd_size(channels, out_channels),), torch.float32)
    if bias is not None:
        _check("bias", bias, (out_channels,), torch.float32)
        bias = bias.contiguous()
    x, transformed = x.contiguous(memory_format=torch.channels_last), transformed.contiguous()
    out = _empty((batch, out_channels, height, width), x.dtype, torch.channels_last)
    if out.numel():
        _module().convolution(
            *(_address(t) for t in (x, transformed, bias, out)),
            relu,
            (batch, height, width, channels, out_channels),
            _threads(),
        )
    return out


def conv3x3_weight_gradient(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.conv3x3_weight_gradient`, in float32."""
    batch, channels, height, width = x.shape
    out_channels = gradient.shape[1]
    _check("x", x, x.shape, torch.float32)
    _check("gradient", gradient, (batch, out_channels, height, width), torch.float32)
    x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    weight, bias = (x.new_zeros(shape) for shape in ((out_channels, channels, 3, 3), (out_channels,)))
    if x.numel() and gradient.numel():
        _module().weight_gradient(
            *(_address(t) for t in (x, gradient, weight, bias)),
            (batch, height, width, channels, out_channels),
            _threads(),
        )
    return weight, bias
