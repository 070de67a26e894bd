"""`jfbfast bench gpu`: is jfbfast right on this GPU, and how fast?

Correctness against the CPU, the tests that need a GPU, the kernels against their roofline, and training steps against
PyTorch, the published loop, TorchDEQ and deepinv. Every part runs in a process of its own with a time limit; a part
that fails or runs out of time does not stop the others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import IO, NamedTuple

import torch
from rich.console import Console

_QUICK_SECONDS = 530  # of all parts with --quick
_LONGER = 4  # times that, without
_LEAST_SECONDS = 8  # in which a part can find something
_TIMED_OUT, _NO_TIME = 124, -1  # statuses


class Part(NamedTuple):
    """One part."""

    module: str  # of this package
    function: str  # of that module
    seconds: int  # its limit with --quick; without, it has several times that
    on_cpu: bool = True  # whether GPU_CHECK_CPU=1 tries it


PARTS = {  # in order of value; imported where they run, so that one that cannot be imported does not stop the others
    "machine": Part("correctness", "versions", 40),
    "agreement": Part("correctness", "agreement", 90),
    "tests": Part("correctness", "tests", 170, on_cpu=False),
    "step": Part("speed", "step", 150),
    "profile": Part("speed", "profile", 40),
    "graph": Part("speed", "graph", 40),
    "kernels": Part("speed", "kernels", 60),
    "convolutions": Part("speed", "convolutions", 40),
    "tiles": Part("speed", "tiles", 45),
    "compiled": Part("speed", "compiled", 90),
    "counters": Part("correctness", "counters", 60, on_cpu=False),
    "sanitize": Part("correctness", "sanitize", 40),
}


def run(out: Path, quick: bool, console: Console, names: Sequence[str] = ()) -> None:
    """Run the parts of these names, or all, and write gpu.json and gpu.png into the directory ``out``.

    log.txt has the output of all parts, results.jsonl each finding as soon as it was there, profile.txt the profiles,
    and tools.txt what compute-sanitizer and ncu said. The variable GPU_CHECK_SECONDS limits the whole,
    and GPU_CHECK_CPU=1 tries the parts on the CPU at tiny sizes.

    Raises:
        ValueError: this is Windows, or there is no GPU; a name is unknown; a check failed.
    """
    if sys.platform == "win32":
        raise ValueError("this benchmark does not run on Windows, which has no groups of processes")
    on_cpu = os.environ.get("GPU_CHECK_CPU") == "1"
    if not on_cpu and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here; GPU_CHECK_CPU=1 tries this benchmark on the CPU at tiny sizes")
    if unknown := [name for name in names if name not in PARTS]:
        raise ValueError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    for file in (results, out / "tools.txt", out / "profile.txt", out / "log.txt"):
        file.unlink(missing_ok=True)
    seconds = _QUICK_SECONDS * (1 if quick else _LONGER)
    deadline = time.monotonic() + float(os.environ.get("GPU_CHECK_SECONDS", seconds))
    chosen = {
        name: part for name, part in PARTS.items() if name in names or (not names and (part.on_cpu or not on_cpu))
    }
    for name, part in chosen.items():
        left = min(part.seconds * (1 if quick else _LONGER), deadline - time.monotonic())
        status = _run_part(name, left, out, quick) if left > _LEAST_SECONDS else _NO_TIME
        found = {"part": name, "name": "the part", "ok": status == 0, "status": status}
        with results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")
    findings = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    import_module("jfbfast.benchmarks.gpu.report").publish(out, console, findings)
    failed = sum(not found.get("ok", True) for found in findings)
    if failed:
        raise ValueError(f"{failed} of {len(findings)} findings failed: see {results}")


def _run_part(name: str, seconds: float, out: Path, quick: bool) -> int:
    """Run one part for at most that long; show its output, and keep it in log.txt. Its status, or 124 at the limit."""
    variables = {"OUT": str(out.resolve()), "GPU_CHECK_QUICK": str(int(quick)), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with (out / "log.txt").open("ab") as log:

        def tell(line: bytes) -> None:
            for stream in (log, sys.stdout.buffer):
                stream.write(line)
                stream.flush()

        def copy(lines: IO[bytes]) -> None:
            with lines:
                for line in lines:
                    tell(line)

        tell(f"=== {name} (at most {seconds:.0f} s)\n".encode())
        process = subprocess.Popen(
            [sys.executable, "-m", "jfbfast.benchmarks.gpu.parts", name],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts ends with it
        )
        copier = Thread(target=copy, args=(process.stdout,), daemon=True)
        copier.start()
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = _TIMED_OUT
        finally:
            _end(process)
        copier.join(5)
        tell(f"=== {name}: status {status} after {time.monotonic() - start:.0f} s\n".encode())
    return status


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started, whether or not it has ended by itself."""
    if sys.platform == "win32":
        return
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
