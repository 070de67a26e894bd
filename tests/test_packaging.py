"""What an sdist holds, and how an install fares without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("csrc", "jfbfast", "kernels", "benchmarks", "tests")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, since a build writes beside them."""
    folder = tmp_path / "source"
    folder.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in [
        ROOT / "setup.py",
        ROOT / "pyproject.toml",
        *ROOT.glob("*.in"),
        *ROOT.glob("README*"),
        *ROOT.glob("LICENSE*"),
    ]:
        shutil.copy(file, folder)
    return folder


def install(source: Path, target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Install into a folder of its own, from what is already on this machine."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(target)]
    environment = {**os.environ, "JFBFAST_CUDA": "0", **variables}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)


def test_no_compiler_is_one_sentence(source: Path, tmp_path: Path) -> None:
    done = install(source, tmp_path / "target", CXX="no-such-compiler", CC="no-such-compiler")
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("jfbfast: found no C++ compiler ('no-such-compiler')")
    assert "install one" in message and "JFBFAST_PURE_PYTHON=1" in message
    assert "Traceback" not in done.stderr


WITHOUT_THE_MODULE = """
import torch
import jfbfast
from jfbfast import native
assert jfbfast.__file__.startswith({target!r}), jfbfast.__file__
assert not native.AVAILABLE and "jfbfast._native" in native.WHY_NOT
assert native.describe().startswith("unavailable")
x = torch.rand(1, 3, 8, 8)
blur = jfbfast.GaussianBlur(kernel_size=3, sigma=1.0)
assert blur(x).shape == x.shape
try:
    with jfbfast.backend("native"):
        blur(x)
except RuntimeError as error:
    assert "not available" in str(error)
else:
    raise AssertionError("the missing backend served")
"""


def test_pure_python_install(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = install(source, target, JFBFAST_PURE_PYTHON="1", CXX="no-such-compiler", CC="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert not list(target.rglob("*.so"))
    subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_MODULE.format(target=str(target))],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        check=True,
    )


WITHOUT_THE_EXTRAS = """
import sys

class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError("refused", name=name)

sys.meta_path.insert(0, Refused)
import torch
import jfbfast
blur = jfbfast.GaussianBlur(3, 1.0)
red = jfbfast.RED(jfbfast.NonexpansiveDenoiser(features=4, depth=3), filter_damping="weight")
model = jfbfast.DEGrad(blur, red, preconditioner="exact")
model(blur(torch.rand(1, 3, 16, 16))).sum().backward()
assert model.solution.status.tolist() == [jfbfast.Status.CONVERGED]
jfbfast.show_config()
try:
    jfbfast.DEGrad.from_pretrained("gaussian5-sigma1")
except ImportError as error:
    assert "safetensors" in str(error) and "pip install 'jfbfast[train]'" in str(error), error
else:
    raise AssertionError("a refused package served")
"""


def test_the_core_does_without_the_extras(tmp_path: Path) -> None:
    named = [
        re.match(r"[\w.-]+", text) for text in requires("jfbfast") or () if re.search("extra == .(train|bench)", text)
    ]
    optional = {name[0].lower() for name in named if name}
    modules = {
        module
        for module, packages in packages_distributions().items()
        if {package.lower() for package in packages} & optional - {"jfbfast"}
    }
    assert {"safetensors", "cv2", "yaml"} <= modules
    subprocess.run([sys.executable, "-c", WITHOUT_THE_EXTRAS.format(modules=modules)], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_sdist_holds_what_a_build_needs(source: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)], cwd=source, check=True)
    (archive,) = tmp_path.glob("jfbfast-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked", filter="data")
    for part in ("csrc", "jfbfast", "kernels", "benchmarks"):
        for file in (source / part).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".typed"):
                assert str(file.relative_to(source)) in names
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    done = install(unpacked, tmp_path / "target")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "target" / "jfbfast").glob("_native*"))
    assert (tmp_path / "target" / "jfbfast" / "kernels").is_dir()
