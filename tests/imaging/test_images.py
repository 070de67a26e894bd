"""Images of 1, 3 and more channels, of 8 and 16 bits and floats, from files and from datasets."""

import random

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from helpers.photographs import png, samples, tiff, to_floats
from jfbfast.imaging.datasets import Images, Photographs, RandomCrops
from jfbfast.imaging.images import DatasetImages, Preparation, read_image
from jfbfast.imaging.photographs import ImageError

BANDS = {"photometric": "minisblack", "extrasamples": ["unspecified"] * 3}


def array_bytes(path, array):
    np.save(path, array)
    return path.read_bytes()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_files_of_any_depth_keep_their_values(tmp_path, dtype, channels):
    array = samples(dtype, channels, size=(7, 9))
    exact = torch.from_numpy(to_floats(array)).permute(2, 0, 1)
    first = array.transpose(2, 0, 1)
    kept = {"extrasamples": ["unspecified"] * (channels - 1)} if channels > 3 else {}
    kept |= {"photometric": "minisblack"} if channels > 3 else {}
    files = {
        "pixels.tif": tiff(array, planarconfig="contig" if channels > 1 else None, **kept),
        "last.npy": array_bytes(tmp_path / "x.npy", array),
        "first.npy": array_bytes(tmp_path / "x.npy", first),
        "big-endian.npy": array_bytes(tmp_path / "x.npy", array.astype(array.dtype.newbyteorder(">"))),
    }
    if channels > 1:
        tifffile.imwrite(tmp_path / "planes.tif", first, planarconfig="separate", photometric="minisblack")
        files["planes.tif"] = (tmp_path / "planes.tif").read_bytes()
    if channels in (1, 3) and dtype != "float32":
        files["a.png"] = png(array)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found = read_image(tmp_path / name)
        assert found.dtype == (torch.uint8 if dtype == "uint8" else torch.float32), name
        values = found.double() / 255 if dtype == "uint8" else found.double()
        torch.testing.assert_close(values, exact, rtol=0, atol=2**-24)
        for cache in (1 << 20, 1):
            x = Images(Photographs([tmp_path / name], channels=channels, cache=cache))[0].x
            torch.testing.assert_close(x.double(), 2 * exact - 1, rtol=0, atol=2e-7)


def test_sixteen_bits_are_not_rounded_to_eight_by_a_resize(tmp_path):
    ramp = (
        np.linspace(30000, 30200, 40).round().astype(np.uint16)[:, None, None].repeat(40, 1)
    )  # less than one of 8 bits
    (tmp_path / "a.png").write_bytes(png(ramp))
    x = Photographs([tmp_path / "a.png"], channels=1, resize=20)[0]
    assert x.dtype == torch.float32 and len(x.unique()) > 15
    assert float((x[0, 1:-1, 0] * 65535 - torch.from_numpy(ramp[:, 0, 0].reshape(-1, 2).mean(1))[1:-1]).abs().max()) < 5


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_grey_and_colour_follow_the_channels_of_the_network(tmp_path, dtype):
    grey, colour = samples(dtype, 1), samples(dtype, 3)
    for name, array in (("a", grey), ("b", colour)):
        (tmp_path / f"{name}.png").write_bytes(png(array))
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for channels in (1, 3):
        x = [image.x for image in Images(Photographs(files, channels=channels))]
        assert [each.shape for each in x] == [(channels, 6, 9)] * 2
        exact = 2 * to_floats(grey)[:, :, 0] - 1
        assert all(np.abs(each - exact).max() < 3e-7 for each in x[0].numpy())
    luma = to_floats(colour) @ (0.299, 0.587, 0.114)
    assert np.abs(Images(Photographs(files, channels=1))[1].x[0].numpy() - (2 * luma - 1)).max() < 3e-7
    if dtype == "uint8":
        pillow = np.asarray(Image.fromarray(colour).convert("L"))
        assert np.abs(255 * Photographs(files, channels=1)[1][0].numpy() - pillow).max() <= 1


def test_other_numbers_of_channels_are_refused_by_name(tmp_path):
    (tmp_path / "bands.tif").write_bytes(tiff(samples("uint8", 4), planarconfig="contig", **BANDS))
    (tmp_path / "alpha.png").write_bytes(png(samples("uint8", 4)))
    for name, channels, message in (
        ("bands.tif", 3, r"bands\.tif: has 4 channels .* a network of channels=3 takes 3 or 1"),
        ("bands.tif", 1, r"bands\.tif: has 4 channels .* a network of channels=1 takes 1 or 3"),
        ("alpha.png", 4, r"alpha\.png: has 3 channels without alpha; a network of channels=4 takes 4$"),
    ):
        with pytest.raises(ImageError, match=message):
            Photographs([tmp_path / name], channels=channels)
    assert Photographs([tmp_path / "alpha.png"])[0].shape == (3, 6, 9)
    left_out = []
    both = [tmp_path / "bands.tif", tmp_path / "alpha.png"]
    assert len(Photographs(both, leave_out=left_out.append)) == 1 and "bands.tif" in str(left_out[0])


def test_arrays_that_are_no_image_are_refused_by_name(tmp_path):
    for array, message in (
        (np.zeros((3, 4), np.int32), "its samples are int32; it takes uint8, uint16 and floats"),
        (np.zeros((3, 4), bool), "its samples are bool"),
        (np.zeros((5, 7, 5), np.uint8), r"its shape is \(5, 7, 5\); it takes .* where C is the smaller side"),
        (np.zeros((0, 7)), r"its shape is \(0, 7\)"),
        (np.zeros((2, 3, 4, 5)), r"its shape is \(2, 3, 4, 5\)"),
        (np.full((4, 5), np.nan), "20 of its values are not finite"),
        (np.full((4, 5), 255.0), r"its floats go from 255 to 255; it takes a range of \[0, 1\]"),
        (np.array([[object()]]), "cannot be read"),
    ):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        with pytest.raises(ImageError, match=rf"a\.npy: {message}"):
            read_image(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((40, 50)))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    with pytest.raises(ImageError, match=r"a\.npy: cannot be read"):
        read_image(tmp_path / "a.npy")
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((5, 8, 9), np.uint8), photometric="minisblack")
    with pytest.raises(ImageError, match=r"pages\.tif: has 5 pages"):
        read_image(tmp_path / "pages.tif")


GREY = np.random.default_rng(0).random((7, 9, 1))


@pytest.mark.parametrize(
    ("item", "value_range"),
    [
        (torch.from_numpy(GREY[:, :, 0]), (0, 1)),
        (torch.from_numpy(2 * GREY - 1).permute(2, 0, 1), (-1, 1)),
        ((torch.from_numpy(255 * GREY).permute(2, 0, 1), 5), (0, 255)),
        (GREY, (0, 1)),
        ([GREY.transpose(2, 0, 1).astype(np.float16), "label"], (0, 1)),
        ((GREY * 65535).round().astype(np.uint16), (0, 1)),
        ((GREY * 65535).round().astype(np.uint16)[:, :, 0], (-1, 1)),  # whose range is its own
        (Image.fromarray((255 * GREY[:, :, 0]).round().astype(np.uint8)), (0, 1)),
        (Image.fromarray((65535 * GREY[:, :, 0]).round().astype(np.uint16)), (0, 1)),
        (Image.fromarray(GREY[:, :, 0].astype(np.float32)), (0, 1)),
        (Image.fromarray((255 * GREY[:, :, [0, 0]]).round().astype(np.uint8), "LA"), (0, 1)),
        (v2.functional.to_image((255 * GREY).round().astype(np.uint8)), (0, 1)),
    ],
)
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_items_of_datasets_of_every_kind_are_images(item, value_range):
    x = Images(DatasetImages([item], value_range, Preparation(1)))[0].x
    kind = getattr(item, "dtype", None) or (item[0].dtype if isinstance(item, list) else None)
    rounding = 1e-6 if kind in (torch.float64, np.float64, np.uint16) else 1.1 / 127.5 / 2
    assert type(x) is torch.Tensor and x.dtype == torch.float32 and x.shape == (1, 7, 9)
    rounding = max(rounding, 2e-5) if kind == np.uint16 else rounding
    assert np.abs(x[0].numpy() - (2 * GREY[:, :, 0] - 1)).max() <= rounding


def test_items_that_are_no_images_are_refused_by_number():
    for item, message in (
        ({"image": GREY}, "is of type <class 'dict'>; it takes a tensor"),
        (torch.zeros(2, 3, 4, 4), r"is a tensor of shape \(2, 3, 4, 4\); it takes a tensor \(C, H, W\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "its samples are torch.int64"),
        (-torch.ones(3, 4, 4), r"its floats go from -1 to -1; it takes a range of \[0, 1\]"),
        (torch.full((3, 4, 4), torch.inf), "48 of its values are not finite"),
        (torch.zeros(4, 5, 5), "has 4 channels"),
        (Image.new("P", (5, 5)), r"its mode is P; it takes .* convert\('RGB'\)"),
        (Image.new("CMYK", (5, 5)), "its mode is CMYK"),
    ):
        images = DatasetImages([torch.zeros(3, 4, 4), item])
        assert images[0].shape == (3, 4, 4)
        with pytest.raises(ImageError, match=f"image 1 of the dataset: {message}"):
            images[1]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([GREY])

    with pytest.raises(ValueError, match=r"dataset is a Stream; it takes a dataset with len\(\) and \[index\]"):
        DatasetImages(Stream())
    with pytest.raises(ValueError, match=r"value_range is \(1, 0\); it takes two numbers, the lesser first"):
        DatasetImages([GREY], (1, 0))


def test_random_transforms_depend_on_the_sample_alone():
    transform = v2.Compose([v2.PILToTensor(), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)])
    images = DatasetImages(FakeData(3, (3, 12, 14), transform=transform))
    crops = RandomCrops(images, 8, length=9, seed=5)
    forward = [crops[i].x for i in range(9)]
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    again = [crops[i].x for i in reversed(range(9))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, again, strict=True))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    order = [crops._photograph(i) for i in range(9)]
    same = [i for i in range(9) if order[i] == 0]
    seen = {tuple(images.read(0, 5, 3, i).flatten().tolist()) for i in same}
    assert len(same) == 3 and len(seen) == 3  # another transform in every epoch
    with pytest.raises(ImageError, match="too small for crops of 64"):
        RandomCrops(DatasetImages([GREY], prepare=Preparation(1, least=22, purpose="crops of 64 pixels")), 64)[0]
