"""What this installation runs on: `jfbfast.show_config()`."""

from __future__ import annotations

import ctypes
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from jfbfast.backends import cuda, native
from jfbfast.backends import dispatch as backends

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 1 << 30


def _triton() -> str:
    if find_spec("triton") is None:
        return "no: triton is not installed"
    if not torch.cuda.is_available():
        return "no: torch sees no CUDA device"
    return f"Triton {version('triton')} on {torch.cuda.get_device_name()}"


def config() -> dict[str, str]:
    """Versions, and for each backend what it is, or why it is not in use."""
    try:
        own = version("jfbfast")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "jfbfast": own,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "backend": backends.selected_backend(),
        "native (CPU)": native.describe() if native.AVAILABLE else f"no: {native.WHY_NOT}",
        "triton (CUDA)": _triton(),
        "native (CUDA)": f"no: {cuda.WHY_NOT}" if cuda.WHY_NOT else cuda.describe(),
    }


def keep_freed_memory() -> bool:
    """Have the C library keep the memory that is freed, in place of giving it back to the system.

    Training on the CPU frees and allocates every activation; where each is mapped and zeroed afresh,
    that takes up to half of a step. It changes the whole process, so no library should call it for you:
    call it at the start of a program, as the command line does.

    Returns:
        Whether the C library took it; only glibc (Linux) does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    taken = [mallopt(option, _KEPT_BYTES) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(taken)


def show_config() -> None:
    """Print which backends are in use, and why another is not."""
    entries = config()
    width = max(map(len, entries))
    for name, text in entries.items():
        print(f"{name:<{width}}  {text}")
