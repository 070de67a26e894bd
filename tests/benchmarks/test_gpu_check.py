"""`jfbfast bench gpu` and its script, run on the CPU at tiny sizes: no part fails, and all write findings."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from jfbfast.benchmarks import gpu
from jfbfast.benchmarks.gpu import PARTS, Part, report
from jfbfast.cli import app

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "check.sh"
QUICK = ("sanitize", "tiles")
SLOW = tuple(name for name, part in PARTS.items() if part.on_cpu and name not in QUICK)


def findings(folder, *parts, status=0):
    if not SCRIPT.exists():
        pytest.skip("outside the repository")
    variables = {"GPU_CHECK_CPU": "1", "OUT": str(folder), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", SCRIPT, *parts], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_quick_parts_run_on_the_cpu(tmp_path):
    found = findings(tmp_path, *QUICK)
    assert {each["part"] for each in found} == set(QUICK)
    assert all(each.get("ok", True) for each in found) and len(found) > 2 * len(QUICK)
    assert set(json.loads((tmp_path / "gpu.json").read_text())) == set(QUICK)
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("part", SLOW)
def test_the_other_parts_run_on_the_cpu(part, tmp_path):
    found = findings(tmp_path, part)
    expected = {part, "memory"} if part == "profile" else {part}
    assert {each["part"] for each in found} == expected and all(each.get("ok", True) for each in found)


def test_a_part_that_fails_or_takes_too_long_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"unknown": Part("correctness", "unknown", 60), "late": Part("", "", 60)})
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 61)
    monkeypatch.setenv("GPU_CHECK_CPU", "1")
    with pytest.raises(ValueError, match="2 of 2 findings failed"):
        gpu.run(tmp_path, True, Console(quiet=True))
    start = time.monotonic()
    assert gpu._run_part("agreement", 0.5, tmp_path, True) == 124 and time.monotonic() - start < 20
    assert gpu._run_part("nobody", 60, tmp_path, True) == 1
    assert "KeyError: 'nobody'" in (tmp_path / "log.txt").read_text()


def test_a_machine_without_a_gpu_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("GPU_CHECK_CPU", raising=False)
    result = CliRunner().invoke(app, ["bench", "gpu", "--out", str(tmp_path)])
    assert result.exit_code == 1 and "torch finds no GPU here" in " ".join(result.output.split())
    with pytest.raises(ValueError, match="there is no part 'nobody'"):
        monkeypatch.setenv("GPU_CHECK_CPU", "1")
        gpu.run(tmp_path, True, Console(), ["nobody"])


def test_the_picture_and_the_tables_show_what_was_found(tmp_path):
    row = {"experiment": "step", "layer": "filtered", "size": 64, "batch": 16, "evaluations": 3, "target_error": 1e-3}
    row |= {"reached": True, "error": 9e-4, "samples": 5, "ok": True, "part": "step"}
    times = {("jfbfast", "TF32"): 2.0, ("TorchDEQ", "TF32"): 5.0, ("jfbfast", "bfloat16"): 1.5}
    found = [
        {**row, "side": side, "dtype": dtype, "median_s": t, "q1_s": t, "q3_s": t, "ratio": t / 2}
        for (side, dtype), t in times.items()
    ]
    found += [{"part": "agreement", "name": "the paper's layer", "ok": False}]
    found += [{"part": "graph", "name": "U-Net 64 None", "layer_graph_ms": 1.0, "layer_eager_ms": 3.0}]
    found += [{"part": "memory", "name": "TorchDEQ", "peak_mb": 40.0}]
    console = Console(record=True, width=100)
    report.publish(tmp_path, console, found)
    text = console.export_text()
    assert "2.5×" in text and "the paper's layer" in text and "the machine was not described" in text
    assert json.loads((tmp_path / "gpu.json").read_text())["memory"] == [{"name": "TorchDEQ", "peak_mb": 40.0}]
