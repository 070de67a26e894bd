"""Tiles cover an image of any size, and leave no seam."""

from itertools import pairwise

import pytest
import torch

from jfbfast import GaussianBlur, UNet, tikhonov
from jfbfast.imaging.tiling import ALIGNMENT, border_reach, restore_tiled, seamless_overlap, tiles, tiling_error


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


def test_tiles_are_no_longer_than_they_need_be():
    spans = [rows for rows, columns, _ in tiles(1000, 60, 768, 88) if columns.start == 0]
    assert [(rows.start, rows.stop) for rows in spans] == [(0, 560), (432, 1000)]
    for length, tile, overlap in ((4096, 768, 147), (333, 47, 4), (769, 768, 383), (1001, 320, 33)):
        spans = [rows for rows, _, _ in tiles(length, 1, tile, overlap)]
        assert all(a.stop - b.start >= overlap for a, b in pairwise(spans))
        assert max(rows.stop - rows.start for rows in spans) < tile + ALIGNMENT


def test_what_differs_on_the_far_side_of_a_cut_is_no_reach():
    def restore(x):  # in the bottom right corner, an error that depends on the shape
        out = x.clone()
        out[..., -20:, -20:] += 1e-3 * x.shape[-1] * x.shape[-2]
        return out

    d = torch.rand(3, 200, 180)
    assert border_reach(restore, d, tile=160) == 0
    assert border_reach(lambda x: restore(x.flip(-1, -2)).flip(-1, -2), d, tile=160) == 20


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
        tiled = restore_tiled(restore, d, tile=128, overlap=overlap)
        assert tiling_error(restore, d, tiled) < 1 / 255 < 10 * tiling_error(restore, d, tiled)
        assert tiling_error(restore, d, restore_tiled(restore, d, tile=128, overlap=8)) > 10 / 255
        assert (restore(d[None]) - d).abs().max() > 0.1


def test_a_useless_overlap_is_named():
    with pytest.raises(ValueError, match="overlap is 40"):
        restore_tiled(lambda x: x, torch.zeros(3, 99, 99), tile=64, overlap=40)
