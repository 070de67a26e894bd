"""What nvcc makes of the CUDA Anderson kernels: registers, shared memory, and how memory is accessed.

No GPU is needed, and nothing runs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

from helpers.sources import Patch, copy_sources

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90", "sm_100")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


class Usage(NamedTuple):
    registers: int
    shared: int
    spilled: int


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def compile_kernels(folder: Path, names: tuple[str, ...], targets: tuple[str, ...], patch: Patch | None = None) -> str:
    """Compile these sources to objects in ``folder``; return the messages of ptxas."""
    sources = copy_sources(SOURCES, folder, patch)
    codes = [f"-gencode=arch={t.replace('sm', 'compute')},code={t}" for t in targets]
    command = ["nvcc", "-std=c++17", "-O3", "--threads=2", "-Xptxas=-v", *codes, "-Xcompiler=-Wall,-Wextra,-Werror"]
    files = [str(sources / f"{name}.cu") for name in names]
    done = subprocess.run([*command, "-c", *files], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return demangled(done.stdout + done.stderr)


def usage(messages: str) -> dict[tuple[str, str], Usage]:
    """By target and kernel, such as ("sm_90", "append_full<float, 4, 5>")."""
    entry = re.compile(
        r"entry function '.*?namespace\)::(\w+(?:<[\w, ]+>)?)\(.*?' for '(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = {}
    for kernel, target, stores, loads, registers, rest in entry.findall(messages):
        shared = re.search(r"(\d+) bytes smem", rest)
        used = Usage(int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads))
        found[target, kernel] = used
    return found


def accesses(folder: Path, source: str, target: str) -> dict[str, dict[str, int]]:
    """How many loads and stores of global memory of each width a kernel has, such as {"LDG.128": 8}."""
    command = [str(CUOBJDUMP), "-sass", "-arch", target, str(folder / f"{source}.o")]
    listing = demangled(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    counts: dict[str, dict[str, int]] = {}
    for line in listing.splitlines():
        if "Function :" in line:
            match = re.search(r"namespace\)::(\w+(?:<[\w, ]+>)?)\(", line)
            assert match, line
            count = counts.setdefault(match[1], {})
        elif access := re.search(r"\b(LDG|STG)\.E([.\w]*)", line):
            width = next((part for part in access[2].split(".") if part in ("128", "64", "U16")), "32")
            count[f"{access[1]}.{width}"] = count.get(f"{access[1]}.{width}", 0) + 1
    return counts


def assert_no_spills(used: dict[tuple[str, str], Usage]) -> None:
    assert {key: u for key, u in used.items() if u.spilled} == {}


# The 128-bit loads and stores of the float32 kernels for a memory of 5, each once in the source:
# append: loads x, f, 4 residuals and the 2 of a best pair that leaves; stores the residual, the value.
# mix: loads x, f, 4 images, and x and the best pair for the value, and that for the iterate after it; stores x, the
# image, the value twice, and twice the iterate after it.
# With differences, 3 of them (and in append the newest, written too) are 64-bit accesses.
WIDE = {
    "append": {
        "append_full<float, 4, 5>": {"LDG.128": 8, "STG.128": 2},
        "append_differences<4, 5>": {"LDG.128": 5, "LDG.64": 3, "STG.128": 2},
    },
    "mix": {
        "mix_full<float, 4, 5>": {"LDG.128": 10, "STG.128": 6},
        "mix_differences<4, 5>": {"LDG.128": 7, "STG.128": 6, "STG.64": 1},
    },
}


def assert_wide(folder: Path, source: str, target: str) -> None:
    counts = accesses(folder, source, target)
    for kernel, expected in WIDE[source].items():
        assert counts[kernel].get("STG.32", 0) == 0, kernel
        if target != "sm_100":  # whose ptxas duplicates loops
            assert {width: counts[kernel].get(width) for width in expected} == expected, kernel


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], Usage]]:
    folder = tmp_path_factory.mktemp("compiled")
    return folder, usage(compile_kernels(folder, ("append", "update", "mix", "device"), TARGETS))


def test_every_kernel_fits(compiled: tuple[Path, dict[tuple[str, str], Usage]]) -> None:
    """No spills; three blocks of 256 threads on a multiprocessor up to memory 5, two up to 8."""
    _, used = compiled
    names = {kernel for _, kernel in used}
    assert len(used) == len(names) * len(TARGETS)
    assert {"append_full<float, 4, 5>", "append_differences<4, 16>", "mix_full<double, 1, 16>"} <= names
    assert_no_spills(used)
    for (_, kernel), u in used.items():
        limit = 80 if kernel.endswith(" 5>") else 128 if kernel.endswith(" 8>") else 255
        assert u.registers <= limit, (kernel, u)
        assert u.shared <= 8 * 1024, (kernel, u)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", WIDE)
def test_memory_is_accessed_once_and_wide(
    compiled: tuple[Path, dict[tuple[str, str], Usage]], source: str, target: str
) -> None:
    assert_wide(compiled[0], source, target)


def test_a_kernel_that_spills_is_caught(tmp_path: Path) -> None:
    patch = ("append.cu", "memory <= 5 ? 3 : memory <= 8 ? 2 : 1", "memory <= 5 ? 4 : 3")
    with pytest.raises(AssertionError):
        assert_no_spills(usage(compile_kernels(tmp_path, ("append",), ("sm_90",), patch)))


def test_a_kernel_that_stores_lane_by_lane_is_caught(tmp_path: Path) -> None:
    plain = "for (int i = 0; i < V; ++i) address[i] = pack[i];"
    patch = ("device.cuh", "__stwb(reinterpret_cast<Word*>(address), word);", plain)
    compile_kernels(tmp_path, ("mix",), ("sm_90",), patch)
    with pytest.raises(AssertionError):
        assert_wide(tmp_path, "mix", "sm_90")
