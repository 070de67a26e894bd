"""The images of a point: their shape, their sum, and where they lie."""

import math

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch

import jfbfast
from jfbfast import point_spread

RANDOM = np.random.default_rng(0)
EVERY = {
    "gaussian": lambda: point_spread.gaussian(1.6),
    "rotated gaussian": lambda: point_spread.gaussian((0.7, 2.5), angle=30),
    "narrow gaussian": lambda: point_spread.gaussian(0.05),
    "defocus": lambda: point_spread.defocus(3.3),
    "small defocus": lambda: point_spread.defocus(0.2),
    "motion": lambda: point_spread.motion(9, 30),
    "horizontal motion": lambda: point_spread.motion(8, 180),
    "short motion": lambda: point_spread.motion(0.01, 77),
    "trajectory": lambda: point_spread.trajectory(25, RANDOM),
    "short trajectory": lambda: point_spread.trajectory(0.3, RANDOM),
}


def moments(psf):
    """The centroid from the middle and the covariance, in (y, x)."""
    points = torch.stack(torch.meshgrid(*(torch.arange(n).double() - n // 2 for n in psf.shape), indexing="ij"), -1)
    mean = (psf[..., None] * points).sum((0, 1))
    centred = points - mean
    return mean, torch.einsum("yx,yxi,yxj->ij", psf, centred, centred)


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_has_odd_sides_the_sum_one_and_its_centroid_in_the_middle(name):
    for _ in range(5):
        psf = EVERY[name]()
        assert psf.dtype == torch.float64 and psf.dim() == 2
        assert all(side % 2 for side in psf.shape)
        assert abs(psf.sum() - 1) < 1e-14 and psf.min() >= 0
        assert moments(psf)[0].abs().max() < 1e-6


def test_a_gaussian_is_that_of_gaussian_blur_and_turns_counter_clockwise():
    taps = [torch.tensor(t, dtype=torch.float64) for t in jfbfast.GaussianBlur((9, 13), (1.2, 2.0)).taps[:2]]
    torch.testing.assert_close(point_spread.gaussian((1.2, 2.0)), torch.outer(*taps), rtol=0, atol=1e-15)
    turned = point_spread.gaussian((1.2, 2.0), angle=90)
    torch.testing.assert_close(turned, torch.outer(*taps).T, rtol=0, atol=1e-15)
    assert point_spread.gaussian((1.0, 2.0), kernel_size=(5, 7)).shape == (5, 7)
    angle = math.radians(30)
    covariance = moments(point_spread.gaussian((1.0, 3.0), angle=30, kernel_size=41))[1]
    along = torch.tensor([-math.sin(angle), math.cos(angle)], dtype=torch.float64)  # up is a lower row
    torch.testing.assert_close(covariance @ along, 9 * along, rtol=1e-6, atol=1e-6)


def test_a_defocus_is_the_area_that_a_disc_covers():
    psf = point_spread.defocus(4.0)
    assert psf.shape == (9, 9)
    torch.testing.assert_close(psf[4, 4] * math.pi * 16, torch.tensor(1.0).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(moments(psf)[1].diagonal(), torch.full((2,), 4 + 1 / 12).double(), rtol=1e-2, atol=0)
    assert torch.equal(psf, psf.T) and torch.equal(psf, psf.flip(0))
    assert point_spread.defocus(0.5).shape == (1, 1)
    # a disc of radius 0.7 leaves the corners of a pixel and covers a cap of its neighbours: by the formula of a segment
    cap = 0.49 * math.acos(0.5 / 0.7) - 0.5 * math.sqrt(0.24)
    torch.testing.assert_close(
        point_spread.defocus(0.7)[0, 1] * math.pi * 0.49, torch.tensor(cap).double(), rtol=0, atol=1e-3
    )


def test_a_motion_is_a_line_of_its_length_and_angle():
    psf = point_spread.motion(9, 0)
    assert psf.shape == (1, 11)
    expected = torch.tensor([0.125, 0.875, *[1.0] * 7, 0.875, 0.125], dtype=torch.float64) / 9
    torch.testing.assert_close(psf[0], expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(point_spread.motion(9, 90), psf.T)
    psf = point_spread.motion(15, 30)
    variances, axes = torch.linalg.eigh(moments(psf)[1])
    assert abs(variances[1] - 15**2 / 12) < 0.4 and variances[0] < 0.4
    rise = -axes[0, 1] / axes[1, 1]  # up is a lower row
    assert abs(math.degrees(math.atan(rise)) - 30) < 1


def test_trajectories_differ_repeat_by_their_seed_and_stay_within_their_length():
    paths = [point_spread.trajectory(20, np.random.default_rng(seed)) for seed in range(20)]
    assert torch.equal(paths[3], point_spread.trajectory(20, np.random.default_rng(3)))
    assert len({tuple(path.shape) for path in paths}) > 5
    assert all(max(path.shape) <= 23 for path in paths)


def test_read_centres_a_file_and_cuts_it_to_odd_sides(tmp_path):
    psf = (point_spread.motion(9, 30) * 40000).round()
    picture = np.zeros((40, 30))
    picture[5:12, 17:26] = psf.numpy()
    expected = psf / psf.sum()
    np.save(tmp_path / "a.npy", picture)
    (tmp_path / "b.png").write_bytes(imagecodecs.png_encode(picture.astype(np.uint16)))
    (tmp_path / "c.tif").write_bytes(imagecodecs.tiff_encode(picture.astype(np.float32)))
    (tmp_path / "d.PNG").write_bytes(imagecodecs.png_encode(np.stack([picture.astype(np.uint16)] * 3, -1)))
    for name in ("a.npy", "b.png", "c.tif", "d.PNG"):
        torch.testing.assert_close(point_spread.read(tmp_path / name), expected, rtol=1e-6, atol=0)
    lopsided = np.zeros((6, 6))
    lopsided[2, 1], lopsided[2, 5] = 3, 1
    np.save(tmp_path / "e.npy", lopsided)
    assert torch.equal(point_spread.read(str(tmp_path / "e.npy")) * 4, torch.tensor([[0.0, 0, 3, 0, 0, 0, 1]]).double())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 3)), "has values from 0.0 to 0.0"),
        (np.full((3, 3), np.nan), "has values from nan"),
        (np.array([[1.0, -0.1]]), "has values from -0.1"),
        (np.ones(3), r"has the shape \(3,\)"),
        (np.ones((3, 3, 4)), r"has the shape \(3, 3, 4\)"),
        (np.ones((1, 1002)), r"has the shape \(1, 1002\)"),
        (np.array(["a"]), "cannot be read"),
    ],
)
def test_a_file_that_is_no_point_spread_function_is_refused(values, message, tmp_path):
    np.save(tmp_path / "psf.npy", values)
    with pytest.raises(ValueError, match=message):
        point_spread.read(tmp_path / "psf.npy")


def test_files_of_other_kinds_or_broken_ones_are_refused(tmp_path):
    (tmp_path / "psf.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"psf\.png cannot be read"):
        point_spread.read(tmp_path / "psf.png")
    wide = imagecodecs.png_encode(np.zeros((1, 1002), np.uint8))
    tall = imagecodecs.tiff_encode(np.zeros((1002, 1), np.float32))
    for name, content in (("wide.png", wide), ("tall.tif", tall)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"1002 .*pixels; it takes grey or RGB, with at most 1001 a side"):
            point_spread.read(tmp_path / name)
    tifffile.imwrite(tmp_path / "tile.tif", np.ones((3, 3), np.uint8), tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(tmp_path / "tile.tif", mode="r+b") as file:
        file.pages.first.tags["TileLength"].overwrite(60000)  # its decoder would make room for all of it
    with pytest.raises(ValueError, match=r"its tiles have 16 × 60000 pixels; it takes 2048 a side"):
        point_spread.read(tmp_path / "tile.tif")
    np.save(tmp_path / "spectrum.npy", np.ones((3, 3), complex))
    with pytest.raises(ValueError, match=r"it holds complex128; it takes real numbers"):
        point_spread.read(tmp_path / "spectrum.npy")
    with pytest.raises(ValueError, match=r"ends in '\.jpg'; it takes \.npy"):
        point_spread.read(tmp_path / "psf.jpg")
    with pytest.raises(FileNotFoundError):
        point_spread.read(tmp_path / "none.npy")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: point_spread.gaussian(0), "sigma is 0; it takes a positive number"),
        (lambda: point_spread.gaussian((1.0, float("nan"))), "sigma is nan"),
        (lambda: point_spread.gaussian((1.0, 2.0, 3.0)), "it takes a number or a .y, x. pair"),
        (lambda: point_spread.gaussian(1.0, float("inf")), "angle is inf"),
        (lambda: point_spread.gaussian(1.0, kernel_size=4), "kernel_size is 4"),
        (lambda: point_spread.gaussian(400.0), "sigma is 400.0; it takes what keeps a side within 1001"),
        (lambda: point_spread.defocus(-1), "radius is -1"),
        (lambda: point_spread.defocus(600), "radius is 600"),
        (lambda: point_spread.motion(0, 0), "length is 0"),
        (lambda: point_spread.motion(2000, 0), "length is 2000"),
        (lambda: point_spread.motion(9, "30"), "angle is '30'"),
        (lambda: point_spread.trajectory(-1.0, RANDOM), "length is -1.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_trajectory_takes_a_generator_and_no_seed():
    with pytest.raises(TypeError, match="generator is a int"):
        point_spread.trajectory(9, 0)
