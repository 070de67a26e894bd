"""What a benchmark ran on: the machine, and the bandwidth of its memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import jfbfast
from jfbfast.backends import native

from .timing import timed

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
_BUSY = 0.5  # share of the cores, as a load average


def default_device() -> torch.device:
    """CUDA where there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """The device and the versions in use, as every row of a CSV repeats them."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, instruction_sets, kernels = torch.cuda.get_device_name(device), f"sm_{major}{minor}", "Triton"
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        flags = fields.get("flags", fields.get("Features", "")).split()
        known = " ".join(name for name in _INSTRUCTION_SETS if name in flags)
        instruction_sets = known or torch.backends.cpu.get_cpu_capability()
        name = fields.get("model name") or platform.processor() or platform.machine()
        kernels = native.describe()
    return {
        "device": name,
        "instruction_sets": instruction_sets,
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "torch": str(torch.__version__),
        "jfbfast": jfbfast.__version__,
    }


def about(device: torch.device) -> str:
    """The same in one line."""
    return "{device} ({instruction_sets}), {threads} threads; {kernels}; torch {torch}".format(**describe(device))


def disturbance() -> list[str]:
    """A warning if the load average of the last minute shows that other programs use the machine."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    warning = f"other programs are using this machine (load {load:.1f} on {cores} cores): do not trust these figures"
    return [warning] if load >= _BUSY * cores else []


def triad(size: int, device: torch.device) -> Callable[[], object]:
    """STREAM's triad a = b + s·c as ``torch.add(b, c, alpha=s, out=a)``; the three arrays take ``size`` bytes."""
    a, b, c = (torch.rand(max(size // 12, 1), device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=0.5, out=a)


def bandwidth_samples(size: int, device: torch.device) -> list[float]:
    """Measure the triad in bytes per second; ``size`` in bytes should exceed the caches."""
    sampler = timed(triad(size, device), device)
    sampler.sample()
    return [size / sampler.sample() for _ in range(7)]
