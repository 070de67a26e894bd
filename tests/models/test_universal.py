"""The universal network: what it is told of a measurement, and that it is set for one at a time."""

import math

import pytest
import torch

from jfbfast import Anderson, Blur, DEGrad, GaussianBlur, SeparableBlur, UNet, UniversalDEGrad, point_spread
from jfbfast.models import pretrained
from jfbfast.models.checkpoint import load_checkpoint, save_checkpoint
from jfbfast.models.config import ModelConfig
from jfbfast.models.universal import describe, power_spectrum
from jfbfast.operators.inverse import _axis_svd, factors

DENOISER = {"kind": "UNet", "features": [4, 8], "blocks": [1, 1], "conditions": 3, "injection": 13}

CONFIG = ModelConfig(
    form="universal", denoiser=DENOISER, kernel_size=None, padding_mode="valid", noise_range=[0.0, 0.1]
)
SINGLE = ModelConfig(denoiser={"kind": "UNet", "features": [4], "blocks": [1]}, padding_mode="zeros")


def small_model(**options):
    torch.manual_seed(0)
    return UniversalDEGrad(UNet(3, (4, 8), (1, 1), conditions=3, injection=13), **options).eval()


def test_the_power_spectrum_is_that_of_the_taps():
    taps_y, taps_x = [0.2, 0.5, 0.3], [0.1, 0.2, 0.4, 0.2, 0.1]
    power = power_spectrum(SeparableBlur(taps_y, taps_x))
    f = torch.arange(64, dtype=torch.float64) / 64
    one_axis = [
        sum(t * torch.exp(-2j * math.pi * f * k) for k, t in enumerate(taps)).abs().square()
        for taps in (taps_y, taps_x)
    ]
    torch.testing.assert_close(power, torch.outer(*one_axis), rtol=0, atol=1e-14)


def test_a_psf_larger_than_the_grid_keeps_its_spectrum_at_the_grids_frequencies():
    sigma = 12.0
    power = power_spectrum(Blur(point_spread.gaussian(sigma)))
    f = torch.fft.fftfreq(64, dtype=torch.float64)
    expected = torch.exp(-((2 * math.pi * sigma) ** 2) * (f[:, None] ** 2 + f**2))
    torch.testing.assert_close(power, expected, rtol=0, atol=0.02)  # the Gaussian is cut off at 3σ


def test_a_description_is_that_of_its_formula():
    power, noise = torch.rand(8, 8, dtype=torch.float64), 0.03
    v, kept, error = (noise + 5e-4) ** 2, 0.0, 0.0
    for i in range(8):
        for j in range(8):
            f = [(k if k < 4 else k - 8) / 8 for k in (i, j)]
            signal = 1e-3 * 0.25 / max(f[0] ** 2 + f[1] ** 2, (0.5 / 8) ** 2)
            w = float(power[i, j]) * signal / (float(power[i, j]) * signal + v)
            kept, error = kept + w / 64, error + signal * (1 - w) / 64
    expected = [math.log((noise + 5e-4) / 0.0105), 0.5 * math.log(kept), 0.25 * math.log(error / 1e-3)]
    torch.testing.assert_close(describe(power, noise), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_description_takes_one_noise_level_for_each_sample():
    powers = torch.rand(3, 16, 16, dtype=torch.float64)
    noises = torch.tensor([0.0, 0.01, 0.1], dtype=torch.float64)
    each = torch.stack([describe(power, float(noise)) for power, noise in zip(powers, noises, strict=True)])
    torch.testing.assert_close(describe(powers, noises), each)


@pytest.mark.parametrize("padding_mode", ["valid", "reflect", "circular"])
def test_a_solve_reaches_the_fixed_point_for_any_blur(padding_mode):
    model = small_model(solver=Anderson(tol=1e-4))
    x = torch.rand(2, 3, 33, 30)
    for blur in (GaussianBlur(None, (1.5, 0.7), padding_mode), Blur(point_spread.motion(5, 30), padding_mode)):
        model.set_measurement(blur, 0.02)
        d = blur(x)
        restored = model(d)
        assert restored.shape == x.shape
        assert model.solution.status.tolist() == [0, 0]
        torch.testing.assert_close(model.layer(restored, d), restored, rtol=0, atol=2e-3)


def test_the_layer_takes_the_injection_or_computes_it():
    model = small_model()
    blur = GaussianBlur(5, 1.0, "valid")
    model.set_measurement(blur, 0.02)
    x = torch.rand(2, 3, 16, 16)
    d = blur(x)
    injected = model.injected(d)
    torch.testing.assert_close(model.layer(x, d, *injected), model.layer(x, d))
    torch.testing.assert_close(model.start(d, *injected), model.start(d))


def test_the_injection_is_three_restorations_and_a_map_of_what_was_measured():
    model, blur = small_model().double(), GaussianBlur(3, 1.0, "valid")
    model.set_measurement(blur, 0.05)
    d = torch.rand(1, 3, 8, 9, dtype=torch.float64)
    (z,) = model.regularizer.injected(blur, d)
    for part, share in zip(z[:, :9].split(3, 1), (1, 1 / 16, 1 / 256), strict=True):
        damping = share * model.regularizer.weight
        torch.testing.assert_close(part, (1 + damping) * blur.solve(blur.adjoint(d), damping))
    torch.testing.assert_close(z[:, 9:], blur.adjoint(torch.ones_like(d[:, :1])))


def test_parameters_of_the_weights_get_gradients():
    model = small_model(solver=Anderson(max_iter=3, tol=0))
    model.set_measurement(GaussianBlur(5, 1.0, "valid"), 0.03)
    model(torch.rand(1, 3, 12, 12)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_noise_level_out_of_range_leaves_the_model_as_it_was():
    model = small_model(noise_range=(0.0, 0.05))
    before, condition = model.blur, model.regularizer.condition
    with pytest.raises(ValueError, match=r"noise is 0\.06; it takes a number from 0 to 0\.05"):
        model.set_measurement(GaussianBlur(5, 2.0), 0.06)
    with pytest.raises(TypeError, match="blur is Identity; it takes a SeparableBlur or a Blur"):
        model.set_measurement(torch.nn.Identity(), 0.01)
    assert model.blur is before and model.regularizer.condition is condition


def test_a_file_rebuilds_the_model_for_its_first_measurement(tmp_path):
    config = ModelConfig(form="universal", denoiser=DENOISER, sigma=2.0, noise=0.03, padding_mode="valid")
    model = config.model()
    save_checkpoint(tmp_path / "model.safetensors", model, config)
    loaded, found = load_checkpoint(tmp_path / "model.safetensors")
    assert found == config and isinstance(loaded, UniversalDEGrad)
    assert (loaded.blur.padding_mode, loaded.noise) == ("valid", 0.03)
    d = torch.rand(1, 3, 20, 20)
    torch.testing.assert_close(loaded(d), model.eval()(d))


def test_a_config_with_another_network_is_refused():
    with pytest.raises(ValueError, match="the universal form takes a UNet with conditions=3 and injection=13"):
        ModelConfig(form="universal", denoiser={**DENOISER, "injection": True}).model()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped models: a universal one, and one for a single setting."""
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    for name, config in (("a-universal", CONFIG), ("b-single", SINGLE)):
        save_checkpoint(tmp_path / f"{name}.safetensors", config.model(), config)


def test_shipped_models_are_set_for_their_own_measurements_only(shipped):
    model = DEGrad.from_pretrained("a-universal", sigma=2.0, noise=0.03)
    assert (model.blur.sigma, model.blur.kernel_size, model.noise) == ((2.0, 2.0), (13, 13), 0.03)
    assert model.blur.padding_mode == "valid" and not model.training
    assert DEGrad.from_pretrained("a-universal", sigma=2.0).noise == 0.01
    assert DEGrad.from_pretrained("a-universal").blur.sigma == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"noise is 0\.3; it takes a number from 0 to 0\.1"):
        DEGrad.from_pretrained("a-universal", sigma=2.0, noise=0.3)
    DEGrad.from_pretrained("b-single", sigma=1.0, noise=0.01)
    with pytest.raises(ValueError, match=r"noise is 0\.03; b-single was trained for noise = 0\.01 alone"):
        DEGrad.from_pretrained("b-single", noise=0.03)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ((5, 1.0, 0.01, "zeros"), "b-single"),
        ((5, 1.0, 0.02, "zeros"), None),
        ((5, 1.0, 0.01, "reflect"), None),
    ],
)
def test_a_universal_network_is_not_for_one_setting_alone(shipped, setting, name):
    assert pretrained.matching_name(*setting) == name


def test_a_comparison_sets_each_model_for_the_measurements():
    said, setting = [], ModelConfig(sigma=2.0, noise=0.03, padding_mode="zeros")
    model, single = CONFIG.model(), SINGLE.model()
    pretrained.set_network("universal", model, CONFIG, setting, said.append)
    assert model.noise == 0.03 and model.blur.sigma == (2.0, 2.0) and not said
    pretrained.set_network("single", single, SINGLE, setting, said.append)
    assert single.blur.sigma == (2.0, 2.0) and "single was trained for other measurements (sigma = 1.0" in said[0]


def test_the_cache_of_factors_stays_bounded_for_many_blurs():
    x = torch.rand(1, 8, 8)
    for i in range(80):
        GaussianBlur(5, 0.5 + i / 20).solve(x, 0.1)
    for cache in (factors, _axis_svd):
        assert cache.cache_info().currsize <= cache.cache_info().maxsize <= 64
