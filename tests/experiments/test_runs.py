"""Training runs: what they leave, and how they repeat, resume and start from other weights."""

import csv
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from rich.console import Console

from helpers import small_runs
from helpers.small_runs import assert_same, flags, rows, weights, write_photographs
from jfbfast.experiments.callbacks import Metrics
from jfbfast.experiments.runs import Run
from jfbfast.experiments.settings import make_settings, read_settings
from jfbfast.imaging.datasets import Images, Photographs
from jfbfast.imaging.photographs import ImageError
from jfbfast.imaging.quality import psnr
from jfbfast.models.checkpoint import CheckpointError, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {**small_runs.TINY, "pretraining_steps": 4, "steps": 6, "interval": 2}


@pytest.fixture
def folder(tmp_path):
    return write_photographs(tmp_path / "photographs", 5)


def train(folder, out, resume=False, **values):
    return small_runs.train(folder, out, resume, **{**TINY, **values})


def seconds(out):
    with (out / "metrics.csv").open(newline="") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)]


def test_a_run_writes_its_files_and_is_reproducible(folder, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    quality = train(folder, a, ema=0.9)
    train(folder, b, ema=0.9)
    assert_same(a, b)
    assert {"config.yaml", "metrics.csv", "model.safetensors", "training.ckpt", "pretraining.ckpt"} <= set(
        os.listdir(a)
    )
    assert not [name for name in os.listdir(a) if "partial" in name]
    found = rows(a)
    assert [(r["phase"], r["step"]) for r in found if r["loss"]] == [
        *(("pretraining", str(i + 1)) for i in range(4)),
        *(("training", str(i + 1)) for i in range(6)),
    ]
    validated = [r for r in found if r["val_psnr"]]
    assert [r["step"] for r in validated] == ["2", "4", "2", "4", "6"]
    assert abs(float(validated[-1]["val_psnr"]) - quality) < 1e-4
    assert [float(r["val_loss"]) for r in validated] == pytest.approx(  # of one image
        [4 * 10 ** (-float(r["val_psnr"]) / 10) for r in validated], rel=1e-4
    )
    assert seconds(a)[0] > 0 and seconds(a) == sorted(seconds(a))
    train(folder, tmp_path / "c", ema=0.9, seed=1)
    assert rows(tmp_path / "c") != found


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        ("training", {"ema": 0.9, "schedule": "cosine", "pretraining_steps": 0}),
        pytest.param("pretraining", {"form": "paper", "padding_mode": "zeros"}, marks=pytest.mark.slow),
        pytest.param("training", {"form": "paper", "ema": 0.5, "workers": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_moment_resumes_like_an_uninterrupted_one(folder, tmp_path, stop, options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"pretraining_steps": 20, "steps": 20, **options}
    train(folder, whole, **options)
    process = subprocess.Popen(
        [sys.executable, "-m", "jfbfast", "train", str(folder), "--out", str(killed), *flags({**TINY, **options})],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and not (killed / f"{stop}.ckpt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    assert not (killed / "model.safetensors").exists()
    train(folder, killed, resume=True, **options)
    assert_same(whole, killed)
    assert seconds(killed) == sorted(seconds(killed))


def test_a_run_killed_before_its_last_file_needs_no_more_steps(folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(folder, whole, ema=0.9)
    train(folder, out, ema=0.9)
    (out / "model.safetensors").unlink()
    train(folder, out, resume=True)
    assert_same(whole, out)


def test_a_bad_run_checkpoint_gives_one_sentence(folder, tmp_path):
    out = tmp_path / "out"
    train(folder, out)
    file = out / "training.ckpt"
    content = file.read_bytes()
    middle = content.index(weights(out)["regularizer.denoiser.layers.0.weight"].numpy().tobytes()[:64])
    for broken in (
        content[:-100],
        b"",
        b"something else",
        content[:middle] + bytes(255 - b for b in content[middle : middle + 64]) + content[middle + 64 :],
    ):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"training\.ckpt: not a whole checkpoint of a run"):
            train(folder, out, resume=True)
    torch.save({"state_dict": {}}, file)
    with pytest.raises(CheckpointError, match="not a checkpoint of a run of jfbfast"):
        train(folder, out, resume=True)


def test_a_run_is_not_overwritten_or_changed(folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(folder, out, resume=True)
    train(folder, out)
    with pytest.raises(ValueError, match="holds a run already"):
        train(folder, out)
    with pytest.raises(ValueError, match=r"steps is 5; the run in .* was started with 6; it can only be raised"):
        train(folder, out, resume=True, steps=5)
    with pytest.raises(ValueError, match=r"pretraining_steps is 5; the run in .* was started with 4$"):
        train(folder, out, resume=True, pretraining_steps=5)
    train(folder, out, resume=True, workers=1)


def test_a_run_goes_on_with_its_own_photographs(folder, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "moved"
    values = {"pretraining_steps": 0, "steps": 2, "form": "feed-forward"}
    train(folder, out, **values)
    folder.rename(moved)
    train(moved, out, resume=True, **values)
    (moved / "00.png").write_bytes((moved / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"data is .*moved; its photographs for training are not .* such as 00\.png"):
        train(moved, out, resume=True, **values)
    (moved / "00.png").unlink()
    other = write_photographs(tmp_path / "other", 7)
    with pytest.raises(ValueError, match=r"other; its photographs .*out: 2 are new, such as 4\.png"):
        train(other, out, resume=True, **values)
    assert read_settings(out / "config.yaml")["data"] == str(moved)
    (out / "photographs.json").unlink()  # as in runs of before
    train(other, out, resume=True, **values)


UNET = {"denoiser": "UNet", "depth": 17, "features": (4, 8), "blocks": (1, 1)}
FORMS = {
    "filtered UNet": UNET,
    "injection": {**UNET, "injection": True, "pretraining_steps": None},
    "preconditioned": {
        "form": "preconditioned",
        "solver": "Picard",
        "max_iter": 4,
        "tol": 0,
        "gradient": "neumann:terms=2",
    },
    "paper": {"form": "paper", "step_size": 0.5, "tol": 0, "training_max_iter": 5},
    "paper, frozen": {"form": "paper", "identity_start": True, "freeze_statistics": True, "step_size": 0.5, "tol": 1.0},
    "unrolled": {"gradient": "unrolled:steps=3", "tol": 1.0},
    "implicit": {
        "gradient": "implicit:tol=0.01,max_iter=5",
        "solver": "Broyden:memory=3",
        "solve_dtype": "bfloat16",
        "tol": 1.0,
    },
    "nonexpansive": {"denoiser": "NonexpansiveDenoiser", "solver": "Inertial:momentum=0.2"},
    "feed-forward": {"form": "feed-forward"},
    "denoiser": {"form": "denoiser", "steps": 0},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_trains(folder, tmp_path, name):
    out = tmp_path / "out"
    quality = train(folder, out, **FORMS[name], half=name == "paper")
    model, config = load_checkpoint(out / "model.safetensors")
    assert config == make_settings({"data": str(folder), **TINY, **FORMS[name]}).model_config()
    assert all(value.dtype != torch.float16 for value in model.state_dict().values())
    assert quality is not None and 5 < quality < 60
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 16, 16)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="trains on the CPU")
@pytest.mark.parametrize("fast", [False, True])
def test_a_cpu_without_bfloat16_brings_a_message(folder, tmp_path, monkeypatch, fast):
    monkeypatch.setattr("jfbfast.experiments.runs.ONEDNN_HAS_BFLOAT16", fast)
    console = Console(file=io.StringIO(), width=120)
    settings = {"data": str(folder), **TINY, "pretraining_steps": 0, "steps": 1, "precision": "bf16"}
    Run(settings, tmp_path / "out", progress=False).train(console)
    assert ("This CPU has no bfloat16" in console.file.getvalue()) != fast


def test_a_run_starts_from_other_weights(folder, tmp_path):
    start = tmp_path / "denoiser" / "model.safetensors"
    train(folder, start.parent, form="denoiser", steps=0)
    still = {"pretraining_steps": None, "steps": 1, "learning_rate": 1e-9}
    train(folder, tmp_path / "first", init=str(start), **still)
    source, target = weights(start.parent), weights(tmp_path / "first")
    for key, value in source.items():
        torch.testing.assert_close(target[f"regularizer.denoiser.{key}"], value, rtol=0, atol=1e-7)
    first = str(tmp_path / "first" / "model.safetensors")
    train(folder, tmp_path / "second", init=first, **still)
    assert not (tmp_path / "second" / "pretraining.ckpt").exists()
    for key, value in target.items():
        torch.testing.assert_close(weights(tmp_path / "second")[key], value, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"init is .* a filtered network"):
        train(folder, tmp_path / "third", init=first, depth=4)
    with pytest.raises(ValueError, match=r"weight is 0\.1; with init=.* it is the one of that network"):
        train(folder, tmp_path / "third", init=first, weight=0.1)
    train(folder, tmp_path / "third", init=first, **still, sigma=2, padding_mode="zeros", gradient="implicit")
    for key, value in target.items():
        torch.testing.assert_close(weights(tmp_path / "third")[key], value, rtol=0, atol=1e-7)
    (tmp_path / "first" / "model.safetensors").unlink()
    train(folder, tmp_path / "second", resume=True, init=first, **still)
    with pytest.raises(CheckpointError, match="no such file"):
        train(folder, tmp_path / "fourth", init=first, **still)


def test_a_run_can_start_from_a_network_with_fewer_inputs(folder, tmp_path):
    still = {**UNET, "pretraining_steps": None, "steps": 1, "learning_rate": 1e-9}
    start = tmp_path / "start" / "model.safetensors"
    train(folder, start.parent, **still | {"pretraining_steps": 0})
    console = Console(file=io.StringIO(), width=200)
    settings = {"data": str(folder), **TINY, **still, "init": str(start), "injection": True}
    Run(settings, tmp_path / "told", progress=False).train(console)
    assert "Its denoiser has no injection" in console.file.getvalue()
    model, told = (load_checkpoint(file)[0] for file in (start, tmp_path / "told" / "model.safetensors"))
    y, z = torch.rand(2, 1, 3, 16, 16)
    heard = told.regularizer.denoiser(y, z)
    torch.testing.assert_close(heard, model.regularizer.denoiser(y), rtol=0, atol=1e-6)
    torch.testing.assert_close(told.regularizer.weight, model.regularizer.weight)
    with pytest.raises(ValueError, match=r"init is .* a filtered network"):
        train(folder, tmp_path / "less", init=str(tmp_path / "told" / "model.safetensors"), **still)
    with pytest.raises(ValueError, match=r"init is .* a filtered network .* this run takes a preconditioned network"):
        train(folder, tmp_path / "other", init=str(start), form="preconditioned", **still)


def test_validation_takes_photographs_of_every_size(folder, tmp_path):
    """A photograph smaller than the crop, which training pads, is validated on as it is."""
    for name, side in (("5", 12), ("6", 40), ("7", 40)):
        with Image.open(folder / "0.png") as image:
            image.resize((side, side)).save(folder / f"{name}.png")
    out = tmp_path / "out"
    train(folder, out, validation=4, pretraining_steps=0, steps=2, form="feed-forward")
    model, config = load_checkpoint(out / "model.safetensors")
    samples = Images(Photographs(sorted(folder.iterdir())[4:]), 16)
    assert [sample.x.shape[-1] for sample in samples] == [16, 12, 16, 16]
    quality = []
    for sample in samples:
        with torch.no_grad():
            restored = model((config.blur()(sample.x) + config.noise * sample.noise)[None])
        quality.append(float(psnr(restored, sample.x[None])))
    assert float(rows(out)[-1]["val_psnr"]) == pytest.approx(sum(quality) / 4, abs=1e-3)


def test_a_denoiser_trains_on_from_other_weights(folder, tmp_path):
    start = tmp_path / "start" / "model.safetensors"
    train(folder, start.parent, form="denoiser", steps=0)
    settings = make_settings({"data": "d", "form": "denoiser", "init": str(start)})
    assert settings.resolved().pretraining_steps == 1000
    train(folder, tmp_path / "on", form="denoiser", steps=0, init=str(start), pretraining_steps=1)
    assert not all(torch.equal(value, weights(start.parent)[key]) for key, value in weights(tmp_path / "on").items())


def test_a_crop_larger_than_every_photograph_creates_no_directory(folder, tmp_path):
    out = tmp_path / "out"
    for cache in (1.0, 1e-9):
        with pytest.raises(ImageError, match=r"0\.png: too small for crops of 500 pixels"):
            train(folder, out, crop=500, cache=cache)
    assert not out.exists()
    train(folder, out)


def test_a_row_of_metrics_that_was_cut_off_is_dropped(tmp_path):
    file = tmp_path / "metrics.csv"
    Metrics(file, "training", 0, 1)
    header = file.read_bytes()
    row = b"training,15,0.5,0.01" + b"," * 8 + b"\r\n"
    for end in range(len(row)):
        file.write_bytes(header + row + row[:end])
        Metrics(file, "training", 20, 1)
        assert file.read_bytes() == header + row


def test_statistics_are_frozen_after_pretraining(folder, tmp_path):
    out = tmp_path / "out"
    train(folder, out, **FORMS["paper, frozen"])
    (pretrained, _), (trained, _) = (load_checkpoint(out / f"{name}.safetensors") for name in ("pretrained", "model"))
    before, after = (model.regularizer.layers for model in (pretrained, trained))
    assert torch.equal(before[3].running_var, after[3].running_var) and not (before[3].running_var == 1).all()
    assert not torch.equal(before[3].weight, after[3].weight)
