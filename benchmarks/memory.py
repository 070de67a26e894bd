"""The peak memory of one training step, each in a process of its own: `peak_megabytes`.

As a program it takes a file that `peak_megabytes` wrote, takes the step, and prints the megabytes.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .implicit_rivals import jacobian_sides, sides
from .problem import Problem

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes(given: Problem, layer: str, half: bool, side: str, evaluations: int) -> float:
    """What a process that holds the problem and the side's modules needs beside them for its first step.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    with TemporaryDirectory() as directory:
        path = Path(directory) / "step.pt"
        torch.save((given, layer, half, side, evaluations, torch.get_num_threads()), path)
        command = [sys.executable, "-m", "jfbfast.benchmarks.memory", str(path)]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"ended with status {done.returncode}").splitlines()[-1])
    return float(done.stdout.split()[-1])


def _restart_peak() -> None:
    """Linux: let the peak of the resident memory begin anew."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def _peak() -> float:
    """In megabytes. Not ru_maxrss where there is another: on Linux a child inherits its parent's."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1024
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def main() -> None:
    """The program."""
    warnings.simplefilter("ignore")
    given, layer, half, name, evaluations, threads = torch.load(sys.argv[1], weights_only=False)
    torch.set_num_threads(threads)
    made = dict([*sides(given, layer, half, set()), *jacobian_sides(given, layer)])
    side = made[name]()
    if given.d.is_cuda:
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        side.step(given.x, evaluations)
        print(torch.cuda.max_memory_allocated() / 2**20 - before)
    else:
        _restart_peak()
        before = _peak()
        side.step(given.x, evaluations)
        print(_peak() - before)


if __name__ == "__main__":
    main()
