"""The settings of a training run: what is refused, and their file."""

import json
import os
from pathlib import Path

import pytest

from jfbfast.experiments.settings import make_settings, read_settings, write_settings

ROOT = Path(__file__).parents[2]
UNIVERSAL = {"form": "universal", "denoiser": "UNet"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zzz": 1}, "zzz is no setting; jfbfast train --help lists all settings"),
        ({"batchsize": 1}, r"batchsize is no setting; did you mean batch_size( or \w+)*\? jfbfast train --help lists"),
        ({"steps": "many"}, "steps is 'many'; it takes an integer"),
        ({"steps": 1.5}, "steps is 1.5; it takes an integer"),
        ({"flips": 1}, "flips is 1; it takes true or false"),
        ({"steps": 0}, "steps is 0"),
        ({"spectral_norm": "some"}, "spectral_norm is 'some'; it takes one of matrix, conv, none"),
        ({"schedule": "steep"}, "schedule is 'steep'; it takes one of onecycle, cosine, linear, constant"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it takes one of adam, muon"),
        ({"ema": 1}, "ema is 1"),
        ({"beta2": 2}, r"beta2 is 2\.0; it takes a number in \[0, 1\)"),
        ({"noise": -1}, r"noise is -1\.0; it takes a number of at least 0"),
        ({"noise": "nan"}, "noise is nan; it takes finite numbers"),
        ({"learning_rate": -1}, r"learning_rate is -1\.0; it takes a positive number"),
        ({"learning_rate": "nan"}, "learning_rate is nan"),
        ({"pretraining_rate": 0}, r"pretraining_rate is 0\.0"),
        ({"training_tol": -1}, r"training_tol is -1\.0"),
        ({"training_max_iter": 0}, "training_max_iter is 0"),
        ({"pretraining_noise": "0.5,0.1"}, r"pretraining_noise is \(0\.5, 0\.1\); .* the lesser first"),
        ({"pretraining_noise": "0.1,inf"}, r"pretraining_noise is \(0\.1, inf\); it takes finite numbers"),
        (
            {"form": "feed-forward", "jacobian_penalty": 1e-3},
            r"jacobian_penalty is 0\.001; it has an effect only with form=filtered,",
        ),
        ({"form": "denoiser", "steps": 8000}, "steps is 8000; with form=denoiser, which trains by pretraining_steps"),
        (
            {"form": "denoiser", "learning_rate": 1},
            r"learning_rate is 1\.0; .* by pretraining_steps and pretraining_rate",
        ),
        (
            {"form": "denoiser", "pretraining_steps": 0},
            "pretraining_steps is 0; with form=denoiser it takes an integer",
        ),
        ({"form": "denoiser", "weight": 1}, r"weight is 1\.0; with form=paper or denoiser it has"),
        ({"denoiser": "UNet", "depth": 3}, "depth is 3; with denoiser=UNet it has no effect"),
        (
            {"denoiser": "UNet", "spectral_norm": "conv"},
            "spectral_norm is 'conv'; it has an effect only with denoiser=DnCNN",
        ),
        ({"denoiser": "UNet", "batch_norm": True}, "batch_norm is True; it has an effect only with denoiser=DnCNN"),
        (
            {"denoiser": "UNet", "identity_start": True},
            "identity_start is True; it has an effect only with denoiser=DnCNN",
        ),
        ({"freeze_statistics": True}, "freeze_statistics is True; it has an effect only with batch_norm, an implicit"),
        (
            {"form": "paper", "freeze_statistics": True, "pretraining_steps": 0},
            "freeze_statistics is True; .* and pretraining_steps or init",
        ),
        ({"step_size": 9}, r"step_size is 9\.0; it has an effect only with form=paper"),
        ({"blocks": "1,1"}, r"blocks is \(1, 1\); it has an effect only with denoiser=UNet"),
        ({"warmup": 10}, "warmup is 10; with schedule=onecycle it has no effect"),
        ({"padding_mode": "valid", "kernel_size": 31, "crop": 30}, "crop is 30; with padding_mode=valid it takes"),
        ({"padding_mode": "valid", "resize": 4}, "resize is 4; .* it takes at least the kernel's size, 5"),
        ({"squash": True}, "squash is True; it has an effect only with resize"),
        (
            {"injection": True},
            "injection is True; it has an effect only with denoiser=UNet and form=filtered or preconditioned",
        ),
        (
            {"denoiser": "UNet", "injection": True, "pretraining_steps": 5},
            "pretraining_steps is 5; with injection it takes 0",
        ),
        ({"measurements": 2}, "measurements is 2; it has an effect only with form=universal"),
        ({"sigma_range": "1,2"}, r"sigma_range is \(1\.0, 2\.0\); it has an effect only with form=universal"),
        ({**UNIVERSAL, "sigma": 2}, r"sigma is 2\.0; with form=universal, for all blurs"),
        ({**UNIVERSAL, "measurements": 5}, "measurements is 5; it takes a divisor of batch_size=16"),
        ({**UNIVERSAL, "pretraining_steps": 5}, "pretraining_steps is 5; with form=universal it takes 0"),
        ({**UNIVERSAL, "crop": 30}, "crop is 30; .* it takes at least the kernel's size, 31"),
        ({**UNIVERSAL, "sigma_range": "0,5"}, "sigma_range is .* two positive numbers, the lesser first"),
        ({**UNIVERSAL, "sigma_range": "5,1"}, "sigma_range is .* two positive numbers, the lesser first"),
        ({**UNIVERSAL, "sigma_range": "1"}, "sigma_range is .* two positive numbers"),
        ({**UNIVERSAL, "noise_range": "-1,1"}, "noise_range is .* two non-negative numbers"),
        ({"form": "universal"}, "denoiser is DnCNN; form=universal takes a UNet"),
        (
            {"pretraining_steps": 0, "pretraining_rate": 1},
            r"pretraining_rate is 1\.0; it has an effect only with pretraining_steps",
        ),
        (
            {"init": "x", "pretraining_rate": 1},
            r"pretraining_rate is 1\.0; it has an effect only with pretraining_steps",
        ),
        ({"jacobian_bound": 0.5}, r"jacobian_bound is 0\.5; it has an effect only with jacobian_penalty"),
        ({"solver": "Anderson:tol=1"}, "solver is 'Anderson:tol=1'; tol is a setting of its own"),
        ({"solver": "Broyden:memory=3, max_iter=9"}, "max_iter is a setting of its own"),
        ({"gradient": "shine", "solver": "Picard"}, "solver is 'Picard'; gradient=shine takes Anderson or Broyden"),
        ({"gradient": "shine:ratio=2", "solver": "Inertial:momentum=0.2"}, "takes Anderson or Broyden"),
        (
            {"gradient": "unrolled:steps=3", "solver": "Broyden"},
            "solver is 'Broyden'; with gradient=unrolled, which applies the layer a fixed number of times",
        ),
        ({"features": "4,x"}, "features is 'x'"),
        ({"seed": -1}, "seed is -1"),
        ({"data": None}, "data is missing"),
    ],
)
def test_a_bad_setting_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        make_settings({"data": "somewhere", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"form": "round"},
            "form is 'round'; it takes one of filtered, preconditioned, paper, universal, feed-forward, d",
        ),
        ({"form": "plug-and-play"}, r"jfbfast train does not train; examples/train_denoiser\.py trains its denoiser"),
        ({"gradient": "guess"}, "gradient is 'guess'"),
        ({"gradient": "jfb:terms=3"}, "jfb does not take"),
        ({"gradient": "jfb:terms"}, "NAME:KEY=VALUE"),
        ({"form": "paper", "denoiser": "UNet"}, "takes a DnCNN, not residual"),
        ({"features": "4,8"}, "a DnCNN takes one number"),
        ({"solver": "Newton"}, "solver is of kind 'Newton'"),
        ({"solver": "Picard:memory=3"}, "Picard does not take"),
    ],
)
def test_a_network_that_cannot_be_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        make_settings({"data": "somewhere", **values}).model_config().model()


def test_settings_from_the_command_line_and_from_a_file_are_the_same():
    typed = make_settings({"data": "d", "features": "4,8,8", "learning_rate": "1e-3", "pretraining_noise": [0.1, 1]})
    assert typed.features == (4, 8, 8) and typed.learning_rate == 1e-3 and typed.pretraining_noise == (0.1, 1.0)
    config = make_settings({"data": "d", "gradient": "jfb"}).model_config()
    assert json.loads(json.dumps(config.denoiser)) == config.denoiser


def test_defaults_depend_on_the_form_and_the_optimizer():
    adam, muon = (make_settings({"data": "d", "optimizer": name}).resolved() for name in ("adam", "muon"))
    assert (adam.learning_rate, adam.pretraining_rate) == (3e-4, 1e-3)
    assert (muon.learning_rate, muon.pretraining_rate) == (0.01, 0.01)
    assert (adam.kernel_size, adam.padding_mode, adam.sigma_range) == (5, "reflect", None)
    config = make_settings({"data": "d", **UNIVERSAL}).model_config()
    assert (config.kernel_size, config.padding_mode) == (None, "valid")
    assert (config.sigma_range, config.noise_range) == ([0.3, 5.0], [0.0, 0.1])
    assert (config.blur().kernel_size, config.least_side) == ((7, 7), 31)
    config = make_settings({"data": "d", **UNIVERSAL, "sigma_range": "2,5", "noise_range": "0.02,0.1"}).model_config()
    assert (config.sigma, config.noise) == (2.0, 0.02)


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "training").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_documented_runs_are_valid(file):
    settings = make_settings({**read_settings(file), "data": "d"}).resolved()
    model = settings.model_config().model()
    assert sum(p.numel() for p in model.parameters()) > 1e5


def test_resolved_settings_survive_their_file(tmp_path, monkeypatch):
    settings = make_settings({"data": "d", "denoiser": "UNet", "form": "preconditioned", "train": 0.5}).resolved()
    write_settings(tmp_path / "config.yaml", settings)
    assert make_settings(read_settings(tmp_path / "config.yaml")) == settings
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", lambda path, *_, **__: path.write_bytes(b"dat") and path.open("xb"))
        with pytest.raises(OSError, match="File exists"):
            write_settings(tmp_path / "config.yaml", settings)
    assert make_settings(read_settings(tmp_path / "config.yaml")) == settings
    assert os.listdir(tmp_path) == ["config.yaml"]
    for content in ("- a\n", "a: [", "\xff"):
        (tmp_path / "config.yaml").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config\.yaml: not a file of settings"):
            read_settings(tmp_path / "config.yaml")
