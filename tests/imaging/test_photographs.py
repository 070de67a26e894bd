"""Photographs as files."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from jfbfast.imaging.datasets import Photographs, RandomCrops
from jfbfast.imaging.photographs import ImageError, Photograph, image_files, read_photograph, write_photograph


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


def test_files_of_other_encoders_are_read(tmp_path):
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


def test_the_content_of_a_file_decides_its_format(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    for suffix in ("jpg", "bmp", "webp"):
        Image.fromarray(rgb).save(tmp_path / f"a.{suffix}")
        assert read_photograph(tmp_path / f"a.{suffix}").dtype == np.uint8
    cv2.imwrite(str(tmp_path / "deep.png"), rgb.astype(np.uint16) * 257)
    (tmp_path / "deep.png").rename(tmp_path / "deep.jpg")
    assert read_photograph(tmp_path / "deep.jpg").dtype == np.uint16


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ImageError, match=r"text\.png"):
        read_photograph(tmp_path / "text.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.png: the file is empty"):
        read_photograph(tmp_path / "empty.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(tmp_path / "chunk.png")
    content = (tmp_path / "chunk.png").read_bytes()
    length = content.index(b"IDAT") - 4
    (tmp_path / "chunk.png").write_bytes(content[:length] + b"\0\0\0\x20" + content[length + 4 :])
    with pytest.raises(ImageError, match=r"chunk\.png: broken PNG file"):
        read_photograph(tmp_path / "chunk.png")
    with pytest.raises(ImageError, match=r"none\.png"):
        read_photograph(tmp_path / "none.png")
    cv2.imwrite(str(tmp_path / "nan.tiff"), np.full((4, 4, 3), np.nan, np.float32))
    with pytest.raises(ImageError, match="48 of its values are not finite"):
        read_photograph(tmp_path / "nan.tiff")
    cv2.imwrite(str(tmp_path / "counts.tiff"), np.linspace(0, 255, 48, dtype=np.float32).reshape(4, 4, 3))
    with pytest.raises(ImageError, match=r"its float32 samples go from 0 to 255; it takes \[0, 1\]"):
        read_photograph(tmp_path / "counts.tiff")
    page = Image.fromarray(np.zeros((4, 4), np.uint8))
    page.save(tmp_path / "pages.tiff", save_all=True, append_images=[page, page])
    with pytest.raises(ImageError, match=r"pages\.tiff: has 3 pages; it takes one image a file"):
        read_photograph(tmp_path / "pages.tiff")
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8) * 1000).save(tmp_path / "int32.tiff")
    with pytest.raises(ImageError, match="neither 8-bit"):
        read_photograph(tmp_path / "int32.tiff")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ImageError, match=r"small\.png: too small"):
        RandomCrops(Photographs([tmp_path / "small.png"]), 64)[0]
    deep = Photograph(torch.zeros(3, 4, 4), None, np.dtype("uint16"))
    with pytest.raises(ImageError, match=r"\.jpg cannot hold uint16"):
        write_photograph(tmp_path / "out.jpg", deep)
    with pytest.raises(ImageError, match="alpha"):
        write_photograph(tmp_path / "out.jpg", Photograph(torch.zeros(3, 4, 4), torch.ones(1, 4, 4), np.dtype("uint8")))
    with pytest.raises(ImageError, match="no image files"):
        image_files(tmp_path / "nowhere")
