"""The C++ kernels under the address and undefined-behaviour sanitizers, and what those must catch."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.sources import Patch, copy_sources

ROOT = Path(__file__).parents[2]
BASELINE = ("-DJFBFAST_ISA=baseline",)
AVX512 = (
    "-DJFBFAST_ISA=avx512", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
)  # fmt: skip


def run(folder: Path, flags: tuple[str, ...], patch: Patch | None = None) -> subprocess.CompletedProcess[str]:
    """Build and run the driver, with a patch to the sources if one is given."""
    sources = copy_sources(ROOT / "csrc", folder, patch)
    program = folder / "driver"
    subprocess.run(
        ["g++", "-std=c++17", "-O0", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
         *flags, f"-I{sources}", str(ROOT / "tests" / "backends" / "sanitizer_driver.cpp"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    return subprocess.run([str(program)], capture_output=True, text=True)


def has_avx512() -> bool:
    info = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and info.exists() and "avx512vl" in info.read_text(encoding="utf-8")


pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with its sanitizers")
SETS = [pytest.param(BASELINE, marks=[pytest.mark.slow] * has_avx512(), id="baseline")]
SETS += [pytest.param(AVX512, id="avx512")] * has_avx512()


@pytest.mark.parametrize("flags", SETS)
def test_the_kernels_are_sound(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The default run has the widest set that the CPU has; each takes ten seconds to compile and run."""
    done = run(tmp_path, flags)
    assert done.returncode == 0, done.stdout + done.stderr


BROKEN = {
    "a store past the row's end": (
        ("simd.h", "std::memcpy(static_cast<void*>(p), &raw, part.count * sizeof(S));",
         "std::memcpy(static_cast<void*>(p), &raw, (part.count + 1) * sizeof(S));"),
        "heap-buffer-overflow",
    ),
    "a load past the row's end": (
        ("simd.h", "std::memcpy(&raw, p, part.count * sizeof(S));",
         "std::memcpy(&raw, p, (part.count + 1) * sizeof(S));"),
        "heap-buffer-overflow",
    ),
    "a mix that reads past the sample": (
        ("anderson.cpp", "chunks(1, a_.size);", "chunks(1, a_.size + 1);"), "heap-buffer-overflow",
    ),
    "a budget that is not kept": (
        ("decide.cpp", "evaluations >= a.budget[sample]", "evaluations > a.budget[sample]"), "budget: got",
    ),
    "a table that is not the adjoint's": (
        ("gradient.cpp", "rows[k] = adjoint_weights + (i + k) * slots;", "rows[k] = weights + (i + k) * slots;"),
        "gradient_step: got",
    ),
    "a tile that reads past the image": (
        ("winograd.cpp", "y < height && z >= 0", "y <= height && z >= 0"), "heap-buffer-overflow",
    ),
    "points that differ from side to side": (
        ("winograd.h", "y[2] = float(kA2) * sum_a", "y[2] = float(kB2) * sum_a"), "convolution: got",
    ),
    "a whole tile that reads past the image": (
        ("winograd.cpp", "left + Span <= width)", "left + Span <= width + 1)"), "convolution: got",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_caught(tmp_path: Path, name: str) -> None:
    patch, complaint = BROKEN[name]
    done = run(tmp_path, BASELINE, patch)
    assert done.returncode != 0 and complaint in done.stdout + done.stderr
