"""The peak memory of one training step, measured in a process of its own.

Run as a program, it takes the file that `peak_megabytes` writes, takes one step, and prints the megabytes.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .problem import Problem
from .step_sides import sides

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes(given: Problem, side: str, evaluations: int) -> float:
    """Megabytes that a step of a side needs beyond the problem, the side's modules, and the code that a step loads.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    with TemporaryDirectory() as directory:
        path = Path(directory) / "step.pt"
        torch.save((given, side, evaluations, torch.get_num_threads()), path)
        command = [sys.executable, "-m", "jfbfast.benchmarks.memory", str(path)]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"ended with status {done.returncode}").splitlines()[-1])
    return float(done.stdout.split()[-1])


def _peak(cuda: bool) -> float:
    """The peak so far, in megabytes: of the GPU's memory, or of the resident memory."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    if _STATUS.exists():  # on Linux, where ru_maxrss includes the parent's peak
        (line,) = (line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return float(line.split()[1]) / 1024
    if sys.platform == "win32":
        raise RuntimeError("Windows does not tell how much memory this process has taken")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def main() -> None:
    """Take the step of the file in the first argument, and print the megabytes."""
    warnings.simplefilter("ignore")
    given, name, evaluations, threads = torch.load(sys.argv[1], weights_only=False)
    torch.set_num_threads(threads)
    tiny = replace(given, x=given.x[:1, :, :8, :8].contiguous(), d=given.d[:1, :, :8, :8].contiguous())
    sides(tiny)[name]().step(tiny.x, 2)  # loads code, and compiles oneDNN's kernels
    side, cuda = sides(given)[name](), given.d.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")  # resets the peak of the resident memory
    before = _peak(cuda)
    side.step(given.x, evaluations)
    print(_peak(cuda) - before)


if __name__ == "__main__":
    main()
