"""Training, restoring and evaluating with one network for a range of blurs and noise levels."""

import pytest
import torch
from typer.testing import CliRunner

from helpers import small_runs
from helpers.small_runs import rows, write_photographs
from jfbfast.cli import app
from jfbfast.models import pretrained
from jfbfast.models.checkpoint import load_checkpoint, save_checkpoint
from jfbfast.models.conditional import ConditionalDEGrad
from jfbfast.models.config import ModelConfig

SIZES = {"features": [4, 6], "blocks": [1, 1]}
CONFIG = ModelConfig(
    denoiser={"kind": "UNet", **SIZES, "conditions": 2},
    padding_mode="zeros",
    sigma_range=[0.5, 5.0],
    noise_range=[0.0, 0.1],
)
SINGLE = ModelConfig(denoiser={"kind": "UNet", **SIZES}, padding_mode="zeros")


def made(sigma=2.0, noise=0.03, config=CONFIG):
    """A model with random weights and exponents, scaled so that it does not contract by chance."""
    torch.manual_seed(0)
    model = config.model().double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "exponents" in name:
                value += 0.3 * torch.randn_like(value)
            elif name.endswith("tail.weight"):
                value *= 3
    model.set_measurement(sigma, noise)
    return model


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped models: for a range, and for one setting within it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "WEIGHTS", folder)
    save_checkpoint(folder / "a-range.safetensors", made().float(), CONFIG)
    save_checkpoint(folder / "b-single.safetensors", SINGLE.model(), SINGLE)
    return folder


FLAGS = {
    "sigma_range": "0.5,5",
    "noise_range": "0,0.1",
    "denoiser": "UNet",
    "features": "4,6",
    "blocks": "1,1",
    "padding_mode": "zeros",
}
TINY = {
    **FLAGS,
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
    "tensorboard": False,
}


@pytest.fixture
def folder(tmp_path):
    return write_photographs(tmp_path / "photographs", 4)


def train(folder, out, resume=False, **values):
    return small_runs.train(folder, out, resume, **{**TINY, **values})


def test_a_run_over_ranges_repeats_and_resumes(folder, tmp_path, monkeypatch):
    drawn = []
    setter = ConditionalDEGrad.set_measurement

    def watched(model, sigma, noise):
        drawn.append((model.training, sigma, noise))
        setter(model, sigma, noise)

    monkeypatch.setattr(ConditionalDEGrad, "set_measurement", watched)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    quality = train(folder, whole)
    trained = [setting for training, *setting in drawn[1:] if training]  # the first is the model's own
    assert len({tuple(s) for s in trained}) == 8  # two a step
    validated = [r for r in rows(whole) if r["val_psnr"]]
    assert len(validated) == 2 and float(validated[-1]["val_psnr"]) == pytest.approx(quality, abs=1e-4)

    def until_the_fourth_step(model, sigma, noise):
        if [sigma, noise] == trained[-1]:
            raise KeyError("power cut")
        setter(model, sigma, noise)

    monkeypatch.setattr(ConditionalDEGrad, "set_measurement", until_the_fourth_step)
    with pytest.raises(KeyError, match="power cut"):
        train(folder, stopped)
    assert (stopped / "training.ckpt").exists() and len(rows(stopped)) < len(rows(whole))
    monkeypatch.setattr(ConditionalDEGrad, "set_measurement", watched)
    train(folder, stopped, resume=True)
    assert rows(stopped) == rows(whole)
    one, two = (load_checkpoint(out / "model.safetensors")[0].state_dict() for out in (whole, stopped))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_run_over_ranges_starts_from_a_shipped_model_of_one_setting(folder, tmp_path, shipped):
    single = load_checkpoint(shipped / "b-single.safetensors")[0]
    train(folder, tmp_path / "out", init="b-single", steps=1, learning_rate=1e-9, ema=0)
    found = load_checkpoint(tmp_path / "out" / "model.safetensors")[0].state_dict()
    head = "regularizer.denoiser.head.weight"
    for name, value in single.state_dict().items():
        kept = found[name][:, : value.shape[1]] if name == head else found[name]
        torch.testing.assert_close(kept, value, rtol=0, atol=1e-7)
    assert found[head][:, 12:].abs().max() < 1e-7


def test_the_command_line_restores_and_evaluates_at_a_setting(folder, tmp_path, shipped):
    def run(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        return result.exit_code, " ".join(result.output.split())

    photograph = folder / "0.png"
    zeros = ("--padding-mode", "zeros", "--out", tmp_path / "restored", "--overwrite")
    code, told = run("restore", photograph, "--sigma", 2, "--noise", 0.03, *zeros)
    assert code == 0 and "Restoring by the shipped model a-range" in told and "trained for" not in told
    code, told = run("restore", photograph, *zeros)
    assert code == 0 and "Restoring by the shipped model b-single" in told
    code, told = run("restore", photograph, "--checkpoint", "a-range", "--sigma", 2, *zeros)
    assert code == 1 and "noise, from 0 to 0.1" in told
    code, told = run("restore", photograph, "--checkpoint", "b-single", "--noise", 0.03, *zeros)
    assert code == 1 and "so it takes none" in told
    code, told = run("restore", photograph, "--checkpoint", "b-single", "--sigma", 1, "--noise", 0.01, *zeros)
    assert code == 0 and "trained for" not in told
    scored = ("a-range", folder, "--methods", "blurred", "--validation", 0, "--resize", 16)
    code, told = run("evaluate", *scored, "--sigma", 2, "--noise", 0.03)
    assert code == 0 and "σ = 2, zeros; noise 0.03" in told and "trained for" not in told
    code, told = run("evaluate", *scored, "--sigma", 6)
    assert code == 1 and "sigma is 6.0; this model takes a number from 0.5 to 5" in told
