"""Anderson's method on a GPU (csrc/cuda/): every decision of an iteration is taken on the device, without the host.

The compiled module is loaded at the first use, not at import, since a process that has asked CUDA for its devices
cannot be forked.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

MAX_MEMORY = 16  # `dispatch.kernels` leaves a longer memory to the host

_RUNNING = -1  # a status of the kernels; the others are those of jfbfast.Status

# Each sample's numbers by what they start from, one piece of memory each, so that one launch sets them all;
# csrc/cuda/anderson.h explains the fields of the same names. Bytes of ones are a NaN in float64, and −1 in int32.
_ZERO = ("action", "iterations", "pairs", "since")  # int32
_INFINITE = ("lowest", "guarded", "mark")  # float64
_ONES = ("first_residual", "first_image", "residual")  # float64
_ONES_INTEGERS = ("status", "best")  # int32


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason."""
    if not torch.cuda.is_available():
        return None, "torch sees no CUDA device"
    try:
        return import_module("jfbfast._cuda"), ""
    except ImportError as error:
        return None, f"the compiled module jfbfast._cuda did not load: {error}".splitlines()[0]


@cache
def unavailable_because(device: int) -> str:
    """Why the kernels do not run on the CUDA device of this number; an empty string if they do."""
    module, why = _load()
    return why if module is None else module.why_unusable(device) or ""


def describe() -> str:
    """The kernels in use, such as "CUDA (NVIDIA H100, sm_90)", or why there are none."""
    if why := unavailable_because(torch.cuda.current_device() if torch.cuda.is_available() else 0):
        return f"unavailable: {why}"
    major, minor = torch.cuda.get_device_capability()
    return f"CUDA ({torch.cuda.get_device_name()}, sm_{major}{minor})"


class AndersonSolve:
    """The device memory of one Anderson solve of a batch, and its step.

    A step is three launches on the current stream. It neither waits for the device nor allocates memory,
    so a CUDA graph can capture it, and replay it as long as x and f stay at their addresses. Each sample
    counts its own iterations and stops by itself; from then on its row of x does not change.

    Args:
        x: the start, (B, N), float32 or float64, contiguous, on a CUDA device.
        tol, atol, memory, regularization: as in `jfbfast.Anderson`; ``memory`` from 1 to 16.
        history_dtype: ``torch.bfloat16`` keeps the history of a float32 solve as differences in bfloat16,
            in addition to the newest two pairs in float32; None keeps it in the dtype of x.
        budget: the most steps of each sample, (B,), int64 on the device of x; None for no limit.
        stall_floor: a stalled sample stops if its relative residual is at most this; None for never.

    Raises:
        RuntimeError: the compiled module is missing, or CUDA refused a launch.
        ValueError: x is not such a tensor.
    """

    def __init__(
        self,
        x: Tensor,
        *,
        tol: float,
        atol: float = 0.0,
        memory: int = 5,
        regularization: float = 1e-10,
        history_dtype: torch.dtype | None = None,
        budget: Tensor | None = None,
        stall_floor: float | None = None,
    ) -> None:
        wide = x.dtype == torch.float64
        if not x.is_cuda or x.dim() != 2 or not (wide or x.dtype == torch.float32) or not x.is_contiguous():
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}; it takes "
                "a contiguous float32 or float64 tensor (B, N) on a CUDA device"
            )
        self._device = x.get_device()
        module, why = _load()
        if module is None:
            raise RuntimeError(f"no CUDA kernels: {why}")
        samples, size = x.shape
        differences = history_dtype == torch.bfloat16 and memory > 1
        numbers = {"tol": tol, "atol": atol, "regularization": regularization, "stall_floor": stall_floor or 0.0}
        self._state = state = module.Anderson(
            float64=wide, differences=differences, memory=memory, samples=samples, size=size, **numbers
        )

        def buffer(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        self._zero = buffer(torch.int32, len(_ZERO), samples)
        self._infinite = buffer(torch.float64, len(_INFINITE), samples)
        self._ones = buffer(torch.uint8, 32 * samples)
        self._told = self._ones[16 * samples : 28 * samples]  # the residuals and the statuses, for the host
        self._tol = tol
        self._buffers = {
            **dict(zip(_ZERO, self._zero, strict=True)),
            **dict(zip(_INFINITE, self._infinite, strict=True)),
            **dict(zip(_ONES, self._ones[: 24 * samples].view(torch.float64).view(3, samples), strict=True)),
            **dict(zip(_ONES_INTEGERS, self._ones[24 * samples :].view(torch.int32).view(2, samples), strict=True)),
            "gram": buffer(torch.float64, samples, memory, memory),
            "weights": buffer(torch.float64, samples, memory),
            "partials": buffer(torch.float64, samples, state.products, state.chunks),
            "value": buffer(x.dtype, samples, size),
            "following": buffer(x.dtype, samples, size),
            "residuals": buffer(x.dtype, state.ring, samples, size),
            "images": buffer(x.dtype, state.ring, samples, size),
        }
        if differences:
            for name in ("residual_differences", "image_differences"):
                self._buffers[name] = buffer(torch.bfloat16, memory - 1, samples, size)
        if budget is not None:
            self._buffers["budget"] = budget.contiguous()
        if stall_floor is None:
            del self._buffers["since"], self._buffers["mark"]
        for name, tensor in self._buffers.items():
            setattr(state, name, tensor.data_ptr())
        self._seen = [
            (torch.empty(12 * samples, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)
        ]
        self.forget()
        self.restart(x)

    def forget(self) -> None:
        """What the host knows of a solve is that of its start again."""
        self._looks = 0
        self._before: Tensor | None = None  # the residuals that the last look has seen
        self._rows: Tensor | None = None  # the sample of each row of x, once some have left
        self._kept: Tensor | None = None  # the same on the host

    def restart(self, x: Tensor) -> None:
        """What the device knows of a solve is that of the start x (B, N) again."""
        self._zero.zero_()
        self._infinite.fill_(torch.inf)
        self._ones.fill_(255)
        self._buffers["gram"].zero_()
        self._buffers["value"].copy_(x)

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        """Take the pairs (x, f = T(x)), write the next iterates over x, and return x."""
        value = self._buffers["value"]
        batch = len(value) if self._rows is None else len(self._rows)
        want = (batch, value.shape[1]), value.dtype, value.device
        for name, tensor in (("x", x), ("f", f)):
            got = tuple(tensor.shape), tensor.dtype, tensor.device
            if got != want:
                raise ValueError(f"{name} has (shape, dtype, device) {got}; it takes {want}")
        if not x.is_contiguous():
            raise ValueError(f"x has strides {x.stride()}; it takes a contiguous tensor")
        f = f.contiguous()
        if x.numel():
            rows = 0 if self._rows is None else self._rows.data_ptr()
            with torch.cuda.device(self._device):
                stream = torch.cuda.current_stream().cuda_stream
                self._state.step(self._device, stream, x.data_ptr(), f.data_ptr(), rows, batch)
        return x

    def running(self) -> Tensor:
        """Which rows of x may still run, bool (rows,) on the CPU: those that ran at the previous call.

        It waits until the device has reached the previous call only, so that the launches since stay queued. But if
        the residuals should by now have fallen below the tolerance, it waits for this step too, and so saves an
        evaluation that nobody needs.
        """
        told, copied = self._seen[self._looks % 2]
        told.copy_(self._told, non_blocking=True)
        copied.record(torch.cuda.current_stream(self._device))
        self._looks += 1
        if self._looks == 1:
            return torch.ones(len(self._told) // 12, dtype=torch.bool)
        residual, running = self._look(self._looks % 2)
        before, self._before = self._before, residual
        if before is not None and bool((residual * (residual / before) <= self._tol)[running].all()):
            running = self._look((self._looks + 1) % 2)[1]
        return running if self._kept is None else running[self._kept]

    def _look(self, slot: int) -> tuple[Tensor, Tensor]:
        """The relative residuals, and which samples run, after the step whose copy is in this slot."""
        told, copied = self._seen[slot]
        copied.synchronize()
        residual, status = _parts(told)
        return residual.clone(), status == _RUNNING

    def select(self, keep: Tensor) -> Tensor:
        """Continue with these rows of x only, bool (rows,) on the CPU, without moving the history.

        Returns:
            Their indices on the device, for selecting the same rows of x and of the inputs.
        """
        kept = torch.arange(len(self._buffers["value"])) if self._kept is None else self._kept
        self._kept = kept[keep]
        device = self._buffers["value"].device
        self._rows = self._kept.to(device, torch.int32, non_blocking=True)
        return keep.nonzero()[:, 0].to(device, non_blocking=True)

    def take_rows(self, rows: Tensor | None, order: Tensor | None = None) -> None:
        """Continue with the samples in ``rows``, int32 on the device, of x: all if None.

        Args:
            rows: the samples; they are read at each step, as a CUDA graph needs it.
            order: which of the rows of x so far these are, on the CPU; None leaves what `running` returns as it is.
        """
        self._rows = rows
        if order is not None:
            self._kept = order if self._kept is None else self._kept[order]

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """End the solve: the value (B, N), ‖f − x‖ / ‖f‖ there, iterations and status, (B,) each, and following (B, N).

        They are as in `jfbfast.FixedPointSolution`, in the order of the batch at the start, except that a
        sample that never had a finite residual keeps its start as its value.
        """
        buffers = self._buffers
        if buffers["value"].numel():
            with torch.cuda.device(self._device):
                self._state.finish(self._device, torch.cuda.current_stream().cuda_stream)
        value, residual, following = (buffers[name] for name in ("value", "residual", "following"))
        return value, residual, buffers["iterations"].long(), buffers["status"].long(), following


def _parts(told: Tensor) -> tuple[Tensor, Tensor]:
    """The residuals, float64, and the statuses, int32, in the bytes that the host is told, (12 B,)."""
    samples = len(told) // 12
    return told[: 8 * samples].view(torch.float64), told[8 * samples :].view(torch.int32)
