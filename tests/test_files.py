"""Photographs and checkpoints as files; restoration in tiles."""

import os

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from jfbfast import GaussianBlur, tikhonov
from jfbfast.checkpoint import CheckpointError, ModelConfig, load_checkpoint, save_checkpoint
from jfbfast.data import ImageError, Photograph, RandomCrops, image_files, read_photograph, write_photograph
from jfbfast.restoration import restore_tiled, tiles

SMALL = ModelConfig(features=4, depth=3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize(
    ("dtype", "suffix"), [("uint8", ".png"), ("uint16", ".png"), ("uint16", ".tiff"), ("float32", ".tiff")]
)
def test_photographs_survive_a_round_trip(tmp_path, channels, alpha, dtype, suffix):
    dtype = np.dtype(dtype)
    scale = np.iinfo(dtype).max if dtype.kind == "u" else 1
    pixels = torch.from_numpy((np.random.default_rng(0).integers(0, 256, (channels, 7, 5)) / 255).astype(np.float32))
    channel = pixels[:1].flip(1).clone() if alpha else None
    path = tmp_path / f"photograph{suffix}"
    write_photograph(path, Photograph(pixels, channel, dtype))
    found = read_photograph(path)
    expected = pixels if not (alpha and channels == 1) else pixels.expand(len(found.pixels), -1, -1)
    assert found.dtype == dtype
    torch.testing.assert_close(found.pixels, expected, rtol=0, atol=0.5 / scale if scale > 1 else 0)
    assert (found.alpha is not None) == alpha
    if alpha:
        torch.testing.assert_close(found.alpha, channel, rtol=0, atol=0.5 / scale if scale > 1 else 0)


def test_files_are_read_as_others_wrote_them(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    torch.testing.assert_close(
        read_photograph(tmp_path / "rgb.png").pixels, torch.from_numpy(rgb / np.float32(255)).permute(2, 0, 1)
    )

    grey = Image.fromarray(rgb[:, :, 0])
    grey.putalpha(Image.fromarray(rgb[:, :, 1]))
    grey.save(tmp_path / "la.png")
    found = read_photograph(tmp_path / "la.png")
    assert found.pixels.shape == (1, 6, 4) and found.alpha is not None

    deep = np.random.default_rng(0).integers(0, 65536, (6, 4, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep[:, :, ::-1])
    assert (read_photograph(tmp_path / "deep.png").pixels.permute(1, 2, 0).numpy() * 65535).round().astype(
        np.uint16
    ).tolist() == deep.tolist()

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(deep[:, :, 0]).save(tmp_path / "turned.png", exif=exif)
    turned = read_photograph(tmp_path / "turned.png")
    assert turned.dtype == np.uint16
    assert (turned.pixels[0].numpy() * 65535).round().tolist() == np.rot90(deep[:, :, 0], -1).tolist()
    Image.fromarray(rgb).save(tmp_path / "turned.jpg", exif=exif)
    assert read_photograph(tmp_path / "turned.jpg").pixels.shape == (3, 4, 6)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ImageError, match=r"text\.png"):
        read_photograph(tmp_path / "text.png")
    with pytest.raises(ImageError, match=r"none\.png"):
        read_photograph(tmp_path / "none.png")
    cv2.imwrite(str(tmp_path / "nan.tiff"), np.full((4, 4, 3), np.nan, np.float32))
    with pytest.raises(ImageError, match="48 of its values are not finite"):
        read_photograph(tmp_path / "nan.tiff")
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8) * 1000).save(tmp_path / "int32.tiff")
    with pytest.raises(ImageError, match="neither 8-bit"):
        read_photograph(tmp_path / "int32.tiff")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ImageError, match=r"small\.png: too small"):
        RandomCrops([tmp_path / "small.png"], 64)[0]
    deep = Photograph(torch.zeros(3, 4, 4), None, np.dtype("uint16"))
    with pytest.raises(ImageError, match=r"\.jpg cannot hold uint16"):
        write_photograph(tmp_path / "out.jpg", deep)
    with pytest.raises(ImageError, match="alpha"):
        write_photograph(tmp_path / "out.jpg", Photograph(torch.zeros(3, 4, 4), torch.ones(1, 4, 4), np.dtype("uint8")))
    with pytest.raises(ImageError, match="no image files"):
        image_files(tmp_path / "nowhere")


def test_crops_cover_small_and_large_photographs():
    crops = RandomCrops([torch.rand(3, 40, 50), torch.rand(3, 20, 90)], 32, length=6)
    assert len(crops) == 6
    for crop in crops:
        assert crop.shape == (3, 32, 32) and -1 <= float(crop.min()) < 0 < float(crop.max()) <= 1
    whole = RandomCrops([torch.rand(3, 40, 50)], 24, resize=24)[0]
    assert whole.shape == (3, 24, 24)


def test_a_checkpoint_rebuilds_the_model(tmp_path):
    model = SMALL.model().eval()
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, SMALL)
    found, config = load_checkpoint(path)
    d = torch.randn(1, 3, 9, 9)
    assert config == SMALL
    torch.testing.assert_close(found(d), model(d), rtol=0, atol=0)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_foreign_or_broken_checkpoint_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_checkpoint(path, SMALL.model(), SMALL)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_checkpoint(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of jfbfast"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize(("shape", "tile", "overlap"), [((70, 130), 64, 16), ((64, 64), 64, 16), ((40, 65), 48, 20)])
def test_tiles_cover_the_image_and_blend_to_it(shape, tile, overlap):
    covered = torch.zeros(shape)
    for rows, columns, weights in tiles(*shape, tile, overlap):
        assert weights.shape == covered[rows, columns].shape and (weights > 0).all()
        covered[rows, columns] += 1
    assert (covered >= 1).all()
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


def test_a_useless_overlap_is_named():
    with pytest.raises(ValueError, match="overlap is 40"):
        restore_tiled(lambda x: x, torch.zeros(3, 99, 99), tile=64, overlap=40)
