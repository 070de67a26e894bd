"""The rules of CONTRIBUTING.md that a program can check: sizes, names, and the direction of imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jfbfast

ROOT = Path(__file__).parent.parent
FOLDERS = ("jfbfast", "kernels", "benchmarks", "tests", "csrc")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")


def test_no_file_is_longer_than_400_lines() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_at_most_10_modules_lie_outside_the_rooms() -> None:
    assert len(list((ROOT / "jfbfast").glob("*.py"))) <= 10


def test_names_of_tests_have_at_most_80_characters() -> None:
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "tests").rglob("*.py")]
    functions = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [name for name in functions if name.startswith("test_") and len(name) > 80] == []


def test_imports_keep_the_contracts_of_pyproject_toml() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with the extra dev")
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = ["--no-cache", "--config", str(ROOT / "pyproject.toml")]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_documented_name_is_public() -> None:
    assert all(hasattr(jfbfast, name) for name in jfbfast.__all__)
    assert {"solve_fixed_point", "FixedPointSolver", "UniversalDEGrad"} <= set(jfbfast.__all__)
    assert all(hasattr(jfbfast.spectrum, name) for name in jfbfast.spectrum.__all__)
