"""What a build makes, what it repeats, and what an install without a compiler or without extras can do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("csrc", "jfbfast", "kernels", "benchmarks", "tests")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, because a build writes files next to them."""
    folder = tmp_path / "source"
    folder.mkdir()
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=ignored)
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
    """Build the package into the folder ``target``, with the build tools that are already installed."""
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


STUB = """#!/bin/sh
echo "$0 $*" >> {log}
case "$*" in
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n'; exit;;
  *--dryrun*) exit;;
esac
{fails}
while [ $# -gt 0 ]; do case "$1" in -o|-MF) : > "$2";; esac; shift; done
"""


def stub(program: Path, fails: str = "") -> Path:
    """A fake compiler that writes empty files, or runs ``fails``; it logs its calls in ``program`` + .log."""
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(STUB.format(log=program.with_suffix(".log"), fails=fails), encoding="utf-8")
    program.chmod(0o755)
    return program


def test_the_cuda_module_is_built_for_what_nvcc_knows(source: Path, tmp_path: Path) -> None:
    nvcc = stub(tmp_path / "cuda" / "bin" / "nvcc")
    library = tmp_path / "cuda" / "lib64" / "libcudart_static.a"
    library.parent.mkdir()
    library.write_text("!<arch>\n")
    compiler = str(stub(tmp_path / "g++"))
    done = install(source, tmp_path / "target", CXX=compiler, CUDA_HOME=str(tmp_path / "cuda"), JFBFAST_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "target" / "jfbfast").glob("_cuda*"))
    compiled = [call for call in nvcc.with_suffix(".log").read_text().splitlines() if "-gencode" in call]
    assert compiled
    for call in compiled:
        assert "code=sm_80" in call and "code=sm_90" in call and "code=compute_90" in call and "_100" not in call


def test_a_failing_nvcc_leaves_the_cuda_module_out_unless_it_was_asked_for(source: Path, tmp_path: Path) -> None:
    stub(tmp_path / "cuda" / "bin" / "nvcc", fails="echo 'nvcc fatal: no' >&2; exit 1")
    variables = {"CXX": str(stub(tmp_path / "g++")), "CUDA_HOME": str(tmp_path / "cuda")}
    done = install(source, tmp_path / "target", **variables, JFBFAST_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "jfbfast: no CUDA kernels: the toolkit of" in done.stderr and "Traceback" not in done.stderr
    assert [path.name.split(".")[0] for path in (tmp_path / "target" / "jfbfast").glob("_*.so")] == ["_native"]
    done = install(source, tmp_path / "target", **variables, JFBFAST_CUDA="1")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "jfbfast: no CUDA kernels: the toolkit of" in done.stderr.strip().splitlines()[-1]


def test_a_compiler_of_two_words_is_probed_for_openmp(source: Path, tmp_path: Path) -> None:
    compiler = stub(tmp_path / "g++")
    done = install(source, tmp_path / "target", CXX=f"env {compiler}")
    assert done.returncode == 0, done.stderr
    (kernel,) = (call for call in compiler.with_suffix(".log").read_text().splitlines() if "blur.baseline.o.d" in call)
    assert "-fopenmp" in kernel
    done = install(source, tmp_path / "target", CXX="env no-such-compiler")
    assert "found no C++ compiler ('env no-such-compiler')" in done.stderr and "Traceback" not in done.stderr


def test_a_second_build_compiles_only_what_changed(source: Path, tmp_path: Path) -> None:
    compiler, target = stub(tmp_path / "g++"), tmp_path / "target"
    log = compiler.with_suffix(".log")
    install(source, target, CXX=str(compiler)).check_returncode()
    log.unlink()
    shutil.move(target / "jfbfast" / "cli.py", target / "jfbfast" / "moved.py")
    with (source / "csrc" / "blur.cpp").open("a") as file:
        file.write("// changed")
    install(source, target, CXX=str(compiler)).check_returncode()
    compiled = {match[1] for match in re.finditer(r" -c \S*/(\w+\.cpp) ", log.read_text())}
    assert compiled == {"blur.cpp"}
    assert list((target / "jfbfast").glob("_native*.so"))
    assert not (target / "jfbfast" / "moved.py").exists(), "a module of an earlier build was installed"


IN_THE_ROOT = """
import jfbfast.benchmarks
assert jfbfast.__file__.startswith({root!r}), jfbfast.__file__
"""


def test_the_root_of_a_clone_holds_the_whole_package(source: Path, tmp_path: Path) -> None:
    (source / ".git").mkdir()
    install(source, tmp_path / "target", CXX=str(stub(tmp_path / "g++"))).check_returncode()
    (built,) = (tmp_path / "target" / "jfbfast").glob("_native*.so")
    assert (source / "jfbfast" / built.name).is_file()
    assert (source / "jfbfast" / "kernels" / "launch.py").is_file()
    subprocess.run([sys.executable, "-c", IN_THE_ROOT.format(root=str(source))], cwd=source, check=True)


WITHOUT_THE_MODULE = """
import sys
# The finder of an editable install would find the compiled module of the clone.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch
import jfbfast
from jfbfast.backends import native
assert jfbfast.__file__.startswith({target!r}), jfbfast.__file__
assert not native.AVAILABLE and "jfbfast._native" in native.UNAVAILABLE_BECAUSE
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

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {modules!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
import jfbfast
blur = jfbfast.GaussianBlur(3, 1.0)
red = jfbfast.RED(jfbfast.NonexpansiveDenoiser(features=4, depth=3), filter_damping="weight")
model = jfbfast.DEGrad(blur, red, preconditioner="exact")
model(blur(torch.rand(1, 3, 16, 16))).sum().backward()
assert model.solution.status.tolist() == [jfbfast.Status.CONVERGED]
jfbfast.show_config()
assert "torch._dynamo" not in sys.modules  # importing it takes as long as importing torch
jfbfast.DEGrad.from_pretrained("gaussian5-sigma1")(torch.rand(1, 3, 16, 16))
model.save_pretrained("saved")
jfbfast.DEGrad.from_pretrained("saved")
from PIL import Image
from typer.testing import CliRunner
from jfbfast.cli import app
Image.new("RGB", (40, 30), "grey").save("photo.png")

def command(*arguments):
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output.strip()

assert command("--version") == (0, f"jfbfast {{jfbfast.__version__}}")
assert command("info")[0] == command("train", "--help")[0] == 0
assert command("restore", "photo.png", "--sigma", "1")[0] == 0
assert Image.open("photo-restored.png").size == (40, 30)
assert "pip install 'jfbfast[train]'" in command("train", ".")[1]
try:
    model.push_to_hub("somebody/model")
except ImportError as error:
    assert "huggingface_hub" in str(error) and "pip install 'jfbfast[hub]'" in str(error), error
else:
    raise AssertionError("a refused package served")
"""


def test_the_core_does_without_the_extras(tmp_path: Path) -> None:
    named = [
        re.match(r"[\w.-]+", text)
        for text in requires("jfbfast") or ()
        if re.search("extra == .(train|bench|hub|cuda)", text)
    ]
    optional = {name[0].lower() for name in named if name}
    modules = {
        module
        for module, packages in packages_distributions().items()
        if {package.lower() for package in packages} & optional - {"jfbfast"}
    }
    needed = {
        name[0].lower()
        for text in requires("jfbfast") or ()
        if (name := re.match(r"[\w.-]+", text)) and ";" not in text
    }
    assert not optional & needed
    assert {"huggingface_hub", "lightning", "torchvision", "triton"} <= modules
    subprocess.run([sys.executable, "-c", WITHOUT_THE_EXTRAS.format(modules=modules)], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_sdist_holds_what_a_build_needs(source: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)], cwd=source, check=True)
    (archive,) = tmp_path.glob("jfbfast-*.tar.gz")
    with tarfile.open(archive) as tar:
        members = [name.split("/", 1)[-1] for name in tar.getnames()]
        tar.extractall(tmp_path / "unpacked", filter="data")
    for part in ("csrc", "jfbfast", "kernels", "benchmarks"):
        for file in (source / part).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".typed"):
                assert members.count(str(file.relative_to(source))) == 1
    assert not [name for name in members if name.startswith(("jfbfast/kernels", "jfbfast/benchmarks"))]
    assert [name for name in members if name.endswith(".safetensors")] == ["jfbfast/weights/universal.safetensors"]
    assert {"jfbfast/weights/estimator.npz", "tests/check_wheel.py", "README.md"} <= set(members)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    done = install(unpacked, tmp_path / "target")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "target" / "jfbfast").glob("_native*"))
    assert (tmp_path / "target" / "jfbfast" / "kernels").is_dir()


def test_an_unknown_choice_of_weights_is_one_sentence(source: Path, tmp_path: Path) -> None:
    done = install(source, tmp_path / "target", JFBFAST_WEIGHTS="few")
    message = "jfbfast: JFBFAST_WEIGHTS is 'few'; it takes one of 'all', 'default', 'none'"
    assert done.returncode != 0 and done.stderr.strip() == message


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["all", "default", "none"])
def test_a_wheel_holds_the_networks_that_are_wanted_and_complete_metadata(
    source: Path, tmp_path: Path, weights: str
) -> None:
    environment = {**os.environ, "JFBFAST_PURE_PYTHON": "1", "JFBFAST_WEIGHTS": weights}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=source, env=environment, check=True)
    (path,) = tmp_path.glob("jfbfast-*-py3-none-any.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (metadata,) = (message_from_bytes(wheel.read(name)) for name in names if name.endswith(".dist-info/METADATA"))
    every = sorted(file.name for file in (ROOT / "jfbfast" / "weights").glob("*.safetensors"))
    wanted = {"all": every, "default": ["universal.safetensors"], "none": []}[weights]
    assert sorted(Path(name).name for name in names if name.endswith(".safetensors")) == wanted
    assert len(every) == 4 and "jfbfast/weights/estimator.npz" in names
    assert not [name for name in names if name.startswith("tests") or Path(name).suffix in (".cpp", ".h", ".cu", ".so")]
    if not wanted:
        assert path.stat().st_size < 800_000
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("License-File")) == {
        "LICENSE",
        "jfbfast/weights/estimator.md",
        "jfbfast/weights/universal.md",
    }
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))
    assert urls.keys() == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    text = str(metadata.get_payload(decode=True), "utf-8")
    assert "![A blurred photograph" in text and f"({urls['Source']}/raw/v{metadata['Version']}/docs/demo.jpg)" in text
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20 and not [link for link in links if not link.startswith(("https://", "#"))]


@pytest.mark.slow
def test_the_check_of_wheels_passes_on_this_installation(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "check_wheel.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([*command, "--pure"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "not the kernels that this wheel is for" in done.stderr
