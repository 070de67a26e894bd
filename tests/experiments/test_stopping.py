"""What ends a run early: signals, locks, schedulers, full disks, and numbers that are not finite."""

import errno
import signal

import pytest
import torch

from helpers import small_runs
from helpers.command_line import run
from helpers.small_runs import assert_same, flags, write_photographs
from jfbfast.experiments import run_files
from jfbfast.experiments.callbacks import Metrics
from jfbfast.experiments.processes import SIGNALS, Interrupted, signals_interrupt
from jfbfast.experiments.runs import Run
from jfbfast.experiments.tasks import DenoiserTask
from jfbfast.experiments.trainer import SoundSteps, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {**small_runs.TINY, "pretraining_steps": 3, "steps": 7, "interval": 3}
FLAGS = flags(TINY)


@pytest.fixture(autouse=True)
def handled():
    """No signal is ignored, as SIGINT is in a shell's background process."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path):
    return write_photographs(tmp_path / "photographs", 5)


def train(folder, out, resume=False, **values):
    return small_runs.train(folder, out, resume, **{**TINY, **values})


def signalled(monkeypatch, number, hook, phase, step, times=1):
    """A run that gets a signal in a hook of its metrics, at a step of a phase; the first time it comes there."""
    genuine = getattr(Metrics, hook)

    def raising(self, trainer, *arguments):
        genuine(self, trainer, *arguments)
        if (self.phase, trainer.global_step) == (phase, step):
            monkeypatch.setattr(Metrics, hook, genuine)
            for _ in range(times):
                signal.raise_signal(number)

    monkeypatch.setattr(Metrics, hook, raising)


@pytest.mark.parametrize(
    ("number", "hook", "phase", "step", "saved"),
    [
        (signal.SIGTERM, "on_train_batch_end", "training", 2, 2),
        (signal.SIGINT, "on_train_batch_end", "training", 3, 3),  # after which comes a validation
        (signal.SIGUSR1, "on_validation_end", "training", 6, 6),
        (signal.SIGHUP, "on_train_batch_end", "training", 7, 7),
        (signal.SIGXCPU, "on_train_batch_end", "pretraining", 1, 1),
    ],
)
def test_a_run_that_a_signal_ended_resumes_like_an_uninterrupted_one(
    folder, tmp_path, monkeypatch, number, hook, phase, step, saved
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(folder, whole, ema=0.9)
    signalled(monkeypatch, number, hook, phase, step)
    before = {each: signal.getsignal(each) for each in SIGNALS}
    result = run("train", folder, "--out", out, *FLAGS, "--ema=0.9")
    assert result.exit_code == 128 + number
    told = f"stopped by {number.name}; step {saved} of {phase} is saved; go on with: jfbfast train --out {out} --resume"
    assert told in result.stderr and "Traceback" not in result.output
    assert {each: signal.getsignal(each) for each in SIGNALS} == before
    assert not (out / "model.safetensors").exists()
    train(folder, out, resume=True, ema=0.9)
    assert_same(whole, out)


def test_a_second_signal_ends_a_run_at_once(folder, tmp_path, monkeypatch):
    signalled(monkeypatch, signal.SIGINT, "on_train_batch_end", "training", 2, times=2)
    with pytest.raises(Interrupted, match="stopped by SIGINT; step 3 of pretraining is saved"):
        train(folder, tmp_path / "out")


def test_a_signal_before_the_first_step_says_that_nothing_is_saved(folder, tmp_path, monkeypatch):
    genuine = Run._train

    def raising(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return genuine(*arguments)

    monkeypatch.setattr(Run, "_train", raising)
    result = run("train", folder, "--out", tmp_path / "out", *FLAGS)
    assert result.exit_code == 143 and "stopped by SIGTERM; no step is saved yet; start with: " in result.stderr
    monkeypatch.setattr(Run, "_train", genuine)
    train(folder, tmp_path / "out", resume=True)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_interrupt():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(Interrupted, match="stopped by SIGTERM; training had not begun"):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_run_in_one_directory_is_refused(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(run_files, "_PATIENCE", 0.0)
    second = Run({"data": str(folder), **TINY}, out, progress=False)
    train(folder, out)  # another, which begins and ends in the meantime
    with pytest.raises(ValueError, match="holds a run already"):
        second.train(small_runs.Console(quiet=True))
    with run_files.locked(out), pytest.raises(ValueError, match="out is in use: another process trains there"):
        train(folder, out, resume=True)
    train(folder, out, resume=True)


def test_under_slurm_one_process_trains_and_several_are_refused(folder, tmp_path, monkeypatch):
    for name in ("JOB_ID", "NTASKS", "NTASKS_PER_NODE", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("RANK", "1")  # of no torchrun
    train(folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    for name, value in (("STEP_NUM_TASKS", "4"), ("PROCID", "2")):
        with monkeypatch.context() as started:
            started.setenv(f"SLURM_{name}", value)
            with pytest.raises(ValueError, match=r"srun started .* start one for each machine: srun --ntasks-per"):
                train(folder, tmp_path / "other")


def test_a_full_disk_gives_one_sentence_and_keeps_the_last_checkpoint(folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(folder, whole)
    written = []

    def fills(path, write):
        written.append(path.name)
        if written.count("training.ckpt") == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return genuine(path, write)

    genuine = run_files.write_whole
    monkeypatch.setattr(run_files, "write_whole", fills)
    result = run("train", folder, "--out", out, *FLAGS)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "No space left on device; step 3 of training is saved; go on with: jfbfast train" in result.stderr
    monkeypatch.setattr(run_files, "write_whole", genuine)
    train(folder, out, resume=True)
    assert_same(whole, out)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"form": "feed-forward", "learning_rate": 1e30, "clip": 0.0, "interval": 1},
            r"the loss is inf .* at step 2 of training; training\.ckpt holds step 1; start another run with a lower "
            r"--learning-rate or --clip 1 \(--init .*pretrained\.safetensors keeps the pretraining\)",
        ),
        (
            {"pretraining_rate": 1e35, "clip": 0.0},
            "the loss is (inf|nan) .* of pretraining; no step is saved; .* a lower --pretraining-rate or --clip 1$",
        ),
        (
            {"learning_rate": 1e30, "steps": 40, "precision": "bf16"},
            r"the gradient was 0 in 20 steps in a row, for example because every solve diverges, at step 21 of "
            r"training; .*"
            r"a lower --learning-rate or --jacobian-penalty 1e-3 or --precision 32",
        ),
    ],
)
def test_a_run_that_can_no_longer_learn_ends(folder, tmp_path, values, message):
    with pytest.raises(TrainingError, match=message):
        train(folder, tmp_path / "out", **values)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_float16_may_leave_out_a_few_steps():
    class Trainer:
        precision, global_step = "16-mixed", 0

        class strategy:
            @staticmethod
            def reduce_boolean_decision(decision, all):
                return decision

    task = DenoiserTask(torch.nn.Linear(1, 1))
    for parameter in task.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    steps = SoundSteps(1.0)
    for _ in range(19):
        steps.on_before_optimizer_step(Trainer, task)
    with pytest.raises(TrainingError, match="the gradient's norm inf at step 1"):
        steps.on_before_optimizer_step(Trainer, task)
    Trainer.precision = "32-true"
    with pytest.raises(TrainingError):
        SoundSteps(1.0).on_before_optimizer_step(Trainer, task)
