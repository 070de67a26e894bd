"""Run code in other processes: in two as torchrun starts them, on gloo, or in one with a narrower instruction set."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import torch

# An interpreter that ends can abort in gloo's threads, after all the work is done: leave without ending it.
LEAVE = "\nimport os, sys\nsys.stdout.flush()\nsys.stderr.flush()\nos._exit(0)\n"


_SELECTED = """
import sys, pytest
from jfbfast.backends import native
assert native._native.isa == sys.argv[1], native.describe()
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def run_tests_with_isa(isa: str, file: str, names: str) -> None:
    """Run the tests of `file` that pytest's -k selects, with an instruction set that is in use if the CPU has it."""
    in_use = isa if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "baseline"
    command = [sys.executable, "-c", _SELECTED, in_use, file, "-k", names]
    done = subprocess.run(command, env={**os.environ, "JFBFAST_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def environments() -> list[dict[str, str]]:
    """What torchrun sets for each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def run(script: str, *arguments: list[str], environments: list[dict[str, str]], timeout: float = 300) -> None:
    """Run `script` once for each of `environments`, with its own `arguments`, all at once; fail if one does."""
    with ExitStack() as stack:
        processes = []
        for environment, own in zip(environments, arguments, strict=True):
            process = subprocess.Popen(
                [sys.executable, "-c", script + LEAVE, *own],
                env={**os.environ, **environment},
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
