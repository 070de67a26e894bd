"""The script that checks the package on a GPU, run on the CPU at tiny sizes: no part fails, and all write findings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "check.sh"
QUICK = ("sanitize", "tiles")
SLOW = ("agreement", "step", "profile", "graph", "convolutions", "compiled", "kernels")


def findings(folder, *parts):
    if not SCRIPT.exists():
        pytest.skip("outside the repository")
    variables = {"GPU_CHECK_CPU": "1", "OUT": str(folder), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", SCRIPT, *parts], env=os.environ | variables, capture_output=True, text=True)
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 0, (folder / "log.txt").read_text()
    return found


def test_the_quick_parts_run_on_the_cpu(tmp_path):
    found = findings(tmp_path, *QUICK)
    assert {each["part"] for each in found} == set(QUICK)
    assert all(each.get("ok", True) for each in found) and len(found) > 2 * len(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("part", SLOW)
def test_the_other_parts_run_on_the_cpu(part, tmp_path):
    found = findings(tmp_path, part)
    assert {each["part"] for each in found} == {part} and all(each.get("ok", True) for each in found)


def test_a_part_that_fails_is_a_finding(tmp_path):
    if not SCRIPT.exists():
        pytest.skip("outside the repository")
    variables = {"GPU_CHECK_CPU": "1", "OUT": str(tmp_path), "PYTHON": "false"}
    done = subprocess.run(["bash", SCRIPT, "tiles"], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads((tmp_path / "results.jsonl").read_text()) == {"part": "tiles", "ok": False, "status": 1}
