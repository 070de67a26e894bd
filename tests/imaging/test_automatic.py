"""Restoration of what is not given: the blur and the noise are estimated; and by a network that takes any blur."""

import json
import math

import pytest
import torch
from skimage import data as photographs
from typer.testing import CliRunner

import jfbfast
from jfbfast import Estimate
from jfbfast.cli import app
from jfbfast.imaging.automatic import combined, known
from jfbfast.imaging.blurs import BlurChoice
from jfbfast.imaging.photographs import Photograph, write_photograph
from jfbfast.models import pretrained
from jfbfast.models.checkpoint import save_checkpoint
from jfbfast.models.config import ModelConfig


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small random network for any blur, in a directory of its own, as universal.safetensors."""
    denoiser = {"kind": "UNet", "channels": 3, "features": [4, 8], "blocks": [1, 1], "conditions": 3, "injection": 13}
    config = ModelConfig(form="universal", denoiser=denoiser, kernel_size=7, padding_mode="valid", noise_range=[0, 0.1])
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "universal.safetensors"
    save_checkpoint(path, config.model(), config)
    return path


@pytest.fixture
def shipped(file, monkeypatch):
    """Makes this network the only one that ships."""
    monkeypatch.setattr(pretrained, "WEIGHTS", file.parent)


def blurred(name="astronaut", sigma=1.5, noise=0.01, side=200):
    """Part of a photograph, blurred in 8 bits, and the sharp part."""
    sharp = torch.from_numpy(getattr(photographs, name)()).permute(2, 0, 1).float() / 127.5 - 1
    sharp = sharp[:, 40 : 40 + side, 100 : 100 + side].contiguous()
    blur = jfbfast.GaussianBlur(2 * math.ceil(4 * sigma) + 1, sigma, "valid")
    margin = blur.margin[0]
    d = blur(sharp)
    d = d + noise * torch.randn(d.shape, generator=torch.Generator().manual_seed(0))
    return ((d + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1, sharp[:, margin:-margin, margin:-margin]


GIVEN = [
    {"sigma": 1.2},
    {"sigma": (0.8, 1.6)},
    {"motion": (7, 30)},
    {"defocus": 2.0},
    {"sigma": 1.2, "padding_mode": "reflect"},
    {"sigma": 1.2, "padding_mode": "zeros", "light": "encoded"},
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_the_shipped_network_restores_every_blur(given, shipped):
    d, _ = blurred(side=120)
    for channels in (3, 1):
        image, report = jfbfast.restore(d[:channels], **given)
        assert report.method == "universal" and report.evaluations > 0 and report.unconverged == 0
        assert image.shape == d[:channels].shape and (image - d[:channels]).square().mean() < 0.05


def test_without_its_weights_everything_is_restored_by_tikhonov(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    d, sharp = blurred()
    for given in ({"sigma": 1.5}, {"sigma": "auto"}):
        image, report = jfbfast.restore(d, light="encoded", **given)
        assert report.method.startswith("Tikhonov")
        assert (image - sharp).square().mean() < 0.75 * (d - sharp).square().mean()


def test_sigma_and_noise_are_estimated_and_reported(shipped):
    d, _ = blurred()
    report = jfbfast.restore(d, sigma="auto", noise="auto", light="encoded").report
    found = report.estimated
    assert found == jfbfast.estimate(d) and 1.2 < found.sigma < 1.8
    assert report.blur == f"a Gaussian of σ = {round(found.sigma, 3):g} pixels" and report.noise >= found.noise
    assert json.loads(json.dumps(report.values()))["estimated"]["sigma_range"] == list(found.sigma_range)
    given = jfbfast.restore(d, sigma=1.5, noise=0.02, light="encoded", tolerance=0).report
    assert given.estimated is None and given.noise == 0.02


def test_noise_is_estimated_unless_it_is_given_or_cannot_be_seen(shipped):
    d, _ = blurred()
    assert jfbfast.restore(d, sigma=1.5, light="encoded").report.estimated == jfbfast.estimate(d)
    small = jfbfast.restore(d[:, :60], sigma=1.5, tolerance=0).report
    assert small.estimated is None and small.noise == 0.01
    for refused in ({"sigma": "auto"}, {"sigma": 1.5, "noise": "auto"}):
        with pytest.raises(ValueError, match="sides of at least 64"):
            jfbfast.restore(d[:, :60], **refused)
    with pytest.raises(ValueError, match="sigma is 'most'; it takes one or two numbers of pixels, or 'auto'"):
        jfbfast.restore(d, sigma="most")


def test_a_sigma_that_is_too_large_is_lowered_and_a_small_one_kept():
    found = Estimate(1.0, 0.01, (0.9, 1.1), (0.009, 0.011))
    assert 1 < combined(1.2, 0.1, found) < 1.2 and combined(1.2, 0.4, found) < combined(1.2, 0.1, found)
    assert combined(0.8, 0.2, found) == 0.8
    unsure = Estimate(1.0, 0.01, (0.5, 2.0), (0.009, 0.011))
    assert combined(1.2, 0.2, unsure) > combined(1.2, 0.2, found)


def test_a_wrong_sigma_is_named_where_the_photograph_is_clearly_sharper():
    d, _ = blurred(sigma=1.0)
    for given, tolerance, lowered, warns in ((3.0, 0.2, True, 1), (3.0, 0.0, False, 0), (0.8, 0.2, False, 0)):
        warned = []
        blur = known("x.png", d, BlurChoice(given), 0.01, tolerance, print, warned.append).blur
        assert (blur.sigma < given) is lowered and len(warned) == warns
        assert all("x.png is sharper than a Gaussian of σ = 3 pixels could leave it" in text for text in warned)


def test_what_was_found_is_said_and_doubt_is_a_warning():
    d, _ = blurred()
    for photo, doubts in ((d, False), (0.01 * torch.randn(3, 100, 100), True)):
        said, warned = [], []
        found = known("x.png", photo, BlurChoice("auto"), None, 0.2, said.append, warned.append)
        assert found.noise == found.found.noise and "x.png shows a blur of σ = " in (said + warned)[0]
        assert bool(warned) is doubts and bool(said) is not doubts


def test_more_noise_than_the_network_knows_is_named(shipped):
    d, _ = blurred(noise=0.3)
    with pytest.warns(UserWarning, match=r"noise of 0.3 is more than universal was trained for; it restores for 0.1"):
        jfbfast.restore(d, sigma=1.5, noise=0.3, tolerance=0, light="encoded")


def test_the_command_line_estimates_too(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photograph("x.png", Photograph((blurred()[0] + 1) / 2, None, "uint8"))
    options = ("--sigma", "auto", "--noise", "auto", "--light", "encoded", "--report", "r.json")
    result = CliRunner().invoke(app, ["restore", "x.png", *options])
    assert result.exit_code == 0, result.output
    assert "Restoring a Gaussian of unknown σ by the shipped model universal." in result.output
    assert "x.png shows a blur of σ = 1" in " ".join(result.output.split())
    row = json.loads((tmp_path / "r.json").read_text())[0]
    assert row["method"] == "universal" and 1 < row["estimated"]["sigma"] < 2
    result = CliRunner().invoke(app, ["restore", "x.png", "--sigma", "1", "--noise", "some"])
    assert result.exit_code == 1 and "--noise is some; it takes a number, or auto" in " ".join(result.output.split())
