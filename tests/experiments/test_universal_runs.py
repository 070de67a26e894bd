"""Training and evaluating one network for many blurs and noise levels."""

import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers import small_runs
from helpers.small_runs import assert_same, rows, write_photographs
from jfbfast.cli import app
from jfbfast.experiments.tasks import Measurements
from jfbfast.models.checkpoint import load_checkpoint
from jfbfast.models.universal import UniversalDEGrad

TINY = {
    "form": "universal",
    "sigma_range": "0.5,2",
    "denoiser": "UNet",
    "features": "4,6",
    "blocks": "1,1",
    "crop": 16,
    "batch_size": 2,
    "validation": 1,
    "measurements": 2,
    "steps": 4,
    "interval": 2,
    "log_every": 1,
    "max_iter": 8,
    "jacobian_penalty": 1e-3,
    "ema": 0.5,
    "logger": "csv",
}


@pytest.fixture
def folder(tmp_path):
    return write_photographs(tmp_path / "photographs", 4)


def train(folder, out, resume=False, **values):
    return small_runs.train(folder, out, resume, **{**TINY, **values})


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_universal_run_repeats_and_resumes(folder, tmp_path, monkeypatch, optimizer):
    drawn = []
    setter = UniversalDEGrad.set_measurement

    def watched(model, blur, noise):
        drawn.append((model.training, blur.sigma, noise))
        setter(model, blur, noise)

    monkeypatch.setattr(UniversalDEGrad, "set_measurement", watched)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    quality = train(folder, whole, optimizer=optimizer)
    trained = [setting for training, *setting in drawn[1:] if training]  # the first is the model's own
    assert len({tuple(s) for s in trained}) == 8  # two a step
    validated = [r for r in rows(whole) if r["val_psnr"]]
    assert len(validated) == 2 and float(validated[-1]["val_psnr"]) == pytest.approx(quality, abs=1e-4)

    def until_the_fourth_step(model, blur, noise):
        if [blur.sigma, noise] == trained[-1]:
            raise KeyError("power cut")
        setter(model, blur, noise)

    monkeypatch.setattr(UniversalDEGrad, "set_measurement", until_the_fourth_step)
    with pytest.raises(KeyError, match="power cut"):
        train(folder, stopped, optimizer=optimizer)
    assert (stopped / "training.ckpt").exists() and len(rows(stopped)) < len(rows(whole))
    monkeypatch.setattr(UniversalDEGrad, "set_measurement", watched)
    train(folder, stopped, resume=True, optimizer=optimizer)
    assert_same(stopped, whole)


def test_a_universal_run_starts_from_a_denoiser(folder, tmp_path):
    start = tmp_path / "denoiser" / "model.safetensors"
    alone = {name: TINY[name] for name in ("denoiser", "features", "blocks", "crop", "batch_size", "logger")}
    small_runs.train(folder, start.parent, form="denoiser", steps=0, pretraining_steps=1, **alone)
    train(folder, tmp_path / "out", init=str(start), steps=1, learning_rate=1e-9, ema=0)
    source, found = (load_checkpoint(out / "model.safetensors")[0] for out in (start.parent, tmp_path / "out"))
    y, z = torch.rand(1, 3, 16, 16), torch.rand(1, 13, 16, 16)
    heard = found.regularizer.denoiser(y, z, condition=(0.3, 0.2, 0.1))
    torch.testing.assert_close(heard, source(y), rtol=0, atol=1e-5)


def test_the_command_line_evaluates_any_measurement(folder, tmp_path):
    train(folder, tmp_path / "out", steps=1)

    def run(*arguments):
        scored = ("evaluate", tmp_path / "out" / "model.safetensors", folder, "--methods", "blurred", "--validation", 0)
        result = CliRunner().invoke(app, [str(a) for a in (*scored, "--resize", 24, *arguments)])
        return result.exit_code, " ".join(result.output.split())

    code, told = run("--sigma", 1.5, "--noise", 0.03)
    assert code == 0 and "blur 11 × 11, σ = 1.5, valid; noise 0.03" in told and "trained for" not in told
    code, told = run("--sigma", 2, "--kernel-size", 3, "--padding-mode", "zeros")
    assert code == 0 and "blur 3 × 3, σ = 2, zeros; noise 0.01" in told and "trained for" not in told
    code, told = run("--noise", 0.2)
    assert code == 1 and "noise is 0.2; it takes a number from 0 to 0.1" in told


def test_draws_cover_the_ranges():
    measurements = Measurements((0.5, 5.0), (0.0, 0.1), 5, "reflect")
    drawn = [measurements.draw(np.random.default_rng((0, i))) for i in range(2000)]
    grid = measurements.grid()
    assert len(grid) == 5 and all(blur.kernel_size == (5, 5) and blur.padding_mode == "reflect" for blur, _ in grid)
    assert sorted({round(blur.sigma[0], 9) for blur, _ in grid}) == [0.5, round(2.5**0.5, 9), 5.0]
    sigma, noise = np.array([(blur.sigma[0], noise) for blur, noise in drawn]).T
    assert 0.5 <= sigma.min() < sigma.max() <= 5 and 0 <= noise.min() < noise.max() <= 0.1
    assert (sigma < math.sqrt(0.5 * 5)).mean() == pytest.approx(0.5, abs=0.05)
    assert (noise < 0.025).mean() == pytest.approx(0.5, abs=0.05)
