"""What several tests of backends share."""

from __future__ import annotations

import subprocess
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parent
SOURCES = TESTS.parents[1] / "csrc" / "cuda"


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """jfbfast._cuda with the kernels of tests/backends/cuda/emulate.h in place of a GPU's."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("module")
    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(SOURCES), str(TESTS / "cuda")]
    source = "".join(f'#include "{path.name}"\n' for path in SOURCES.glob("*.c*") if path.suffix != ".cuh")
    target = folder / "_cuda.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-x", "c++", "-"]
    command += [*(f"-I{path}" for path in includes), "-o", str(target)]
    subprocess.run(command, input=source, text=True, check=True)
    spec = spec_from_file_location("_cuda", target)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
