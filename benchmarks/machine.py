"""What was measured on: the machine, and how fast its memory is."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import jfbfast
from jfbfast.backends import native

from .timing import spread, timed

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
_TRIAD_SAMPLES = 7
_BUSY = 0.5  # of the cores, as a load average


@dataclass(frozen=True)
class Machine:
    """What names a run; every row of the CSV carries it."""

    device: str
    instruction_sets: str
    threads: int
    kernels: str
    torch: str
    jfbfast: str


def _cpu() -> tuple[str, str]:
    """The CPU's name and those of its instruction sets that matter here."""
    fields = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = fields.get("flags", fields.get("Features", "")).split()
    known = [name for name in _INSTRUCTION_SETS if name in flags]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, " ".join(known) or torch.backends.cpu.get_cpu_capability()


def describe(device: torch.device) -> Machine:
    name, instruction_sets = _cpu()
    kernels = native.describe()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, instruction_sets = torch.cuda.get_device_name(device), f"sm_{major}{minor}"
        kernels = "Triton"
    version = str(torch.__version__)
    return Machine(name, instruction_sets, torch.get_num_threads(), kernels, version, jfbfast.__version__)


def disturbance() -> str | None:
    """What to say of a machine that other programs are using, by the load average of the last minute."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < _BUSY * cores:
        return None
    return f"other programs are using this machine (load {load:.1f} on {cores} cores): do not trust these figures"


def triad(size: int, device: torch.device) -> Callable[[], object]:
    """STREAM's triad a = b + s·c by ``torch.add(b, c, alpha=s, out=a)``; all three arrays take ``size`` bytes."""
    a, b, c = (torch.rand(max(size // 12, 1), device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=0.5, out=a)


def bandwidth_samples(size: int, device: torch.device) -> list[float]:
    """Bytes a second of the triad on arrays of ``size`` bytes, which are to be larger than the caches."""
    sampler = timed(triad(size, device), device)
    sampler.sample()
    return [size / sampler.sample() for _ in range(_TRIAD_SAMPLES)]


def bandwidth(samples: list[float]) -> float:
    return spread(samples).median
