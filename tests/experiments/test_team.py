"""What torchrun's processes agree on, with threads in their place; test_machines.py has real ones."""

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.run import get_args_parser

from jfbfast.experiments import team

own = threading.local()


@pytest.fixture
def two(monkeypatch):
    """Each thread is one of two processes."""
    monkeypatch.setattr(team, "rank", lambda: own.rank)
    monkeypatch.setattr(team, "world", lambda: 2)


def in_two(function):
    """What the function returns in each of the two, or the error that it raises."""
    found = [None, None]

    def run(number):
        own.rank = number
        try:
            found[number] = function(number)
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_that_are_started_again_meet_in_the_old_store(two, monkeypatch):
    store = dist.HashStore()
    names = []
    for _ in range(3):
        first, second = in_two(lambda number: team._meeting(store))
        assert first == second
        names.append(first)
    assert len({*names}) == 3
    own.rank = 0
    monkeypatch.setattr(team, "_START", 0.2)
    with pytest.raises(ConnectionError, match="2 processes should have started, and 1 have within"):
        team._meeting(store)  # the words of the killed second one are still there


def test_an_error_of_one_process_is_one_for_all(two, monkeypatch):
    barrier, values = threading.Barrier(2), {}

    def gathered(value):
        values[own.rank] = value
        barrier.wait()
        return [values[0], values[1]]

    monkeypatch.setattr(team, "gathered", gathered)
    monkeypatch.setattr(team, "_connected", lambda: True)
    assert in_two(lambda number: team.agreed(lambda: (number, "same"), "they differ")) == [0, 1]
    first, second = in_two(lambda number: team.agreed(lambda: (number, number), "they differ"))
    assert str(first) == "they differ" and isinstance(second, SystemExit) and second.code == 1

    def fails(number):
        if number == 1:
            raise ValueError("size is 3; it takes 4")
        return number, None

    first, second = in_two(lambda number: team.agreed(lambda: fails(number)))
    assert str(first) == "process 1: size is 3; it takes 4" and isinstance(second, SystemExit)


def test_only_an_error_of_the_connection_is_one_of_a_lost_process():
    with pytest.raises(RuntimeError, match="out of memory"), team.lost_process_is_named():
        raise RuntimeError("out of memory")
    told = r"has ended or cannot be reached \(Connection closed by peer \[10\.0\.0\.2\]:55\)$"
    with pytest.raises(ConnectionError, match=told), team.lost_process_is_named():
        raise RuntimeError("[gloo/pair.cc:561] Connection closed by peer [10.0.0.2]:55. This is typically caused by …")
    assert [*team.shared(3)] == [0, 1, 2] and team.gathered("alone") == ["alone"]


def test_each_process_on_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    assert team.local_device("cuda") == "cuda" and not team.restarted("out")
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_RANK", "2"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    assert [team.local_device(name) for name in ("cuda", "cpu", "cuda:0")] == ["cuda:2", "cpu", "cuda:0"]
    assert not team.restarted("out")  # it has not begun


def test_the_script_for_slurm_starts_torchrun_and_resumes(tmp_path):
    """With programs in place of SLURM's, of which srun prints its arguments."""
    script = Path(__file__).parents[2] / "docs" / "training" / "several_machines.sh"
    for name, does in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "printf 'node7\\nnode8\\n'")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12"}
    own = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for resume in ([], ["--resume"]):
        command = ["bash", script, "photographs", tmp_path / "run"]
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
        started, *words = done.stdout.splitlines()
        given = get_args_parser().parse_args(words)
        assert started == "torchrun" and (given.nnodes, given.rdzv_endpoint, given.rdzv_id) == (
            "2",
            "node7:29500",
            "12",
        )
        expected = ["train", "photographs", "--out", str(tmp_path / "run"), "--batch-size", "64", *resume]
        assert given.module and [given.training_script, *given.training_script_args] == ["jfbfast", *expected]
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.yaml").touch()
