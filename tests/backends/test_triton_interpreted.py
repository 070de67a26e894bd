"""Runs _triton_interpreted.py in the Triton interpreter: arithmetic and bounds, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(markers: str, timeout: float) -> None:
    checks = Path(__file__).with_name("_triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", str(checks), "-q", "-m", markers, "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_interpreted():
    run("not slow", 600)


@pytest.mark.slow
def test_interpreted_larger_grid():
    run("slow", 3600)
