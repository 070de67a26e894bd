"""What the parts of `jfbfast bench gpu` share: where they run, their findings, and how they time a call.

Each finding is one JSON object in $OUT/results.jsonl, written at once, so that a part that runs out of time keeps its
findings. GPU_CHECK_CPU=1 runs the parts on the CPU at tiny sizes, and GPU_CHECK_QUICK=1 on the GPU at fewer sizes.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Problem, Weights, problem, trained, untrained
from ..timing import first_line, timed

CPU = os.environ.get("GPU_CHECK_CPU") == "1"
QUICK = os.environ.get("GPU_CHECK_QUICK") == "1"
DEVICE = torch.device("cpu" if CPU else "cuda:0")
OUT = Path(os.environ.get("OUT", "."))
SIZES = (16,) if CPU else (128, 64) if QUICK else (128, 64, 256)  # in order of value
BATCH = 2 if CPU else 16
ROUNDS = 2 if CPU else 15


def say(part: str, **found: Any) -> None:
    """Write one finding, and print it."""
    with (OUT / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part, **found}, default=str) + "\n")
    told = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found.items()}
    print(part, *(f"{name}={value}" for name, value in told.items()), flush=True)


def attempt(part: str, name: str, check: Callable[[], dict[str, Any]]) -> None:
    """Run one check; a failure is a finding, after which the next check runs."""
    try:
        found = {"ok": True, **check()}
        synchronize()
        say(part, name=name, **found)
    except Exception as error:
        say(part, name=name, ok=False, error=f"{type(error).__name__}: {first_line(error)}")
        traceback.print_exc()
        if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
            raise SystemExit(f"{part}: the CUDA context is lost, this part ends") from None


def synchronize() -> None:
    """Wait for the device."""
    if not CPU:
        torch.cuda.synchronize()


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def median_ms(call: Callable[[], object], graph: bool = True) -> float:
    """Milliseconds of a call, a median: on the GPU from a CUDA graph, or else with its launches by the wall clock."""

    def waiting() -> None:
        call()
        synchronize()

    sampler = timed(call, DEVICE) if graph else timed(waiting, torch.device("cpu"))
    sampler.sample()
    return 1e3 * median(sampler.sample() for _ in range(ROUNDS))


@contextmanager
def convolution_precision(precision: str) -> Iterator[None]:
    """Run float32 convolutions in "ieee" or "tf32"; matrix products stay as torch has them."""
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before


class Network(NamedTuple):
    """A denoiser in its layer."""

    name: str
    weights: Weights
    layer: str
    evaluations: int  # about as many as a solve to 1e-3 takes

    def problem(self, size: int, half: bool = False) -> Problem:
        """A batch to restore on the device."""
        return problem(self.weights, size, BATCH, DEVICE, self.layer, half)


def networks() -> Iterator[Network]:
    """A DnCNN and a U-Net."""
    yield Network("DnCNN", untrained(8, 3) if CPU else untrained(64, 17), "preconditioned", 6)
    yield Network("U-Net", trained("gaussian5-sigma1"), "filtered", 3)
