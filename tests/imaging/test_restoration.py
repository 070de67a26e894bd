"""How `jfbfast restore` treats a photograph: its surroundings, its brightness, its noise, and λ."""

import math

import pytest
import torch
from skimage import data as photographs

from jfbfast import DEGrad, GaussianBlur, UNet, tikhonov
from jfbfast.imaging.plausibility import PowerSpectrum
from jfbfast.imaging.quality import measure, psnr
from jfbfast.imaging.restoration import (
    ALIGNMENT,
    border_reach,
    choose_restorer,
    extend,
    restore_tiled,
    seamless_overlap,
    tikhonov_restorer,
    tiles,
    tiling_error,
)
from jfbfast.models.pretrained import pretrained_names


def scene(name="astronaut", top=0, left=0, side=320):
    """Part of a photograph on [−1, 1]."""
    whole = torch.from_numpy(getattr(photographs, name)()).permute(2, 0, 1).float() / 127.5 - 1
    return whole[:, top : top + side, left : left + side]


def camera(sharp, sigma, noise=0.01, cut=32, seed=0):
    """A piece of the blurred scene in 8 bits, and the same piece of the sharp one."""
    blur = GaussianBlur(2 * math.ceil(4 * sigma) + 1, sigma, "reflect")
    white = torch.randn(sharp.shape, generator=torch.Generator().manual_seed(seed))
    d = ((blur(sharp) + noise * white + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    return (each[:, cut:-cut, cut:-cut] for each in (d, sharp))


def restored(d, checkpoint=None, tile=512, overlap=64, said=None, **given):
    setting = {"kernel_size": None, "sigma": None, "noise": None, "padding_mode": "replicate", **given}
    prepare = choose_restorer(checkpoint, setting, *[(said if said is not None else []).append] * 2)
    measured, margin, restore, _ = prepare("photograph.png", d)
    out = restore_tiled(restore, measured, tile=tile, overlap=overlap)
    return out[:, margin : margin + d.shape[1], margin : margin + d.shape[2]].clamp(-1, 1)


def gain(x, d, sharp):
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
    size = {} if sigma == 1 else {"kernel_size": 19}
    x = restored(d, sigma=sigma, **size)
    assert gain(x, d, sharp) > middle
    assert gain(border(x), border(d), border(sharp)) > edge


@pytest.mark.parametrize("name", pretrained_names())
@pytest.mark.parametrize("colour", [(-1, -1, -1), (1, 1, 1), (0.5, 0.5, 0.5), (1, 1, -1)])
def test_a_network_leaves_a_flat_photograph_flat(name, colour):
    d = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, 40, 50).contiguous()
    given = {"sigma": 1.0, "noise": 0.01} if name == "gaussian5" else {}
    assert (restored(d, name, **given) - d).abs().max() < 2 / 127.5


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_tikhonov_commutes_with_an_offset_of_brightness(padding_mode):
    blur = GaussianBlur(5, 1.0, padding_mode)
    d, one = torch.randn(3, 20, 24, dtype=torch.float64), torch.ones(1, 20, 24, dtype=torch.float64)
    offset = torch.tensor([0.5, -0.3, 2.0], dtype=torch.float64)[:, None, None]
    plain, shifted = (tikhonov_restorer(blur, image, 0.1)(image[None]) for image in (d, d + offset * blur(one)))
    torch.testing.assert_close(shifted, plain + offset)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 200), (3, 7, 60), (3, 40, 40)])
@pytest.mark.parametrize("padding_mode", ["zeros", "replicate", "reflect", "circular"])
def test_a_flat_photograph_of_any_size_stays_flat(shape, padding_mode):
    d = torch.full(shape, -0.9)
    if padding_mode == "zeros":
        d = GaussianBlur(19, 3.0)(d)
    x = restored(d, "tikhonov", kernel_size=19, sigma=3.0, padding_mode=padding_mode)
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
    whole, tiled = (restored(d, checkpoint, tile, padding_mode="circular") for tile in (512, 160))
    assert (whole - tiled).abs().max() < 0.02
    rolled = restored(d.roll((48, 64), (1, 2)), checkpoint, padding_mode="circular").roll((-48, -64), (1, 2))
    assert (whole - rolled).abs().max() < 0.02
    assert gain(border(whole), border(d), border(sharp)) > 1


def test_the_border_of_a_piece_does_not_set_its_damping():
    blur, sharp = GaussianBlur(19, 3.0), scene(side=384)
    d, truth = camera(sharp, 3.0, cut=48)
    whole, piece = (PowerSpectrum(blur, image).damping(0.01) for image in (next(camera(sharp, 3.0, cut=1)), d))
    assert 0.5 < piece / whole < 2 and piece > 1e-3
    x = restored(d, kernel_size=19, sigma=3.0, padding_mode="zeros")
    assert gain(*(image[:, 30:-30, 30:-30] for image in (x, d, truth))) > 0.5


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
    assert "photograph.png is sharper or noisier than a blur" in said[-1] and "for noise of 0.049" in said[-1]
    assert gain(x, d, sharp) > 0
    said = []
    rounded, sharp = camera(scene(), 1.0, 0.0)
    assert gain(restored(rounded, "gaussian5", said=said, sigma=1.0, noise=0.0), rounded, sharp) > 1 and not said


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


@pytest.mark.parametrize(
    ("shape", "tile", "overlap"), [((70, 130), 64, 16), ((64, 64), 64, 16), ((40, 65), 48, 20), ((184, 333), 47, 4)]
)
def test_tiles_cover_the_image_and_blend_to_it(shape, tile, overlap):
    covered = torch.zeros(shape)
    for rows, columns, weights in tiles(*shape, tile, overlap):
        assert weights.shape == covered[rows, columns].shape and (weights > 0).all()
        covered[rows, columns] += 1
    assert (covered >= 1).all()
    assert all(
        rows.start % ALIGNMENT == columns.start % ALIGNMENT == 0 for rows, columns, _ in tiles(*shape, tile, overlap)
    )
    d = torch.randn(3, *shape)
    seen = []
    out = restore_tiled(lambda x: 2 * x, d, tile=tile, overlap=overlap, progress=lambda *p: seen.append(p))
    torch.testing.assert_close(out, 2 * d)
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_tiles_leave_no_seam():
    blur = GaussianBlur(5, 1.0, "reflect")
    x = torch.tanh(GaussianBlur(15, 3.0, "reflect")(8 * torch.randn(3, 200, 210)))
    d = blur(x) + 0.01 * torch.randn_like(x)
    whole = tikhonov(blur, d, 0.01)
    tiled = restore_tiled(lambda part: tikhonov(blur, part, 0.01), d, tile=96, overlap=40)
    assert (whole - tiled).abs().max() < 1e-3


def test_the_overlap_covers_what_the_network_sees():
    d = torch.rand(3, 200, 180)

    def mean(side):  # of a square: its values change exactly side // 2 pixels from a cut
        return lambda x: torch.nn.functional.avg_pool2d(x, side, 1, side // 2)

    for side in (5, 21):
        assert border_reach(mean(side), d, tile=160, tolerance=1e-6) == side // 2
        overlap = seamless_overlap(mean(side), d, tile=160)
        assert overlap >= 32 and 3 * overlap // 8 >= side // 2
        assert tiling_error(mean(side), d, restore_tiled(mean(side), d, tile=96, overlap=overlap)) < 1e-5
    assert tiling_error(mean(31), d, restore_tiled(mean(31), d, tile=96, overlap=8)) > 1e-2
    assert seamless_overlap(lambda x: 0 * x + x.shape[-1] + x.shape[-2], d, tile=96) == 47


def test_tiles_of_a_network_that_halves_the_resolution_leave_no_seam():
    torch.manual_seed(1)
    network = UNet(3, (4, 4, 4), (1, 1, 1)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 2

        def restore(x):
            return network(x)

        d = torch.rand(3, 250, 170)
        overlap = seamless_overlap(restore, d, tile=128)
        assert 32 < overlap < 63
        assert tiling_error(restore, d, restore_tiled(restore, d, tile=128, overlap=overlap)) < 1 / 255
        assert (restore(d[None]) - d).abs().max() > 0.1


def test_a_useless_overlap_is_named():
    with pytest.raises(ValueError, match="overlap is 40"):
        restore_tiled(lambda x: x, torch.zeros(3, 99, 99), tile=64, overlap=40)


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
