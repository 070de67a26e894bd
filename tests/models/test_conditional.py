"""One network for a range of measurements: the formulas, the bounds of its ranges, files, training, use."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import jfbfast
from helpers import small_runs
from helpers.small_runs import rows, write_photographs
from jfbfast import DEGrad, GaussianBlur, UNet
from jfbfast.cli import app
from jfbfast.diagnostics import lipschitz_bound
from jfbfast.experiments.runs import _take_weights
from jfbfast.experiments.settings import make_settings
from jfbfast.implicit.prepared import prepared
from jfbfast.models import pretrained
from jfbfast.models.checkpoint import load_checkpoint, read_config, save_checkpoint
from jfbfast.models.conditional import ConditionalDEGrad, condition
from jfbfast.models.config import MeasurementRanges, ModelConfig
from jfbfast.models.pretrained import set_network
from jfbfast.operators.inverse import _axis_svd, factors
from jfbfast.spectrum import operator_norm

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"features": [4, 6], "blocks": [1, 1]}
CONFIG = ModelConfig(
    denoiser={"kind": "UNet", **SIZES, "conditions": 2},
    padding_mode="zeros",
    sigma_range=[0.5, 5.0],
    noise_range=[0.0, 0.1],
)
INJECTED = replace(CONFIG, denoiser={**CONFIG.denoiser, "injection": True})
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


def measured(blur, seed=1):
    x = torch.rand(2, 3, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return blur(x) + 0.03 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Told(torch.nn.Module):
    """D(s · y, t · z; c) for a fixed condition c, as a denoiser of images."""

    def __init__(self, denoiser, scales, told):
        super().__init__()
        self.denoiser, self.scales, self.told = denoiser, scales, told

    def forward(self, *images):
        scaled = (scale * image for scale, image in zip(self.scales, images, strict=False))
        return self.denoiser(*scaled, condition=self.told)


@pytest.mark.parametrize("config", [CONFIG, INJECTED], ids=["", "injection"])
@pytest.mark.parametrize(("sigma", "noise"), [(0.5, 0.0), (2.0, 0.03), (5.0, 0.1)])
def test_a_conditional_model_equals_a_plain_one_with_the_same_numbers(sigma, noise, config):
    model = made(sigma, noise, config)
    red = model.regularizer
    c = (math.log(sigma), math.log((noise + 1e-4) / 0.0101))
    weight, damping = (
        float(torch.exp(start + exponents[0] * c[0] + exponents[1] * c[1]))
        for start, exponents in (
            (red.log_weight.detach(), red.weight_exponents.detach()),
            (red.log_filter_damping.detach(), red.filter_damping_exponents.detach()),
        )
    )
    plain = DEGrad(
        GaussianBlur(5, sigma),
        jfbfast.RED(Told(red.denoiser, (1 + damping, 1 + weight), c), weight, damping, injection=red.injection),
        preconditioner="exact",
    ).double()
    d = measured(model.blur)
    x = torch.rand_like(d)
    torch.testing.assert_close(model.layer(x, d), plain.layer(x, d), rtol=0, atol=1e-6)
    torch.testing.assert_close(prepared(model.layer)(x, d), model.layer(x, d), rtol=1e-10, atol=1e-12)
    model.solver = plain.solver = jfbfast.Anderson(tol=1e-9, max_iter=200)
    torch.testing.assert_close(model(d), plain(d), rtol=0, atol=1e-5)
    bound = float(lipschitz_bound(model, x, d).max())
    lipschitz = operator_norm(
        plain.regularizer.denoiser, plain.blur.filter(x, damping), plain.regularizer.injected(plain.blur, d)
    )
    assert bound == pytest.approx(weight / (weight**0.5 + damping**0.5) ** 2 * float(lipschitz.max()), rel=1e-4)


def test_the_prepared_layer_follows_the_setting():
    model, d = made(), measured(GaussianBlur(5, 2.0))
    restored = {}
    for sigma, noise in ((2.0, 0.03), (2.0, 0.06), (1.0, 0.03), (2.0, 0.03)):
        model.set_measurement(sigma, noise)
        found = model(d).detach()
        assert model.solution.residual.max() < 1e-2
        torch.testing.assert_close(found, copy.deepcopy(model)(d).detach())
        torch.testing.assert_close(found, restored.setdefault((sigma, noise), found))
    values = list(restored.values())
    assert all((a - b).abs().max() > 1e-3 for a, b in ((values[0], values[1]), (values[0], values[2])))


def test_the_condition_changes_the_output_and_every_parameter_gets_a_gradient():
    model = made()
    y = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    denoiser = model.regularizer.denoiser
    assert (
        denoiser(y, condition=condition(2.0, 0.03)) - denoiser(y, condition=condition(2.0, 0.05))
    ).abs().max() > 1e-4
    model(measured(model.blur)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with pytest.raises(ValueError, match=r"condition is \(\); this network takes 2 numbers"):
        denoiser(y)
    with pytest.raises(ValueError, match=r"condition is \(1.0,\); this network takes 0 numbers"):
        UNet(3, (4,), (1,))(y, condition=(1.0,))


def test_the_start_keeps_the_brightness_at_every_setting():
    model = CONFIG.model()
    for sigma, noise in model.ranges.grid():
        model.set_measurement(sigma, noise)
        grey = torch.full((1, 3, 64, 64), 0.5)
        start = model.start(model.blur(grey))[..., 24:-24, 24:-24]
        torch.testing.assert_close(start, grey[..., 24:-24, 24:-24], rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ((0.4, 0.01), r"sigma is 0.4; this model takes a number from 0.5 to 5"),
        ((5.1, 0.01), r"sigma is 5.1"),
        ((math.nan, 0.01), r"sigma is nan"),
        (((1.0, 1.0), 0.01), r"sigma is \(1.0, 1.0\)"),
        ((1.0, -0.01), r"noise is -0.01; this model takes a number from 0 to 0.1"),
        ((1.0, 0.2), r"noise is 0.2"),
    ],
)
def test_a_setting_out_of_range_is_named_and_changes_nothing(setting, message):
    model = made()
    with pytest.raises(ValueError, match=message):
        model.set_measurement(*setting)
    assert model.measurement == (2.0, 0.03) and model.blur.sigma == (2.0, 2.0)
    assert model.regularizer.condition == condition(2.0, 0.03)


@pytest.mark.parametrize(
    ("sigma", "noise", "message"),
    [
        ((0.0, 5.0), (0.0, 0.1), "sigma_range is .* two positive numbers"),
        ((5.0, 0.5), (0.0, 0.1), "sigma_range"),
        ((0.5,), (0.0, 0.1), "sigma_range"),
        (1.0, (0.0, 0.1), r"sigma_range is 1\.0; it takes two numbers"),
        ((0.5, 5.0), (-0.1, 0.1), "noise_range is .* two non-negative numbers"),
        ((0.5, 5.0), (0.0, math.inf), "noise_range"),
    ],
)
def test_invalid_ranges_are_named(sigma, noise, message):
    with pytest.raises(ValueError, match=message):
        MeasurementRanges(sigma, noise)


def test_draws_cover_the_ranges():
    ranges = MeasurementRanges()
    drawn = np.array([ranges.draw(np.random.default_rng((0, i))) for i in range(2000)])
    assert all(tuple(setting) in ranges for setting in drawn) and all(setting in ranges for setting in ranges.grid())
    assert (drawn[:, 0] < math.sqrt(0.5 * 5)).mean() == pytest.approx(0.5, abs=0.05)
    assert (drawn[:, 1] < 0.025).mean() == pytest.approx(0.5, abs=0.05)


def test_a_conditional_model_is_the_same_after_saving_and_loading(tmp_path):
    model, path = made().float(), tmp_path / "m.safetensors"
    save_checkpoint(path, model, CONFIG)
    loaded, config = load_checkpoint(path)
    assert (
        config == CONFIG and read_config(path).ranges == MeasurementRanges() and isinstance(loaded, ConditionalDEGrad)
    )
    assert loaded.measurement == (1.0, 0.01)
    loaded.set_measurement(2.0, 0.03)
    d = measured(model.blur).float()
    assert torch.equal(loaded(d), model(d))


def test_a_default_outside_the_range_becomes_the_nearest_end():
    values = {"data": "d", "denoiser": "UNet", "sigma_range": "2,5", "noise_range": "0.02,0.1"}
    config = make_settings(values).model_config()
    assert (config.sigma, config.noise) == (2.0, 0.02)
    with pytest.raises(ValueError, match=r"sigma is 1\.5; this model takes a number from 2 to 5"):
        make_settings({**values, "sigma": 1.5}).model_config().model()


def test_invalid_descriptions_are_named():
    with pytest.raises(ValueError, match="sigma_range and noise_range take the filtered form with a UNet of 2"):
        ModelConfig(denoiser=SINGLE.denoiser, sigma_range=[0.5, 5], noise_range=[0, 0.1]).model()
    for values, message in (
        ({"sigma_range": "0.5,5"}, "sigma_range and noise_range are for one network; it takes both"),
        ({"sigma_range": "0.5,5", "noise_range": "0,0.1"}, "form is filtered with a DnCNN"),
        ({**FLAGS, "measurements": 5}, "measurements is 5; it takes a divisor of batch_size=16"),
        ({**FLAGS, "pretraining_steps": 5}, "pretraining_steps is 5; with sigma_range it takes 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_settings({"data": "d", **values})


def test_training_can_start_from_a_model_for_one_setting():
    torch.manual_seed(0)
    single, model = SINGLE.model(), CONFIG.model()
    with torch.no_grad():
        single.regularizer.log_weight.fill_(math.log(0.07))
    _take_weights(model, single)
    y = torch.rand(1, 3, 8, 8)
    for sigma, noise in ((1.0, 0.01), (3.0, 0.05)):
        told = model.regularizer.denoiser(y, condition=condition(sigma, noise))
        torch.testing.assert_close(told, single.regularizer.denoiser(y))
    for value in (model.regularizer.weight, model.regularizer.filter_damping):
        assert value.item() == pytest.approx(0.07)
    with pytest.raises(RuntimeError):
        _take_weights(model, ModelConfig(denoiser={"kind": "DnCNN", "depth": 3}).model())


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped models: for a range, and for one setting within it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "WEIGHTS", folder)
    save_checkpoint(folder / "a-range.safetensors", made().float(), CONFIG)
    save_checkpoint(folder / "b-single.safetensors", SINGLE.model(), SINGLE)
    return folder


def test_shipped_models_are_set_for_their_own_measurements_only(shipped):
    model = DEGrad.from_pretrained("a-range", sigma=2.0, noise=0.03)
    assert isinstance(model, ConditionalDEGrad) and model.measurement == (2.0, 0.03) and not model.training
    for given in ({}, {"sigma": 2.0}, {"noise": 0.03}):
        with pytest.raises(ValueError, match=r"takes sigma, from 0.5 to 5 pixels, and noise, from 0 to 0.1"):
            DEGrad.from_pretrained("a-range", **given)
    with pytest.raises(ValueError, match=r"noise is 0.3; this model takes a number from 0 to 0.1"):
        DEGrad.from_pretrained("a-range", sigma=2.0, noise=0.3)
    DEGrad.from_pretrained("b-single", sigma=1.0, noise=0.01)
    DEGrad.from_pretrained("a-range", sigma=np.float32(2), noise=0.03)
    with pytest.raises(ValueError, match=r"noise is 0.03; b-single was trained for noise = 0.01 alone"):
        DEGrad.from_pretrained("b-single", noise=0.03)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ((5, 1.0, 0.01, "zeros"), "b-single"),
        ((5, 1.0, 0.02, "zeros"), "a-range"),
        ((5, 0.5, 0.0, "zeros"), "a-range"),
        ((5, 0.4, 0.01, "zeros"), None),
        ((5, 2.0, 0.2, "zeros"), None),
        ((5, 2.0, 0.01, "reflect"), None),
        ((7, 2.0, 0.01, "zeros"), None),
    ],
)
def test_a_model_for_one_setting_is_preferred_to_one_for_a_range(shipped, setting, name):
    assert pretrained.matching_name(*setting) == name


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


def test_the_cache_of_factors_stays_bounded_for_many_blurs():
    x = torch.rand(1, 8, 8)
    for sigma in np.linspace(0.5, 5, 80):
        GaussianBlur(5, float(sigma)).solve(x, 0.1)
    for cache in (factors, _axis_svd):
        assert cache.cache_info().currsize <= cache.cache_info().maxsize <= 64


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
    assert code == 1 and "alone, so leave it out" in told
    code, told = run("restore", photograph, "--checkpoint", "b-single", "--sigma", 1, "--noise", 0.01, *zeros)
    assert code == 0 and "trained for" not in told
    scored = ("a-range", folder, "--methods", "blurred", "--validation", 0, "--resize", 16)
    code, told = run("evaluate", *scored, "--sigma", 2, "--noise", 0.03)
    assert code == 0 and "σ = 2, zeros; noise 0.03" in told and "trained for" not in told
    code, told = run("evaluate", *scored, "--sigma", 6)
    assert code == 1 and "sigma is 6.0; this model takes a number from 0.5 to 5" in told


def test_a_comparison_sets_each_model_for_the_measurements():
    model, said = CONFIG.model(), []
    setting = ModelConfig(sigma=2.0, noise=0.03, padding_mode="zeros")
    set_network("ranges", model, CONFIG, setting, said.append)
    assert model.measurement == (2.0, 0.03) and model.blur.sigma == (2.0, 2.0) and not said
    single = SINGLE.model()
    set_network("single", single, SINGLE, setting, said.append)
    assert single.blur.sigma == (2.0, 2.0) and "single was trained for other measurements (sigma = 1.0" in said[0]
