"""The data of a run: samples by seed and index, crops, photographs, their split."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.small_runs import write_photographs
from jfbfast.imaging.datasets import Images, Photographs, RandomCrops, split
from jfbfast.imaging.photographs import ImageError


@pytest.fixture
def folder(tmp_path):
    return write_photographs(tmp_path / "photographs", 5)


def test_a_sample_depends_on_seed_and_index_alone():
    photographs = [torch.randint(0, 256, (3, 20 + i, 30), dtype=torch.uint8) for i in range(5)]
    crops = RandomCrops(photographs, 16, length=20, seed=3)
    forward = [crops[i] for i in range(20)]
    backward = [RandomCrops(photographs, 16, length=20, seed=3)[i] for i in reversed(range(20))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    assert not torch.equal(forward[0].noise, RandomCrops(photographs, 16, length=20, seed=4)[0].noise)
    noise = torch.stack([sample.noise for sample in forward])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    orders = [[crops._photograph(i) for i in range(5 * e, 5 * e + 5)] for e in range(4)]
    assert all(sorted(order) == list(range(5)) for order in orders) and len(set(map(tuple, orders))) > 1


def test_crops_are_parts_of_the_photographs():
    photograph = torch.arange(3 * 12 * 9).view(3, 12, 9).remainder(256).byte()
    parts = {
        tuple((flip(photograph[:, y : y + 8, x : x + 8]).float() / 127.5 - 1).flatten().tolist())
        for y in range(5)
        for x in range(2)
        for flip in (lambda p: p, lambda p: p.flip(-1))
    }
    found = {tuple(RandomCrops([photograph], 8, 400)[i].x.flatten().tolist()) for i in range(400)}
    assert found == parts
    assert len({tuple(s.x.flatten().tolist()) for s in RandomCrops([photograph], 8, 200, flips=False)}) == 10


def test_photographs_in_memory_equal_those_on_disk(folder):
    files = sorted(folder.iterdir())
    for options in ({}, {"resize": 16}, {"resize": 16, "squash": True}):
        cached, streamed = Photographs(files, **options), Photographs(files, **options, cache=100)
        assert cached.cached and not streamed.cached
        assert all(torch.equal(a, b) for a, b in zip(cached, streamed, strict=True))
    squashed = Photographs(files, 16, squash=True)[0]
    with Image.open(files[0]) as image:
        pillow = torch.from_numpy(np.array(image.resize((16, 16), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert (squashed.int() - pillow.int()).abs().max() <= 1  # the paper's transforms.Resize((16, 16))
    assert torch.equal(Images(Photographs(files))[0].x, Photographs(files)[0].float() / 127.5 - 1)
    (folder / "0.png").write_text("not an image")
    with pytest.raises(ImageError, match=r"0\.png"):
        Photographs(files)


def test_float32_photographs_are_read(tmp_path):
    deep = np.random.default_rng(0).random((9, 7, 3), np.float32)
    cv2.imwrite(str(tmp_path / "deep.tiff"), deep)
    photographs = Photographs([tmp_path / "deep.tiff"])
    assert photographs.sizes == [(9, 7)] and photographs[0].shape == (3, 9, 7)


@pytest.mark.parametrize(
    ("train_part", "validation", "sizes"),
    [(None, 0.1, (9, 1, 0)), (7, 2, (7, 2, 1)), (0.5, 0.2, (5, 2, 3)), (0, 3, (0, 3, 7))],
)
def test_split_by_name(train_part, validation, sizes):
    parts = split(range(10), train_part, validation)
    assert tuple(map(len, parts)) == sizes
    assert [i for part in parts for i in part] == list(range(10))


@pytest.mark.parametrize(("count", "train_part", "validation"), [(15, 0.9, 0.1), (3, 0.5, 0.5), (5, 0.7, 0.3)])
def test_shares_that_add_up_to_one_split_any_number_of_files(count, train_part, validation):
    kept, held_out, rest = split(range(count), train_part, validation)
    assert (len(kept) + len(held_out), len(held_out), rest) == (count, round(validation * count), [])


@pytest.mark.parametrize(
    ("train_part", "validation"), [(0.9, 0.2), (8, 3), (None, 11), (1.5, 0), (-1, 0), (float("nan"), 0)]
)
def test_an_impossible_split_is_refused(train_part, validation):
    with pytest.raises(ValueError, match=r"train|validation"):
        split(range(10), train_part, validation)


def test_crops_cover_small_and_large_photographs():
    crops = RandomCrops([torch.rand(3, 40, 50), torch.rand(3, 20, 90)], 32, length=6)
    assert len(crops) == 6
    for crop, noise, level in crops:
        assert crop.shape == noise.shape == (3, 32, 32) and -1 <= float(crop.min()) < 0 < float(crop.max()) <= 1
        assert 0 <= level < 1
