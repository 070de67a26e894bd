"""Compile the Triton kernels ahead of time, without a GPU, and read the figures of the machine code."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
IMAGES = ("x", "d", "r", "start", "out", "bias", "addend")
TABLES = ("band_y", "band_x", "adjoint_y", "adjoint_x")


class Compiled(NamedTuple):
    """Registers a thread, bytes of stack (spills) and shared memory, and the global accesses in the code by kind."""

    registers: int
    stack: int
    shared: int
    accesses: Counter[str]


def compile_kernel(
    kernel: Any, constants: dict[str, int | bool], architecture: int, directory: Path,
    *, image: str = "fp32", absent: tuple[str, ...] = (),
) -> Compiled:  # fmt: skip
    """Compile for 16-byte aligned tensors; ``absent`` arguments are None."""
    accumulator = "fp64" if image == "fp64" else "fp32"
    signature = {}
    for name in kernel.arg_names:
        if name in constants or name in absent:
            signature[name] = "constexpr"
        elif name in IMAGES:
            signature[name] = f"*{image}"
        elif name in TABLES:
            signature[name] = f"*{accumulator}"
        else:
            signature[name] = "*fp32" if name == "step_size" else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, {**constants, **dict.fromkeys(absent)}, aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 1})
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())  # type: ignore
    code = compiled.asm["ptx"]
    accesses = Counter(re.findall(r"\b((?:ld|st)\.global(?:\.v\d)?\.b\d+)\b", code))
    return Compiled(registers, stack + local, compiled.metadata.shared, accesses)
