"""What Windows lacks, taken away here: CI runs the tests on Windows too, in pure Python."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, pkgutil, signal, sys
# As they are:
import deepinv, gradio, lightning, matplotlib.pyplot, skimage.metrics, torch, torchmetrics, torchvision, typer

for name in ("fcntl", "grp", "posix", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGKILL"):
    delattr(signal, name)
for name in ("fork", "getloadavg", "getuid", "killpg", "mkfifo", "register_at_fork", "sched_getaffinity", "sysconf"):
    delattr(os, name)

import jfbfast

for module in pkgutil.walk_packages(jfbfast.__path__, "jfbfast."):
    if ".kernels" not in module.name and not module.name.endswith("__main__"):  # kernels take triton
        __import__(module.name)

from jfbfast.experiments.processes import SIGNALS, ignore_signals, signals_interrupt

assert SIGNALS == (signal.SIGINT, signal.SIGTERM), SIGNALS
with signals_interrupt():
    ignore_signals(0)
print("done")
"""


@pytest.mark.slow
def test_every_module_can_be_imported_without_what_windows_lacks():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stderr
