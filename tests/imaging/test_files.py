"""Photographs and checkpoints as files; restoration in tiles."""

import os

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from jfbfast import ConditionalDEGrad, DEGrad, GaussianBlur, UNet, tikhonov
from jfbfast.imaging.datasets import Photographs, RandomCrops
from jfbfast.imaging.photographs import ImageError, Photograph, image_files, read_photograph, write_photograph
from jfbfast.imaging.quality import measure, psnr
from jfbfast.imaging.restoration import ALIGNMENT, border_reach, restore_tiled, seamless_overlap, tiles, tiling_error
from jfbfast.models import pretrained
from jfbfast.models.checkpoint import CheckpointError, load_checkpoint, read_config, save_checkpoint
from jfbfast.models.config import FORMS, ModelConfig

DENOISER = {
    "kind": "DnCNN",
    "features": 4,
    "depth": 3,
    "norm": None,
    "spectral_norm": False,
    "bias": True,
    "residual": True,
}
SMALL = ModelConfig(denoiser=DENOISER)


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


def test_crops_cover_small_and_large_photographs():
    crops = RandomCrops([torch.rand(3, 40, 50), torch.rand(3, 20, 90)], 32, length=6)
    assert len(crops) == 6
    for crop, noise, level in crops:
        assert crop.shape == noise.shape == (3, 32, 32) and -1 <= float(crop.min()) < 0 < float(crop.max()) <= 1
        assert 0 <= level < 1


CONFIGS = {
    "paper": ModelConfig("paper", {"kind": "DnCNN", "features": 4, "depth": 4}, step_size=0.3, padding_mode="zeros"),
    "preconditioned": ModelConfig("preconditioned", DENOISER, averaging=0.8, solver={"kind": "Picard", "tol": 0.1}),
    "filtered": ModelConfig(
        "filtered",
        {"kind": "UNet", "features": [4, 8], "blocks": [1, 2]},
        kernel_size=7,
        solver={"kind": "Anderson", "tol": 0.1, "memory": 3},
    ),
    "feed-forward": ModelConfig("feed-forward", DENOISER, weight=0.01),
    "denoiser": ModelConfig("denoiser", DENOISER),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_rebuilds_the_network(tmp_path, form, half):
    config = CONFIGS[form]
    model = config.model().eval()
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, config, half=half)
    found, read = load_checkpoint(path)
    assert read == read_config(path) == config
    assert os.listdir(tmp_path) == ["model.safetensors"]
    if isinstance(model, DEGrad):
        assert (found.solver, found.averaging) == (model.solver, model.averaging)
    for name, value in found.state_dict().items():
        expected = model.state_dict()[name]
        rounded = expected.half().float() if half and expected.dim() > 1 else expected
        torch.testing.assert_close(value, rounded, rtol=0, atol=0)
    assert not found.training


def test_a_checkpoint_in_half_precision_is_half_as_large_or_refused(tmp_path):
    config = ModelConfig(denoiser={**DENOISER, "features": 32, "depth": 6})
    model = config.model()
    sizes = []
    for half in (False, True):
        save_checkpoint(tmp_path / "model", model, config, half=half)
        sizes.append((tmp_path / "model").stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]
    model.regularizer.denoiser.layers[0].weight.data[0, 0, 0, 0] = 1e5
    with pytest.raises(ValueError, match=r"layers\.0\.weight with values that are not finite in torch.float16"):
        save_checkpoint(tmp_path / "model", model, config, half=True)


def test_a_foreign_or_broken_checkpoint_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_checkpoint(path, SMALL.model(), SMALL)
    whole = path.read_bytes()
    for broken in (whole[:-100], b"", whole[:-10] + b"0123456789", b"x" * 1000):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole checkpoint"):
            load_checkpoint(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of jfbfast .*foreign"):
        load_checkpoint(path)
    save_file({"w": torch.zeros(2)}, path, {"format": "jfbfast.DEGrad/1", "config": "{}"})
    with pytest.raises(CheckpointError, match=r"not a checkpoint of jfbfast .*its format is jfbfast\.DEGrad/1"):
        load_checkpoint(path)
    path.write_bytes(whole.replace(b"averaging", b"averagine"))
    with pytest.raises(CheckpointError, match="averagine"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "none")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped models: two for one setting, and two of other kinds."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "WEIGHTS", folder)
    for name, config in (
        ("a-paper", CONFIGS["paper"]),
        ("b-filtered", SMALL),
        ("c-denoiser", CONFIGS["denoiser"]),
        ("d-seven", CONFIGS["filtered"]),
    ):
        save_checkpoint(folder / f"{name}.safetensors", config.model(), config)
    return folder


def test_shipped_models_load_by_name(shipped):
    model = DEGrad.from_pretrained("b-filtered")
    expected = load_checkpoint(shipped / "b-filtered.safetensors")[0].state_dict()
    assert not model.training and model.state_dict().keys() == expected.keys()
    with pytest.raises(
        CheckpointError, match=r"nothing: there is no such file; the shipped models are a-paper, b-filtered, c-denoiser"
    ):
        DEGrad.from_pretrained("nothing")
    with pytest.raises(ValueError, match="a denoiser network; it takes a DE-GRAD"):
        DEGrad.from_pretrained("c-denoiser")
    with pytest.raises(ValueError, match="a filtered network; it takes a ConditionalDEGrad"):
        ConditionalDEGrad.from_pretrained("b-filtered")
    for file in (shipped / "d-seven.safetensors", str(shipped / "d-seven.safetensors")):
        assert DEGrad.from_pretrained(file).state_dict().keys() == load_checkpoint(file)[0].state_dict().keys()
    (shipped / "e-broken").write_text("broken")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        DEGrad.from_pretrained(shipped / "e-broken")


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ((5, 1.0, 0.01, "reflect"), "b-filtered"),
        ((5, 1.0, 0.01, "zeros"), "a-paper"),
        ((5, 1.0, 0.01, "circular"), None),
        ((7, 1.0, 0.01, "reflect"), "d-seven"),
        ((5, 2.0, 0.01, "reflect"), None),
        ((5, 1.0, 0.02, "reflect"), None),
    ],
)
def test_a_shipped_model_is_chosen_by_blur_and_noise(shipped, setting, name):
    assert pretrained.matching_name(*setting) == name


def test_every_shipped_model_has_a_card_and_loads():
    for name in pretrained.pretrained_names():
        assert pretrained.pretrained_file(name).with_suffix(".md").read_text(encoding="utf-8").strip()
        load_checkpoint(pretrained.pretrained_file(name))


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
