"""Several machines: torchrun's processes train and restore together; some are killed, and their work goes on."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from helpers.hosts import two_hosts
from helpers.small_runs import TINY, flags, rows, train, weights, write_photographs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SETTINGS = {**TINY, "pretraining_steps": 0, "steps": 6, "interval": 2}

# `jfbfast train` with little patience. After it has saved the step STOP, the second process makes a file and sleeps;
# after the step KILL, the first time, it is killed.
TRAIN = """
import os, signal, time
from jfbfast import cli
from jfbfast.experiments import runs
from jfbfast.experiments.callbacks import Checkpoints
runs.PATIENCE = 15
save = Checkpoints._save
def saves(self, trainer):
    save(self, trainer)
    if os.environ["RANK"] == "1" and str(trainer.global_step) == os.environ.get("STOP"):
        open(os.environ["STOPPED"], "x").close()
        time.sleep(10 ** 6)
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if os.environ["RANK"] == "1" and str(trainer.global_step) == os.environ.get("KILL") and not again:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints._save = saves
cli.main()
"""

# `jfbfast restore`, which lists each file that it writes. The first time, the second process is killed in its first
# write, after the first process has written one file, which sleeps then.
RESTORE = """
import os, signal, time
from jfbfast import cli, files
from jfbfast.imaging import photographs
write, count = files.write_whole, 0
def writes(path, fill, **options):
    def filled(partial):
        fill(partial)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if os.environ["RANK"] == "1":
                while not os.path.exists("written"):
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)
            if count:
                time.sleep(10 ** 6)
    global count
    write(path, filled, **options)
    count += 1
    with open("written", "a") as log:
        print(path, file=log)
photographs.write_whole = writes
cli.main()
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(TRAIN)
    return tmp_path / "program.py"


class Together:
    """A program under torchrun on both hosts, the first of which holds torchrun's store."""

    def __init__(self, hosts, folder, program, *arguments, **environment):
        self.logs = [folder / f"{host.address}.log" for host in hosts]
        self.processes = []
        shared = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        shared += [f"--rdzv-endpoint={hosts[0].address}:29400"]
        for number, host in enumerate(hosts):
            own = [f"--local-addr={host.address}", f"--rdzv-conf=is_host={1 - number}"]
            command = [*TORCHRUN, *shared, *own, program, *map(str, arguments)]
            self.processes.append(host.start(self.logs[number], *command, **environment))

    def wait_for(self, file):
        """Wait until the file is there, and remove it."""
        while not file.exists():
            assert [process.poll() for process in self.processes] == [None, None], self.told()
            time.sleep(0.05)
        file.unlink()

    def told(self):
        return [log.read_text() for log in self.logs]

    def end(self, number):
        """The exit status of a host's torchrun, and what was printed there."""
        status = self.processes[number].wait(timeout=300)
        return status, self.told()[number]


def test_a_training_on_two_hosts_goes_on_after_one_died_and_the_cable_was_cut(tmp_path, program):
    photographs, out, alone, stopped = (tmp_path / name for name in ("photographs", "out", "alone", "stopped"))
    write_photographs(photographs, 5)
    train(photographs, alone, **SETTINGS)
    given = [tmp_path, program, "train", photographs, "--out", out, *flags(SETTINGS)]
    lost = "error: another of torchrun's processes has ended or cannot be reached"
    with two_hosts() as hosts:
        run = Together(hosts, *given, STOP="2", STOPPED=str(stopped))
        run.wait_for(stopped)
        hosts[1].kill()
        status, told = run.end(0)
        assert status == 1 and lost in told and "Traceback" not in told.partition("error: ")[0], told
        assert f"step 2 of training is saved; go on with: jfbfast train --out {out} --resume" in told

        run = Together(hosts, *given, "--resume", STOP="4", STOPPED=str(stopped))
        run.wait_for(stopped)
        hosts[1].cable("down")
        status, told = run.end(0)
        assert status == 1 and lost in told and "step 4 of training is saved; go on with: " in told, told
        hosts[1].kill()
        hosts[1].cable("up")

        run = Together(hosts, *given, "--resume")
        ends = [run.end(number) for number in range(2)]
        assert [status for status, _ in ends] == [0, 0], ends
        assert [told.count("Trained: ") for _, told in ends] == [1, 0]
    assert [row["step"] for row in rows(out)] == [row["step"] for row in rows(alone)]
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(out)[name], value, rtol=1e-4, atol=1e-6)


def alone(program, *arguments, restarts=1, **environment):
    """Run a program in two processes under a torchrun that may start them again; its exit status and output."""
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command = [*TORCHRUN, *options, program, *map(str, arguments)]
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_training_that_torchrun_restarts_goes_on_by_itself(tmp_path, program):
    folder, out, whole = write_photographs(tmp_path / "photographs", 5), tmp_path / "out", tmp_path / "whole"
    train(folder, whole, **SETTINGS)
    status, told = alone(program, "train", folder, "--out", out, *flags(SETTINGS), KILL="4")
    assert status == 0 and told.count("Trained: ") == 1, told
    assert [row["step"] for row in rows(out)] == [row["step"] for row in rows(whole)]
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(out)[name], value, rtol=1e-4, atol=1e-6)


def test_a_run_that_is_refused_is_not_resumed_when_torchrun_restarts(tmp_path, program):
    folder, out = write_photographs(tmp_path / "photographs", 5), tmp_path / "out"
    train(folder, out, **SETTINGS)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    more = {**SETTINGS, "steps": SETTINGS["steps"] + 2}
    status, told = alone(program, "train", folder, "--out", out, *flags(more))
    assert status == 1 and told.count("holds a run already") == 2 and "Trained: " not in told, told
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_each_photograph_is_written_once_though_a_process_is_killed(tmp_path):
    write_photographs(tmp_path / "trip", 6)
    (tmp_path / "trip" / "bad.png").write_bytes(b"")
    program = tmp_path / "program.py"
    program.write_text(RESTORE)
    options = ("--sigma=1", "--checkpoint=tikhonov", "--noise=0.01", "--out=out", "--skip-existing", "--report=r.json")
    status, told = alone(program, "restore", "trip", *options)
    assert status == 1 and "1 of 7 photographs are restored already." in told, told
    assert told.count("Restoring a Gaussian") <= 2 and "error: 1 of 7 photographs could not be restored" in told
    names = sorted(f"out/{number}-restored.png" for number in range(6))
    assert sorted((tmp_path / "written").read_text().split()) == names
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row.get("restored", row.get("error")) for row in report] == [*names, "trip/bad.png: the file is empty"]


def test_an_error_of_one_process_ends_all_with_one_sentence(tmp_path):
    """The folder of photographs that the second process finds has one more."""
    write_photographs(tmp_path / "trip", 2)
    program = tmp_path / "program.py"
    program.write_text(
        "import os\nfrom jfbfast import cli\nfrom jfbfast.imaging import batch\nfind = batch.find_photographs\n"
        "batch.find_photographs = lambda images: find(images)[int(os.environ['RANK']) :]\ncli.main()\n"
    )
    options = ("--sigma=1", "--checkpoint=tikhonov", "--out=out")
    status, told = alone(program, "restore", "trip", *options, restarts=0)
    assert status == 1 and told.count("error: ") == 1 and "the processes find different photographs" in told, told


# Which threads are left when a command ends. One of the process group's would abort the process now and then.
LEFT = """
import os, sys
from pathlib import Path
from jfbfast import cli
try:
    cli.main()
finally:
    names = {task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    print("gloo is left" if any("gloo" in name for name in names) else "nothing is left", flush=True)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="the names of threads are read from /proc")
@pytest.mark.parametrize("command", ["restore", "train"])
def test_the_connection_ends_with_the_command(tmp_path, command):
    folder, program = write_photographs(tmp_path / "trip", 4), tmp_path / "program.py"
    program.write_text(LEFT)
    options = ("--sigma=1", "--noise=0.01", "--checkpoint=universal") if command == "restore" else flags(SETTINGS)
    status, told = alone(program, command, folder, "--out", tmp_path / "out", *options, restarts=0)
    assert status == 0 and told.count("nothing is left") == 2 and "gloo is left" not in told, told
