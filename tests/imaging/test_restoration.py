"""How `jfbfast restore` treats a photograph: its surroundings, its brightness, its noise, and λ."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from skimage import data as photographs

import jfbfast
from jfbfast import Anderson, Blur, DEGrad, GaussianBlur, point_spread
from jfbfast.imaging.blurs import BlurChoice
from jfbfast.imaging.camera import clipped
from jfbfast.imaging.light import to_encoded, to_linear
from jfbfast.imaging.methods import Tikhonov, extend
from jfbfast.imaging.plausibility import PowerSpectrum, gain
from jfbfast.imaging.quality import measure, psnr
from jfbfast.imaging.restoration import Restoration
from jfbfast.models.config import ModelConfig
from jfbfast.models.pretrained import pretrained_names


def scene(name="astronaut", top=0, left=0, side=320):
    """Part of a photograph on [−1, 1]."""
    whole = torch.from_numpy(getattr(photographs, name)()).permute(2, 0, 1).float() / 127.5 - 1
    return whole[:, top : top + side, left : left + side]


def camera(sharp, sigma, noise=0.01, cut=32, seed=0, light="encoded"):
    """A piece of the blurred scene in 8 bits, and the same piece of the sharp one."""
    blur = GaussianBlur(2 * math.ceil(4 * sigma) + 1, sigma, "reflect")
    white = torch.randn(sharp.shape, generator=torch.Generator().manual_seed(seed))
    blurred = to_encoded(blur(to_linear(sharp))) if light == "linear" else blur(sharp)
    d = ((blurred + noise * white + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    return (each[:, cut:-cut, cut:-cut] for each in (d, sharp))


def restored(d, checkpoint=None, tile=512, overlap=64, said=None, noise=None, light="encoded", tolerance=0.05, **blur):
    say = (said if said is not None else []).append
    padding_mode = blur.pop("padding_mode", "valid")
    choice = BlurChoice(**blur) if blur else None
    restoration = Restoration(
        choice,
        noise=noise,
        light=light,
        padding_mode=padding_mode,
        checkpoint=checkpoint,
        tolerance=tolerance,
        say=say,
        warn=say,
    )
    return restoration(d, "photograph.png", tile=tile, overlap=overlap).image.clamp(-1, 1)


def improvement(x, d, sharp):
    """The gain in dB of a restoration over d, as an approximation of the sharp image."""
    return 10 * math.log10((d - sharp).square().mean() / (x - sharp).square().mean())


def border(x):
    """Its outermost ten pixels."""
    frame = torch.ones(x.shape[-2:], dtype=torch.bool)
    frame[10:-10, 10:-10] = False
    return x[:, frame]


@pytest.mark.parametrize(("sigma", "middle", "edge"), [(1.0, 4.0, 0.7), (3.0, 1.0, 0.7)])
def test_a_piece_of_a_larger_scene_gains_up_to_its_border(sigma, middle, edge):
    d, sharp = camera(scene(), sigma)
    x = restored(d, sigma=sigma, kernel_size=5 if sigma == 1 else None)
    assert improvement(x, d, sharp) > middle
    assert improvement(border(x), border(d), border(sharp)) > edge


@pytest.mark.parametrize("name", pretrained_names())
@pytest.mark.parametrize("colour", [(-1, -1, -1), (1, 1, 1), (0.5, 0.5, 0.5), (1, 1, -1)])
def test_a_network_leaves_a_flat_photograph_flat(name, colour):
    d = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, 40, 50).contiguous()
    corners = {"universal": 12, "plug-and-play": 20}  # the worst errors there, with unknown surroundings
    given = {"sigma": 1.0, "noise": 0.01} if name in corners else {}
    most = corners.get(name, 2) / 127.5
    assert (restored(d, name, **given) - d).abs().max() < most


@pytest.mark.parametrize("padding_mode", ["valid", "zeros", "reflect", "replicate", "circular"])
def test_tikhonov_commutes_with_an_offset_of_brightness(padding_mode):
    blur, margin = GaussianBlur(5, 1.0, padding_mode), 2 if padding_mode == "valid" else 0
    method = Tikhonov(blur, GaussianBlur(5, 1.0, "valid"), 0.1)
    d = torch.randn(1, 3, 20, 24, dtype=torch.float64)
    one = torch.ones(1, 1, 20 + 2 * margin, 24 + 2 * margin, dtype=torch.float64)
    offset = torch.tensor([0.5, -0.3, 2.0], dtype=torch.float64)[:, None, None]
    plain, shifted = method(d), method(d + offset * blur(one))
    torch.testing.assert_close(shifted, plain + offset)


def test_tikhonov_minimises_the_distance_to_a_smooth_image():
    blur = GaussianBlur(5, 1.0, "valid")
    d = torch.randn(1, 2, 11, 13, dtype=torch.float64)
    about = blur(torch.nn.functional.pad(d, (4, 4, 4, 4), mode="replicate"))
    x = Tikhonov(blur, blur, 0.1)(d)
    assert x.shape == about.shape == (1, 2, 15, 17)
    torch.testing.assert_close(blur.adjoint(blur(x) - d), 0.1 * (about - x))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 200), (3, 7, 60), (3, 40, 40)])
@pytest.mark.parametrize("padding_mode", ["valid", "zeros", "replicate", "reflect", "circular"])
def test_a_flat_photograph_of_any_size_stays_flat(shape, padding_mode):
    d, light = torch.full(shape, -0.9), "linear"
    if padding_mode == "zeros":
        d, light = GaussianBlur(19, 3.0)(d), "encoded"
    x = restored(d, "tikhonov", kernel_size=19, sigma=3.0, padding_mode=padding_mode, light=light)
    torch.testing.assert_close(x, torch.full(shape, -0.9), rtol=0, atol=1e-4)


def test_an_image_is_extended_by_what_lies_beyond_its_edge():
    row = torch.tensor([[[1.0, 2.0, 3.0]]])
    for mode, expected in (
        ("replicate", [1, 1, 1, 2, 3, 3, 3]),
        ("reflect", [3, 2, 1, 2, 3, 2, 1]),
        ("circular", [2, 3, 1, 2, 3, 1, 2]),
    ):
        assert extend(row, 2, mode)[0, 0].tolist() == expected


@pytest.mark.parametrize("checkpoint", [None, "tikhonov"])
def test_tiles_of_a_circular_image_do_not_wrap_onto_themselves(checkpoint):
    sharp = scene(side=160)
    d = GaussianBlur(5, 1.0, "circular")(sharp) + 0.01 * torch.randn(sharp.shape)
    given = {"padding_mode": "circular", "sigma": 1.0, "kernel_size": 5}
    whole, tiled = (restored(d, checkpoint, tile, **given) for tile in (512, 160))
    assert (whole - tiled).abs().max() < 0.02
    rolled = restored(d.roll((48, 64), (1, 2)), checkpoint, **given).roll((-48, -64), (1, 2))
    assert (whole - rolled).abs().max() < 0.02
    assert improvement(border(whole), border(d), border(sharp)) > 1


def test_the_border_of_a_piece_does_not_set_its_damping():
    blur, sharp = GaussianBlur(19, 3.0), scene(side=384)
    d, truth = camera(sharp, 3.0, cut=48)
    whole, piece = (PowerSpectrum(blur, image).damping(0.01) for image in (next(camera(sharp, 3.0, cut=1)), d))
    assert 0.5 < piece / whole < 2 and piece > 1e-3
    x = restored(d, kernel_size=19, sigma=3.0, padding_mode="zeros")
    assert improvement(*(image[:, 30:-30, 30:-30] for image in (x, d, truth))) > 0.5


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_a_sharp_photograph_contradicts_a_blur_and_a_blurred_one_does_not(name):
    sharp = scene(name, 40, 80, 256)
    for sigma, size in ((1.0, 5), (3.0, 19)):
        spectrum = PowerSpectrum(GaussianBlur(size, sigma), sharp)
        noise, contradicted = spectrum.plausible_noise(0.01)
        assert contradicted and noise > 0.02 and spectrum.damping(noise) > 0.01
    for sigma in (0.5, 1.0, 2.0, 3.0):
        for noise in (0.005, 0.01, 0.05):
            d, _ = camera(sharp, sigma, noise)
            for size in (5, 2 * math.ceil(3 * sigma) + 1):
                found, contradicted = PowerSpectrum(GaussianBlur(size, sigma), d).plausible_noise(noise)
                assert not contradicted and noise <= found < 1.4 * noise


def test_noise_that_is_given_too_low_is_found():
    d, sharp = camera(scene(), 1.0, 0.05)
    said = []
    x = restored(d, said=said, sigma=1.0, noise=0.01)
    assert "photograph.png is sharper or noisier than a Gaussian" in said[-1] and "for noise of 0.05" in said[-1]
    assert improvement(x, d, sharp) > 0
    said = []
    rounded, sharp = camera(scene(), 1.0, 0.0)
    assert improvement(restored(rounded, "gaussian5-sigma1", said=said), rounded, sharp) > 1 and not said


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 200, 130), (1, 5, 400)])
def test_the_power_of_white_noise_is_its_variance(shape):
    d = 3 + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    blur = GaussianBlur(13, 2.0)
    assert float(PowerSpectrum(blur, d).power.mean()) == pytest.approx(0.01, rel=0.15)


def test_the_discrepancy_principle_leaves_the_noise():
    blur, noise = GaussianBlur(5, 1.0, "reflect"), 0.05
    x = torch.tanh(GaussianBlur(15, 3.0, "circular")(8 * torch.randn(3, 256, 256, dtype=torch.float64)))
    d = blur(x) + noise * torch.randn_like(x)
    damping = PowerSpectrum(blur, d).damping(noise)
    residual = (blur(blur.solve(blur.adjoint(d), damping)) - d)[:, 8:-8, 8:-8]
    assert float(residual.square().mean().sqrt()) == pytest.approx(noise, rel=0.03)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"noise is {wrong}; it takes a positive number"):
            PowerSpectrum(blur, d).damping(wrong)


BLURS = [
    {"sigma": 1.5},
    {"sigma": (0.8, 1.6)},
    {"motion": (7, 30)},
    {"defocus": 2.5},
    {"psf": point_spread.gaussian((1.0, 2.0), angle=30)},
]


@pytest.mark.parametrize("given", BLURS, ids=lambda given: next(iter(given)))
def test_every_kind_of_blur_is_undone_up_to_the_border(given):
    sharp = scene(side=160)
    blur = BlurChoice(**given).operator("valid")
    y, x = blur.margin
    d, truth = blur(sharp[None])[0], sharp[:, y : 160 - y, x : 160 - x]
    d = ((d + 1) * 127.5).round() / 127.5 - 1
    restored = jfbfast.restore(d, noise=0.004, light="encoded", checkpoint="tikhonov", **given)
    assert improvement(restored.image, d, truth) > 2.5
    assert improvement(*map(border, (restored.image, d, truth))) > 1.5
    assert restored.report.residual < 0.01 and restored.report.method.startswith("Tikhonov")


def test_the_gain_of_a_blur_is_that_of_its_transfer_function():
    psf = point_spread.motion(7, 30)
    point = torch.zeros(32, 32, dtype=torch.float64)
    point[16, 16] = 1
    expected = torch.fft.fft2(Blur(psf, "circular")(point)).abs().square()
    for mode in ("valid", "zeros", "reflect", "circular"):
        torch.testing.assert_close(gain(Blur(psf, mode), 32, 32), expected)


def test_tiles_of_a_photograph_are_measurements_of_their_own():
    d, sharp = camera(scene(side=400), 1.5)
    whole, tiled = (restored(d, tile=tile, overlap=None, sigma=1.5) for tile in (512, 128))
    assert (whole - tiled).abs().max() < 0.02
    assert improvement(tiled, d, sharp) > 2


@pytest.mark.parametrize("light", ["linear", "encoded"])
def test_a_photograph_gains_most_by_the_light_that_it_was_blurred_in(light):
    d, sharp = camera(scene(), 1.0, 0.0, light=light)
    found = {told: improvement(restored(d, light=told, sigma=1.0), d, sharp) for told in ("linear", "encoded")}
    assert found[light] == max(found.values()) > min(found.values()) + 1


@pytest.mark.parametrize("share", [0.8, 1.2])
@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_a_wrong_sigma_does_no_harm(name, share):
    d, sharp = camera(scene(name, 40, 80), 1.0, 0.0)
    assert improvement(restored(d, sigma=share), d, sharp) > 1


def test_a_tolerance_counts_as_noise():
    d, _ = camera(scene(), 1.5, 0.0)
    none, some, much = (
        jfbfast.restore(d, sigma=1.5, noise=0.003, tolerance=tolerance, checkpoint="tikhonov").report.noise
        for tolerance in (0, 0.2, 0.8)
    )
    assert none == 0.003 < some < 0.5 * much
    with pytest.raises(ValueError, match="tolerance is -1; it takes a finite number of at least 0"):
        jfbfast.restore(d, sigma=1.5, tolerance=-1)


@pytest.mark.parametrize(("checkpoint", "least"), [("tikhonov", 1.0), (None, 0.2)])
def test_clipped_pixels_are_not_trusted(monkeypatch, checkpoint, least):
    bright = (3 * (scene(side=160) + 1) - 1).clamp(max=4)  # overexposed: light of up to 2.5 times white
    d, _ = camera(bright, 1.0, 0.0, cut=16)
    truth = bright[:, 16:-16, 16:-16].clamp(-1, 1)
    untrusted = restored(d, checkpoint, sigma=1.0, noise=0.004)
    monkeypatch.setattr("jfbfast.imaging.restoration.CLIPPED_SHARE", 2.0)
    trusted = restored(d, checkpoint, sigma=1.0, noise=0.004)
    assert improvement(untrusted, d, truth) > max(least, improvement(trusted, d, truth) + 0.1)


def test_blocks_with_clipped_values_do_not_count():
    blur, sharp = GaussianBlur(7, 1.0, "valid"), scene("coffee", 40, 80, 288)
    d, _ = camera(sharp, 1.0, 0.005, cut=16)
    d = 0.9 * d  # no value is clipped
    torch.testing.assert_close(PowerSpectrum(blur, d, clipped(d)).power, PowerSpectrum(blur, d).power)
    expected = PowerSpectrum(blur, d[:, :192]).power
    d[:, 192:] = (4 * d[:, 192:]).clamp(-1, 1)
    torch.testing.assert_close(PowerSpectrum(blur, d, clipped(d)).power, expected)
    assert not PowerSpectrum(blur, d, clipped(d)).plausible_noise(0.005)[1]
    assert PowerSpectrum(blur, d).plausible_noise(0.005)[1]


class _AnyBlur(DEGrad):
    """Stands for a network that is told its blur: it restores by Tikhonov's method, and notes what it is told."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.told, self.solution, self.solver = [], None, Anderson()

    def set_measurement(self, blur, noise):
        self.blur = blur
        self.told.append((blur.padding_mode, round(noise, 4)))

    def forward(self, d, x0=None):
        x = Tikhonov(self.blur, self.blur, 0.01)(d)
        assert x0 is None or x0.shape == x.shape
        solved = torch.zeros(len(d))
        self.solution = SimpleNamespace(iterations=torch.tensor([3] * len(d)), residual=solved, status=solved)
        return x


def test_a_network_for_any_blur_is_told_blur_and_noise(monkeypatch):
    model = _AnyBlur()
    config = ModelConfig(form="universal")
    monkeypatch.setattr("jfbfast.imaging.networks.load_model", lambda name: (model, config))
    d, _ = camera(scene(side=128), 1.0, 0.0, light="linear")
    found = jfbfast.restore(d, motion=(3, 0), checkpoint="any", noise=0.02, tolerance=0)
    assert model.told == [("valid", 0.02)] and found.report.evaluations == 9  # three turns in linear light
    grey = jfbfast.restore(d[:1], sigma=1.0, checkpoint="any", light="encoded", noise=0.02)
    assert grey.image.shape == d[:1].shape and grey.report.method == "any"
    with pytest.raises(ValueError, match="the blur is not given; any takes one of sigma, psf, motion, defocus"):
        jfbfast.restore(d, checkpoint="any")


def test_an_impossible_restoration_is_refused_in_words(tmp_path):
    d = torch.zeros(3, 20, 20)
    for given, message in (
        ({}, "the blur is given by nothing; it takes one of sigma, psf, motion, defocus"),
        ({"sigma": 1.0, "defocus": 2.0}, "the blur is given by sigma and defocus"),
        ({"defocus": 2.0, "kernel_size": 5}, "kernel_size is 5; it is for a Gaussian"),
        ({"motion": 3.0}, "motion is 3.0; it takes a length in pixels and an angle"),
        ({"sigma": 1.0, "light": "red"}, "light is 'red'; it takes one of 'linear', 'encoded'"),
        ({"sigma": 1.0, "padding_mode": "zeros"}, "light is 'linear'; padding_mode='zeros' takes 'encoded'"),
        ({"sigma": 1.0, "padding_mode": "none"}, "padding_mode is 'none'; it takes one of"),
        ({"defocus": 2.0, "checkpoint": "gaussian5-sigma1"}, "gaussian5-sigma1 is for Gaussian blurs with one σ"),
        ({"sigma": 1.0, "noise": -1}, "noise is -1; it takes a finite number of at least 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            jfbfast.restore(d, **given)
    with pytest.raises(ValueError, match=re.escape("photo has shape (1, 3, 20, 20); it takes one image")):
        jfbfast.restore(d[None], sigma=1.0)
    with pytest.raises(TypeError, match="photo is a ndarray; it takes a tensor"):
        jfbfast.restore(d.numpy(), sigma=1.0)
    with pytest.warns(UserWarning, match="sharper or noisier than a Gaussian"):
        jfbfast.restore(scene(side=96), sigma=2.0, tolerance=0, noise=0.01)


@pytest.mark.parametrize("name", ["gaussian5-sigma1", "gaussian5-sigma5"])
def test_a_shipped_model_restores_every_size_equally_well(name):
    model, image = DEGrad.from_pretrained(name), torch.from_numpy(photographs.astronaut())[40:200:2, 150:310:2]
    image = image.permute(2, 0, 1)[None].float() / 127.5 - 1
    found = {}
    for size in (64, 60, 57):
        x = image[..., :size, :size].contiguous()
        d = measure(x, model.blur, 0.01, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        with torch.no_grad():
            found[size] = float(psnr(model(d), x)) - float(psnr(d, x))
    assert min(found.values()) > found[64] - 0.6 > 4, found
