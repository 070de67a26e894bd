"""Resumed runs with more steps: each step from there on is the one of a run of that length."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from helpers import small_runs
from helpers.small_runs import assert_same, rows, weights, write_photographs
from jfbfast.experiments.tasks import DenoiserTask, Optimization
from jfbfast.experiments.trainer import fit
from jfbfast.imaging.datasets import RandomCrops

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {**small_runs.TINY, "pretraining_steps": 2, "interval": 2}


@pytest.fixture
def folder(tmp_path):
    return write_photographs(tmp_path / "photographs", 4)


def train(folder, out, resume=False, **values):
    return small_runs.train(folder, out, resume, **{**TINY, **values})


@pytest.mark.parametrize("options", [{"schedule": "constant", "warmup": 3, "ema": 0.9}, {"form": "denoiser"}])
def test_a_run_made_longer_equals_a_long_run_if_its_schedule_does_not_end(folder, tmp_path, options):
    whole, out = tmp_path / "whole", tmp_path / "out"
    name = "pretraining_steps" if options.get("form") == "denoiser" else "steps"
    options = {"schedule": "constant", **options}
    options |= {"steps": 0} if name == "pretraining_steps" else {}
    train(folder, whole, **options | {name: 8})
    train(folder, out, **options | {name: 4})
    short = weights(out)
    train(folder, out, resume=True, **options | {name: 8})
    assert_same(whole, out)
    assert not all(torch.equal(value, short[key]) for key, value in weights(out).items())
    train(folder, out, resume=True, **options | {name: 8})  # at its end
    assert_same(whole, out)


def test_a_run_can_be_made_longer_in_its_middle(folder, tmp_path):
    """The last step was validated on, although the interval does not divide it; nothing else differs."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(folder, whole, steps=9, schedule="constant")
    train(folder, out, steps=5, schedule="constant")
    train(folder, out, resume=True, steps=9)
    assert [row for row in rows(out) if (row["phase"], row["step"], row["loss"]) != ("training", "5", "")] == rows(
        whole
    )
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(whole).items())


class Rates(Callback):
    """Keeps the learning rate, and the betas, of every step."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, *args):
        group = trainer.optimizers[0].param_groups[0]
        self.found.append((group["lr"], group.get("betas")))


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "linear", "constant"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_each_step_of_a_longer_run_has_the_rate_of_a_run_of_that_length(tmp_path, schedule, optimizer):
    crops = RandomCrops([torch.rand(3, 20, 20)], 8, length=18)

    def rates(steps, resume=None, keep=None):
        chosen = Optimization(1e-3, schedule, 0 if schedule == "onecycle" else 2, optimizer=optimizer)
        network = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
        seen = Rates()
        runner = fit(
            DenoiserTask(network, optimization=chosen),
            crops,
            steps=steps,
            batch_size=2,
            callbacks=[seen],
            resume=resume,
            progress=False,
            accelerator="cpu",
        )
        if keep:
            runner.save_checkpoint(keep)
        return seen.found

    short, whole = rates(4, keep=tmp_path / "short.ckpt"), rates(9)
    assert rates(9, resume=str(tmp_path / "short.ckpt")) == whole[4:]
    assert (short == whole[:4]) == (schedule == "constant")


def test_a_run_can_be_made_longer_before_its_last_phase(folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(folder, whole, steps=6)
    train(folder, out, steps=4)
    for name in ("pretrained.safetensors", "training.ckpt", "model.safetensors"):
        (out / name).unlink()
    train(folder, out, resume=True, steps=6)
    assert_same(whole, out)
