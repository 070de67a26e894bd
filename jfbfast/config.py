"""What this installation runs on: `jfbfast.show_config()`."""

from __future__ import annotations

import ctypes
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from jfbfast.backends import cuda, fused, graphs, native
from jfbfast.backends.dispatch import selected_backend

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_KEPT_BYTES = 1 << 30


def _triton() -> str:
    if find_spec("triton") is None:
        return "unavailable: triton is not installed (pip install 'jfbfast[cuda]')"
    if not torch.cuda.is_available():
        return "unavailable: torch sees no CUDA device"
    return f"Triton {version('triton')} on {torch.cuda.get_device_name()}"


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory instead of returning it to the system.

    Training on the CPU frees and allocates every activation. Mapping and zeroing that memory afresh each time
    takes up to half of a training step. The setting applies to the whole process, so no library should call this
    for you: call it at the start of a program, as the command line does.

    Returns:
        Whether the C library accepted the setting; only glibc (Linux) does.

    Example:
        >>> import jfbfast
        >>> jfbfast.keep_freed_memory() in (True, False)
        True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    taken = [mallopt(option, _KEPT_BYTES) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(taken)


def show_config() -> None:
    """Print the versions, and which backends are in use or why not.

    Example:
        >>> import jfbfast
        >>> jfbfast.show_config()  # doctest: +ELLIPSIS
        jfbfast ...
        native (CUDA) ...
    """
    try:
        own = version("jfbfast")
    except PackageNotFoundError:
        own = "not installed"
    entries = {
        "jfbfast": own,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "backend": selected_backend(),
        "native (CPU)": native.describe(),
        "triton (CUDA)": _triton(),
        "native (CUDA)": cuda.describe(),
        "cuDNN, fused": fused.describe(),
        "CUDA graphs": graphs.describe(),
    }
    width = max(map(len, entries))
    for name, text in entries.items():
        print(f"{name:<{width}}  {text}")
