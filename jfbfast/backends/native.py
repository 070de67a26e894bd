"""The functions of `reference` in C++ (csrc/), on the CPU.

C++ gets addresses and shapes, so everything that a kernel reads or writes must have been checked. The ops check the
arguments of the blur and of the convolution (jfbfast/operators/ops.py, conv3x3.py); the rest is checked here.

``AVAILABLE`` is False if the compiled module did not load, and ``UNAVAILABLE_BECAUSE`` says why. The environment
variable JFBFAST_ISA limits the instruction set: "avx512", "avx2" or "baseline".
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch.utils.dlpack  # before the compiled module, so that both share one OpenMP runtime
from torch import Tensor

from .reference import Bands
from .tensors import margin

_ISAS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "baseline"}
if (_limit := os.environ.get("JFBFAST_ISA")) and _limit not in _ISAS:
    raise ValueError(f"JFBFAST_ISA is {_limit!r}; it takes one of {', '.join(map(repr, _ISAS))}")

_native: Any = None
UNAVAILABLE_BECAUSE = ""
try:
    _native = import_module("jfbfast._native")
except ImportError as error:
    UNAVAILABLE_BECAUSE = f"the compiled module jfbfast._native did not load: {error}".splitlines()[0]
AVAILABLE = not UNAVAILABLE_BECAUSE
_DTYPES = {getattr(torch, name): dtype for name, dtype in _native.DType.__members__.items()} if AVAILABLE else {}
MAX_MEMORY: int = _native.MAX_MEMORY if AVAILABLE else 0  # of an Anderson solve; the shared loop takes a longer one
_POOLED_BYTES = 1 << 16  # from this size on, a fresh allocation is slower than the pool

_threads = torch.get_num_threads


def _after_fork() -> None:
    global _threads
    _threads = lambda: 1  # noqa: E731  # OpenMP's threads do not exist in the child


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


def describe() -> str:
    """The kernels in use, such as "C++ (AVX-512, OpenMP, 2 threads)", or why there are none."""
    if not AVAILABLE:
        return f"unavailable: {UNAVAILABLE_BECAUSE}"
    threads = f"OpenMP, {_threads()} threads" if _native.openmp else "1 thread"
    return f"C++ ({_ISAS[_native.isa]}, {threads})"


def _check(*arguments: tuple[str, Tensor, Sequence[int], tuple[torch.dtype, ...]], written: Sequence[str] = ()) -> None:
    """Raise ValueError unless each (name, tensor, shape, dtypes) fits, on the CPU; contiguous if ``written``."""
    for name, tensor, shape, dtypes in arguments:
        fits = tensor.shape == tuple(shape) and tensor.dtype in dtypes and tensor.device.type == "cpu"
        if not fits or (name in written and not tensor.is_contiguous()):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()} on "
                f"{tensor.device}; it takes {'contiguous ' if name in written else ''}{' or '.join(map(str, dtypes))} "
                f"of shape {tuple(shape)} on cpu"
            )


def _empty(
    shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """An uninitialised result, never a view. A large one reuses the memory of an earlier result (csrc/pool.cpp).

    torch cannot `resize_` the storage of a large one, since it is not from torch's allocator.
    """
    if math.prod(shape) * dtype.itemsize < _POOLED_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)
    strides = _strides(tuple(shape), memory_format)
    return torch.utils.dlpack.from_dlpack(_native.empty(list(shape), strides, _DTYPES[dtype]))


@lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...], memory_format: torch.memory_format) -> list[int]:
    return list(torch.empty(shape, device="meta", memory_format=memory_format).stride())


def _tables(bands: Bands) -> tuple[tuple[int, int], tuple[int, int]]:
    """The address and the radius of each table."""
    y, x, _ = bands
    return (y.data_ptr(), y.shape[1] // 2), (x.data_ptr(), x.shape[1] // 2)


def blur(x: Tensor, bands: Bands) -> Tensor:
    """As `reference.blur`."""
    x = x.contiguous()
    out = _empty(x.shape, x.dtype)
    if x.numel():
        planes, tables = (x.shape[:-2].numel(), *x.shape[-2:]), (*_tables(bands), bands.circular)
        _native.blur(_DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), planes, *tables, _threads())
    return out


def gradient(
    x: Tensor, d: Tensor | None, r: Tensor | None, bands: Bands, adjoint: Bands, step_size: Tensor | None = None
) -> Tensor:
    """As `reference.gradient`."""
    x = x.contiguous()
    d = None if d is None else d.contiguous()
    r = None if r is None else r.contiguous()
    out = _empty(x.shape, x.dtype)
    if x.numel():
        images = x.data_ptr(), 0 if d is None else d.data_ptr(), 0 if r is None else r.data_ptr(), out.data_ptr()
        planes = (x.shape[:-2].numel(), *x.shape[-2:])
        lacking = (0, 0) if d is None else margin(x, d)
        tables = (*_tables(bands), *_tables(adjoint), bands.circular)
        step = (False, 0.0) if step_size is None else (True, float(step_size))
        _native.gradient(_DTYPES[x.dtype], *images, planes, lacking, *tables, *step, _threads())
    return out


def anderson_append(x: Tensor, f: Tensor, residuals: Tensor, gram: Tensor, slot: int, filled: int) -> Tensor:
    """As `reference.anderson_append`."""
    memory, (samples, size) = len(residuals), x.shape
    _check(
        ("f", f, x.shape, (x.dtype,)),
        ("residuals", residuals, (memory, samples, size), (x.dtype, torch.bfloat16)),
        ("gram", gram, (samples, memory, memory), (torch.float64,)),
        written=("residuals", "gram"),
    )
    if not 0 <= slot < filled <= memory:
        raise ValueError(f"(slot, filled) is {(slot, filled)}; it takes 0 <= slot < filled <= {memory}")
    x, f = x.contiguous(), f.contiguous()
    norms = torch.zeros(samples, 2, dtype=torch.float64, device="cpu")
    if samples:
        dtypes, history = (_DTYPES[x.dtype], _DTYPES[residuals.dtype]), residuals[:filled].unbind()
        pair, addresses = (x.data_ptr(), f.data_ptr()), [residual.data_ptr() for residual in history]
        results = gram.data_ptr(), norms.data_ptr()
        _native.anderson_append(*dtypes, *pair, addresses, slot, *results, memory, samples, size, _threads())
    return norms


def anderson_weights(gram: Tensor, valid: Tensor, regularization: float) -> Tensor:
    """As `reference.anderson_weights`."""
    samples, memory = valid.shape
    _check(
        ("gram", gram, (samples, memory, memory), (torch.float64,)), ("valid", valid, (samples, memory), (torch.bool,))
    )
    gram, valid = gram.contiguous(), valid.contiguous()
    alpha = torch.empty(valid.shape, dtype=torch.float64, device="cpu")
    if alpha.numel():
        _native.anderson_weights(gram.data_ptr(), valid.data_ptr(), regularization, alpha.data_ptr(), samples, memory)
    return alpha


def anderson_mix(alpha: Tensor, images: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """As `reference.anderson_mix`; ``out`` must be contiguous."""
    shape, dtype = images[0].shape, images[0].dtype
    out = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out
    _check(
        ("alpha", alpha, (shape[0], len(images)), (alpha.dtype,)),
        ("out", out, shape, (dtype,)),
        *[("images", image, shape, (dtype,)) for image in images],
        written=("out",),
    )
    alpha, kept = alpha.to(torch.float64).contiguous(), [image.contiguous() for image in images]
    if out.numel():
        addresses = [image.data_ptr() for image in kept]
        _native.anderson_mix(_DTYPES[dtype], alpha.data_ptr(), addresses, out.data_ptr(), *shape, _threads())
    return out


class AndersonSolve:
    """One solve of a batch by Anderson's method; a step is one call of C++ for the whole batch.

    Each sample counts its own evaluations and stops by itself. From then on its row of the iterates stays at the
    iterate after its value.

    Args:
        x: the start, (B, N), contiguous, on the CPU, of any dtype of an image.
        tol, atol, memory, regularization, history_dtype: as in `jfbfast.Anderson`; ``memory`` up to `MAX_MEMORY`.
        budget: the most evaluations of each sample, (B,), int64, at least 1.
        stall_floor: a stalled sample stops if its relative residual is at most this; None for never.

    Raises:
        ValueError: x, ``budget`` or ``memory`` is none of these.
    """

    def __init__(
        self,
        x: Tensor,
        *,
        tol: float,
        budget: Tensor,
        atol: float = 0.0,
        memory: int = 5,
        regularization: float = 1e-10,
        history_dtype: torch.dtype | None = None,
        stall_floor: float | None = None,
    ) -> None:
        if x.dim() != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; it takes (B, N)")
        if not 1 <= memory <= MAX_MEMORY:
            raise ValueError(f"memory is {memory}; it takes an integer from 1 to {MAX_MEMORY}")
        samples, size = x.shape
        budget = budget.contiguous()
        _check(("x", x, x.shape, tuple(_DTYPES)), ("budget", budget, (samples,), (torch.int64,)), written=("x",))
        history = history_dtype or x.dtype
        differences = history != x.dtype
        if differences and (x.dtype, history) != (torch.float32, torch.bfloat16):
            raise ValueError(
                f"history_dtype is {history} for an x of {x.dtype}; it takes None, or bfloat16 for float32"
            )
        self._other = _empty(x.shape, x.dtype)  # for the next iterates; after a step, those that it was given
        self._rows: Tensor | None = None  # the sample of each row of x, once some have left
        self._value, self._following = _empty(x.shape, x.dtype), _empty(x.shape, x.dtype)
        self._residual = torch.full((samples,), torch.nan, dtype=torch.float64)
        self._iterations = torch.zeros(samples, dtype=torch.int64)
        self._status = torch.ones(samples, dtype=torch.int64)
        self._running = torch.ones(samples, dtype=torch.bool)
        ring = (memory, samples, size)
        residuals, images = _empty(ring, history), _empty(x.shape if differences else ring, x.dtype)
        kept = _empty(ring, history) if differences else None
        found = self._value, self._following, self._residual, self._iterations, self._status, self._running
        self._tensors = residuals, images, kept, *found, budget
        numbers = tol, atol, regularization, -1.0 if stall_floor is None else stall_floor
        addresses = [0 if each is None else each.data_ptr() for each in self._tensors]
        self._state = _native.Anderson(_DTYPES[x.dtype], _DTYPES[history], memory, samples, size, numbers, addresses)

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        """Take the pairs (x, f = T(x)) and return the next iterates.

        x must be the start or what the last step returned, with the rows that `select` kept. The step after this one
        writes over it.
        """
        following = self._other
        shape, dtype = following.shape, following.dtype
        for name, each in (("x", x), ("f", f)):
            if each.shape != shape or each.dtype != dtype or not each.is_cpu:
                _check((name, each, shape, (dtype,)))
        x, f = x.contiguous(), f.contiguous()
        self._state.step(x.data_ptr(), f.data_ptr(), following.data_ptr(), _threads())
        self._other = x
        return following

    def running(self) -> Tensor:
        """Which rows of x still run, bool (rows,)."""
        return self._running if self._rows is None else self._running[self._rows]

    def select(self, keep: Tensor) -> Tensor:
        """Continue with these rows of x only, bool (rows,), without moving the history; return their indices."""
        rows = keep.nonzero()[:, 0]
        self._state.select(rows.tolist(), self._other.data_ptr())
        self._rows = rows if self._rows is None else self._rows[rows]
        self._other = _empty((len(rows), self._value.shape[1]), self._value.dtype)
        return rows

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The value (B, N), ‖f − x‖ / ‖f‖ there, iterations and status, (B,) each, and the following iterates (B, N).

        They are as in `jfbfast.FixedPointSolution`, in the order of the batch at the start.

        Raises:
            RuntimeError: a sample still runs.
        """
        if self._running.any():
            raise RuntimeError("a sample still runs; `finish` takes a batch whose samples have all stopped")
        return self._value, self._residual, self._iterations, self._status, self._following


_WINOGRAD_DTYPES = (torch.float32, torch.bfloat16)


def winograd_weights(weight: Tensor, adjoint: bool = False) -> Tensor:
    """G g Gᵀ of each kernel of a float32 weight [out, in, 3, 3], laid out for this CPU's `conv3x3`.

    With ``adjoint``, of the adjoint of a weight [in, out, 3, 3]: channels exchanged, kernels rotated by 180°.
    """
    out_channels, in_channels = reversed(weight.shape[:2]) if adjoint else weight.shape[:2]
    _check(("weight", weight, (*weight.shape[:2], 3, 3), (torch.float32,)))
    if weight.stride(2) != 3 * weight.stride(3):  # contiguous and channels-last ones are read as they are
        weight = weight.contiguous()
    out = _empty((_native.winograd_size(in_channels, out_channels),), torch.float32)
    outer, inner, _, tap = weight.stride()
    read = weight.data_ptr(), (outer, inner, tap)
    _native.winograd_weights(*read, out.data_ptr(), in_channels, out_channels, adjoint, _threads())
    return out


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    transformed: Tensor | None = None,
    adjoint: bool = False,
) -> Tensor:
    """As `reference.conv3x3`, channels-last, for images in float32 or bfloat16; it computes in float32.

    ``transformed`` is `winograd_weights` of the weight.
    """
    batch, channels, height, width = x.shape
    out_channels = weight.shape[1] if adjoint else weight.shape[0]
    transformed = winograd_weights(weight.to(torch.float32), adjoint) if transformed is None else transformed
    size = _native.winograd_size(channels, out_channels)
    _check(("x", x, x.shape, _WINOGRAD_DTYPES), ("transformed", transformed, (size,), (torch.float32,)))
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it takes {(out_channels,)}")
    x, transformed = x.contiguous(memory_format=torch.channels_last), transformed.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    out = _empty((batch, out_channels, height, width), x.dtype, torch.channels_last)
    if out.numel():
        read = x.data_ptr(), transformed.data_ptr(), 0 if bias is None else bias.data_ptr()
        shape = batch, height, width, channels, out_channels
        _native.convolution(_DTYPES[x.dtype], *read, out.data_ptr(), relu, shape, _threads())
    return out


def conv3x3_weight_gradient(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.conv3x3_weight_gradient`, for images in float32 or bfloat16; it computes in float32."""
    batch, channels, height, width = x.shape
    out_channels = gradient.shape[1]
    shape = batch, out_channels, height, width
    _check(("x", x, x.shape, _WINOGRAD_DTYPES), ("gradient", gradient, shape, (x.dtype,)))
    x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    weight, bias = (x.new_zeros(n, dtype=torch.float32) for n in ((out_channels, channels, 3, 3), (out_channels,)))
    if x.numel() and gradient.numel():
        addresses = [t.data_ptr() for t in (x, gradient, weight, bias)]
        _native.weight_gradient(
            _DTYPES[x.dtype], *addresses, (batch, height, width, channels, out_channels), _threads()
        )
    return weight.to(x.dtype), bias.to(x.dtype)
