"""What this installation runs on: `jfbfast.show_config()`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from jfbfast import cuda, native, ops


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
        "backend": ops.selected_backend(),
        "native (CPU)": native.describe() if native.AVAILABLE else f"no: {native.WHY_NOT}",
        "triton (CUDA)": _triton(),
        "native (CUDA)": f"no: {cuda.WHY_NOT}" if cuda.WHY_NOT else cuda.describe(),
    }


def show_config() -> None:
    """Print which backends are in use, and why another is not."""
    entries = config()
    width = max(map(len, entries))
    for name, text in entries.items():
        print(f"{name:<{width}}  {text}")
