"""Builds the compiled modules, and chooses the weights; everything else about the package is in pyproject.toml.

Environment variables: ``JFBFAST_PURE_PYTHON=1`` installs without compiled modules, and ``CXX`` names the C++ compiler.
The CUDA module is built if nvcc is found and can build it; ``JFBFAST_CUDA=0`` skips it, ``JFBFAST_CUDA=1`` makes a
failure an error. ``JFBFAST_WEIGHTS`` says which networks are installed: ``all`` that the source has (a clone has four,
a source distribution one), the ``default`` one, as in a release's wheels, or ``none``.

After a change in csrc/, ``python setup.py build_ext --inplace`` compiles the changed files only.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build"  # kept between builds, so that ninja compiles only what changed
PURE_PYTHON = os.environ.get("JFBFAST_PURE_PYTHON") == "1"
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"

# Each kernel source is compiled once per instruction set; csrc/dispatch.cpp picks one at run time.
KERNELS = ("blur", "gradient", "anderson", "winograd", "table")
SHARED = ("bindings", "dispatch", "pool", "decide")
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]  # no CPU has AVX2 without the others
    INSTRUCTION_SETS["avx512"] = ["-mfma", "-mf16c", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]

GPU_ARCHITECTURES = ("80", "90", "100")

NETWORKS = {"all": ["*.safetensors"], "default": ["universal.safetensors"], "none": []}  # by JFBFAST_WEIGHTS


class Compilation(NamedTuple):
    """One source file, the stem of its object file, and its compiler flags."""

    source: Path
    stem: str
    flags: list[str]


def binding_includes() -> list[str]:
    """Include flags for Python and pybind11, the same in every build: if they changed, ninja would recompile.

    An isolated build has pybind11 in a new temporary folder each time, so its headers are copied to build/.
    """
    import pybind11

    headers = BUILD / f"pybind11-{pybind11.__version__}"
    if not headers.is_dir():
        partial = headers.with_name(f"{headers.name}-partial")
        shutil.copytree(pybind11.get_include(), partial, dirs_exist_ok=True)
        partial.rename(headers)
    python = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    return [f"-I../{headers.name}", *(f"-I{path}" for path in sorted(python))]  # ninja runs in a folder of build/


def cpu_compilations(openmp: list[str]) -> Iterator[Compilation]:
    flags = ["-std=c++17", "-O3", "-ffp-contract=fast", "-g0", "-fvisibility=hidden", "-Wno-psabi", *openmp]
    for isa, isa_flags in INSTRUCTION_SETS.items():
        for name in KERNELS:
            yield Compilation(
                ROOT / "csrc" / f"{name}.cpp", f"{name}.{isa}", [*flags, *isa_flags, f"-DJFBFAST_ISA={isa}"]
            )
    x86 = ["-DJFBFAST_X86"] if X86 else []
    for name in SHARED:
        binding = ["-O1", *binding_includes()] if name == "bindings" else []  # no loops there, and -O3 is slow
        yield Compilation(ROOT / "csrc" / f"{name}.cpp", name, [*flags, *x86, *binding])


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def gpu_architectures(nvcc: str) -> list[str]:
    """The architectures we build for that this nvcc knows; an old nvcc lacks the newest."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [a for a in GPU_ARCHITECTURES if f"compute_{a}" in listed]


def cuda_compilations(cuda_home: Path, architectures: list[str]) -> Iterator[Compilation]:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = architectures[-1]
    flags = ["-std=c++17", "-O3", *targets, f"-gencode=arch=compute_{newest},code=compute_{newest}"]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        yield Compilation(source, f"{source.stem}.gpu", [*flags, "-Xcompiler", "-fPIC,-fvisibility=hidden"])
    includes = [*binding_includes(), f"-I{cuda_home / 'include'}"]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cpp")):
        yield Compilation(source, source.stem, ["-std=c++17", "-O1", "-g0", "-fvisibility=hidden", *includes])


def runs(command: list[str]) -> bool:
    """Whether the command exists and succeeds. (Its program may be several words, such as "ccache g++".)"""
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def remove_compiled_modules(package: Path) -> None:
    """Remove those of an earlier build, so that none is used that this build leaves out."""
    for module in package.glob(f"_*{sysconfig.get_config_var('EXT_SUFFIX')}"):
        module.unlink()


class CleanBuild(build):
    """Does not install modules from an earlier build that have since been moved or removed."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "jfbfast"), ignore_errors=True)
        remove_compiled_modules(ROOT / "jfbfast")
        super().run()


class BuildWithNinja(build_ext):
    """Compiles the sources of an extension in parallel, in a folder below build/ that the next build reuses."""

    def run(self) -> None:
        for package in (Path(self.build_lib, "jfbfast"), ROOT / "jfbfast"):
            remove_compiled_modules(package)
        super().run()
        # In the root of a clone, Python imports the package from ./jfbfast, also after a plain `pip install .`. So the
        # compiled modules are copied there too, and jfbfast/kernels and jfbfast/benchmarks are links to ../kernels and
        # ../benchmarks: `python -m jfbfast` then does the same in a clone as elsewhere, and mypy and import-linter see
        # the one package that is installed. (Extending jfbfast.__path__ to the installed copy would mix two versions.)
        if (ROOT / ".git").exists() and not self.inplace:
            self.copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            super().build_extension(ext)
            return
        if not runs([*self.compiler.compiler_so_cxx, "--version"]):
            compiler = os.environ.get("CXX") or self.compiler.compiler_so_cxx[0]
            sys.exit(
                f"jfbfast: found no C++ compiler ({compiler!r}) for its kernels; install one (g++ or clang++), "
                "name it in CXX, or set JFBFAST_PURE_PYTHON=1 for the slower pure-Python install."
            )
        if ext.name == "jfbfast._cuda":
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cpu(self, ext: Extension) -> None:
        openmp = self.openmp_flags()
        self.ninja(ext, list(cpu_compilations(openmp)), openmp)

    def build_cuda(self, ext: Extension) -> None:
        command = nvcc()
        architectures = gpu_architectures(command) if command else []
        if command is None or not architectures:
            raise CompileError(
                f"jfbfast: no CUDA kernels: {command or 'nvcc'} "
                + (f"builds for none of sm_{', sm_'.join(GPU_ARCHITECTURES)}" if command else "is not on the PATH")
            )
        cuda_home = cuda_root(command)
        libraries = [f"-L{cuda_home / part}" for part in ("lib64", "lib", "targets/x86_64-linux/lib")]
        try:
            self.ninja(
                ext,
                list(cuda_compilations(cuda_home, architectures)),
                [*libraries, "-lcudart_static", "-lrt", "-ldl", "-lpthread"],
                command,
            )
        except subprocess.CalledProcessError:
            raise CompileError(
                f"jfbfast: no CUDA kernels: the toolkit of {command} could not build them (its messages are above; it "
                "takes one with the runtime's headers and a host compiler that it supports)"
            ) from None

    def openmp_flags(self) -> list[str]:
        """-fopenmp, if a program that uses it compiles and links."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "openmp.cpp"
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*self.compiler.compiler_so_cxx, "-fopenmp", str(probe), "-o", str(folder / "openmp")]
        return ["-fopenmp"] if runs(command) else []

    def ninja(self, ext: Extension, compilations: list[Compilation], link: list[str], nvcc: str = "nvcc") -> None:
        from ninja import BIN_DIR
        from ninja.ninja_syntax import Writer

        folder = BUILD / f"{ext.name}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        cxx = " ".join(self.compiler.compiler_so_cxx)
        with (folder / "build.ninja").open("w") as file:
            ninja = Writer(file, width=110)
            depfile = {"depfile": "$out.d", "deps": "gcc"}  # -MD: system headers too, so a new compiler recompiles
            ninja.rule("cxx", f"{cxx} $flags -MD -MF $out.d -c $in -o $out", **depfile)
            ninja.rule("nvcc", f"{nvcc} $flags -MD -MF $out.d -c $in -o $out", **depfile)
            ninja.rule("link", f"{' '.join(self.compiler.linker_so_cxx)} $in -o $out {' '.join(link)}")
            objects: list[str] = []
            for source, stem, flags in compilations:
                rule = "nvcc" if source.suffix == ".cu" else "cxx"
                objects += ninja.build(f"{stem}.o", rule, str(source), variables={"flags": flags})
            ninja.build(target.name, "link", objects)
        subprocess.run([str(Path(BIN_DIR, "ninja")), "-C", str(folder)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / target.name, target)


def cuda_root(command: str) -> Path:
    """The toolkit's folder as nvcc reports it, since the nvcc on the PATH may be a wrapper script."""
    listing = subprocess.run([command, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    for line in listing.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return Path(command).resolve().parent.parent


def extensions() -> list[Extension]:
    if PURE_PYTHON:
        return []
    sources = [f"csrc/{name}.cpp" for name in (*KERNELS, *SHARED)]
    found = [Extension("jfbfast._native", sources)]
    cuda_sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.c*"))
    wanted = os.environ.get("JFBFAST_CUDA")
    if cuda_sources and wanted != "0" and (nvcc() or wanted == "1"):
        found.append(Extension("jfbfast._cuda", cuda_sources, optional=wanted != "1"))  # skipped if it fails
    return found


def packages() -> dict[str, str]:
    """Each package and its folder: kernels/ and benchmarks/ are installed inside jfbfast; weights/ holds only data."""
    found = {}
    for top in ("jfbfast", "kernels", "benchmarks"):
        for folder in sorted({path.parent.relative_to(ROOT) for path in (ROOT / top).rglob("*.py")} | {Path(top)}):
            parts = folder.parts if top == "jfbfast" else ("jfbfast", *folder.parts)
            found[".".join(parts)] = str(folder)
    if (ROOT / "jfbfast" / "weights").is_dir():
        found["jfbfast.weights"] = "jfbfast/weights"
    return found


def weights() -> list[str]:
    """The files of weights/ to install: the estimator, every network's card, and the networks that are wanted."""
    wanted = os.environ.get("JFBFAST_WEIGHTS") or "all"
    if wanted not in NETWORKS:
        sys.exit(f"jfbfast: JFBFAST_WEIGHTS is {wanted!r}; it takes one of {', '.join(map(repr, NETWORKS))}")
    return ["estimator.npz", "*.md", *NETWORKS[wanted]]


def long_description() -> str:
    """README for PyPI, where links and pictures have to be absolute: those of the release's tag."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    source, version = (re.search(rf'^{name} = "(.+)"', project, re.MULTILINE)[1] for name in ("Source", "version"))

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match["text"].startswith("!") else "blob"
        return f"{match['text']}({source}/{kind}/v{version}/{match['path']})"

    relative = r"(?P<text>!?\[[^]]*\])\((?P<path>(?![a-z]+:|#)[^)\s]+)\)"
    return re.sub(relative, absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=list(packages()),
    package_dir=packages(),
    package_data={"jfbfast": ["py.typed"], "jfbfast.weights": weights()},
    include_package_data=False,  # or MANIFEST.in would choose the weights
    ext_modules=extensions(),
    cmdclass={"build": CleanBuild, "build_ext": BuildWithNinja},
)
