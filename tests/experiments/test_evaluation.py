"""Scores against their definitions, and the baselines against other solvers of the same problems."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from skimage.metrics import structural_similarity
from torch import nn

from jfbfast import DEGrad, DnCNN, GaussianBlur, Status, tikhonov
from jfbfast.experiments.comparison import results_table, score_cells, tuning
from jfbfast.experiments.evaluation import (
    Method,
    Restoration,
    Scores,
    baseline_methods,
    evaluate,
    measurements,
    network_method,
    write_scores,
)
from jfbfast.imaging.datasets import Images
from jfbfast.imaging.quality import psnr, ssim
from jfbfast.models.feed_forward import FeedForward

BLUR = GaussianBlur(5, 1.0, "zeros")


def pictures(count, height=24, width=20):
    """Smooth pictures with edges, uint8."""
    noise = torch.randn(count, 3, height, width)
    smooth = GaussianBlur(15, 3.0, "reflect")(noise)
    edges = (smooth > 0).float() * 0.5 + 0.25 + smooth
    return list((edges.clamp(0, 1) * 255).round().byte())


def test_the_scores_are_their_definitions():
    x = torch.rand(4, 3, 72, 64, dtype=torch.float64) * 2 - 1
    y = x + 0.1 * torch.randn_like(x)
    error = (y - x).square().flatten(1).mean(1)
    torch.testing.assert_close(psnr(y, x), 10 * torch.log10(4 / error))
    options = {"data_range": 2.0, "gaussian_weights": True, "use_sample_covariance": False, "full": True}
    for i in range(4):
        each = [structural_similarity(a.numpy(), b.numpy(), **options)[1] for a, b in zip(y[i], x[i], strict=True)]
        assert abs(float(ssim(y, x)[i]) - np.mean(each)) < 4e-3  # it reflects the border with the edge repeated


def test_a_row_holds_both_conventions_and_the_interval():
    values = torch.tensor([30.0, 31.0, 35.0, 28.0])
    statuses = torch.tensor([Status.CONVERGED, Status.MAX_ITER, Status.DIVERGED, Status.MAX_ITER])
    row = Scores("m", values, values / 40, 1.0, {"damping": 0.01}, torch.tensor([3, 9, 5, 8]), statuses).summary()
    assert row["psnr"] == 31.0 and abs(row["psnr"] - row["psnr_paper"] - 6.0206) < 1e-4
    expected = 3.182446 * np.std([30, 31, 35, 28], ddof=1) / 2  # Student's t with 3 degrees of freedom
    assert abs(row["psnr_ci95"] - expected) < 1e-4
    assert (row["evaluations_median"], row["evaluations_max"]) == (6.5, 9)
    assert (row["not_converged"], row["diverged"]) == (2, 1) and row["parameter"] == "damping = 0.01"
    assert math.isnan(Scores("m", values[:1], values[:1], 1.0).summary()["psnr_ci95"])


def test_the_paper_reads_psnr_with_peak_one():
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    y = x + 0.1 * torch.randn_like(x)
    peak_one = 10 * torch.log10(1 / (y - x).square().mean())
    row = Scores("m", psnr(y, x), ssim(y, x), 0.0).summary()
    assert abs(row["psnr_paper"] - float(peak_one)) < 1e-4


def test_measurements_do_not_depend_on_the_batch():
    images = Images([*pictures(3), *pictures(2, 16, 30), *pictures(1)], seed=5)
    one, four = (list(measurements(images, BLUR, 0.1, size)) for size in (1, 4))
    assert [len(x) for x, _ in four] == [3, 2, 1]
    flat = [(x[i], d[i]) for x, d in four for i in range(len(x))]
    for (x, d), (batched_x, batched_d) in zip(one, flat, strict=True):
        torch.testing.assert_close(batched_x, x[0], rtol=0, atol=0)
        torch.testing.assert_close(batched_d, d[0], rtol=0, atol=1e-6)
    noise = torch.cat([(d - BLUR(x)).flatten() for x, d in one])
    assert abs(noise.std() - 0.1) < 0.003
    other = next(measurements(Images(images.photographs, seed=6), BLUR, 0.1, 1))[1]
    assert (other - one[0][1]).abs().max() > 0.1


def test_unknown_surroundings_are_scored_within_the_frame():
    blur = GaussianBlur(5, 1.0, "valid")
    images = Images(pictures(3), seed=5)
    (x, d), *_ = measurements(images, blur, 0.1, 1)
    assert x.shape == d.shape == (1, 3, 20, 16)
    torch.testing.assert_close(x[0], images.photographs[0][:, 2:-2, 2:-2].float() / 127.5 - 1)
    exact = torch.stack([image.float() / 127.5 - 1 for image in images.photographs])
    perfect = Method("perfect", lambda _: lambda d: Restoration(exact[: len(d)]))  # the margin included
    assert (evaluate(perfect, Images(images.photographs[:1]), [], blur, 0.1).psnr > 100).all()
    methods = baseline_methods(blur)
    found = {name: evaluate(methods[name], images, images, blur, 0.01).psnr.mean() for name in ("blurred", "tikhonov")}
    assert found["tikhonov"] > found["blurred"] + 0.5
    with pytest.raises(ValueError, match="padding_mode is 'valid'"):
        evaluate(methods["direct-inverse"], images, [], blur, 0.01)


def test_a_parameter_is_chosen_on_validation_alone():
    seen = []

    def restore(value):
        def shifted(d):
            seen.append((value, len(d)))
            return Restoration(d + (value - 0.3))

        return shifted

    images, validation = Images(pictures(3)), Images(pictures(2), seed=1)
    scores = evaluate(Method("m", restore, "shift", [0.0, 0.3, 0.7]), images, validation, BLUR, 0.01)
    assert scores.parameter == {"shift": 0.3}
    assert seen == [(0.0, 2), (0.3, 2), (0.7, 2), (0.3, 3)]
    with pytest.raises(ValueError, match="validation is empty"):
        evaluate(Method("m", restore, "shift", [0.0, 0.3]), images, Images([]), BLUR, 0.01)
    with pytest.raises(ValueError, match="images is empty"):
        evaluate(Method("m", restore), Images([]), validation, BLUR, 0.01)


def test_no_image_is_left_out_of_the_scores(tmp_path):
    """An image that a method loses makes its mean NaN, and is written as null."""

    def lose_the_second(d):
        images = d.clone()
        images[1] = torch.nan
        return Restoration(images, torch.ones(len(d)), torch.tensor([0, 2, 0]))

    scores = evaluate(Method("m", lambda _: lose_the_second), Images(pictures(3)), Images([]), BLUR, 0.01)
    row = scores.summary()
    assert math.isnan(row["psnr"]) and row["diverged"] == 1 and row["images"] == 3
    assert scores.psnr[[0, 2]].isfinite().all()
    write_scores(tmp_path / "a.json", [scores], {"seed": 0})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["seed"] == 0 and found["methods"][0]["per_image"]["psnr"][1] is None
    write_scores(tmp_path / "a.csv", [scores], {})
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [r["method"] for r in csv.DictReader(file)] == ["m"]


@pytest.mark.parametrize("name", ["blurred", "direct-inverse", "gradient-descent", "tikhonov", "tv", "pnp"])
def test_the_batch_size_changes_no_score(name):
    denoiser = DnCNN(3, 4, 3, norm=None, spectral_norm=False, residual=True).eval()
    method = baseline_methods(BLUR, denoiser)[name]
    images, validation = Images(pictures(3)), Images(pictures(2), seed=1)
    one, four = (evaluate(method, images, validation, BLUR, 0.01, batch_size=size) for size in (1, 2))
    assert one.parameter == four.parameter and len(one.psnr) == 3
    torch.testing.assert_close(one.psnr, four.psnr, rtol=0, atol=1e-3)
    if name in ("gradient-descent", "tikhonov", "tv"):
        best = method.candidates.index(next(iter(one.parameter.values())))
        assert 0 < best < len(method.candidates) - 1


def test_a_choice_at_an_end_of_its_grid_is_reported():
    """Without noise the best λ is far below that of noise 0.01."""
    method = baseline_methods(BLUR)["tikhonov"]
    images, validation = Images(pictures(2)), Images(pictures(1), seed=1)
    found = evaluate(method, images, validation, BLUR, 0.0)
    assert found.parameter["damping"] < 9e-5
    narrow = Method("tikhonov", method.restore, "damping", [0.01, 0.1, 1])
    ends = evaluate(narrow, images, validation, BLUR, 0.0)
    assert tuning([ends]) == {"tikhonov": "damping = 0.01, of 3 from 0.01 to 1, at an end of its grid"}
    assert ends.at_end and not evaluate(method, images, validation, BLUR, 0.05).at_end


def test_images_too_small_for_ssim_have_a_psnr():
    found = evaluate(baseline_methods(BLUR)["blurred"], Images(list(torch.rand(2, 3, 5, 5))), Images([]), BLUR, 0.01)
    assert found.psnr.isfinite().all() and found.ssim.isnan().all()
    assert ssim(*torch.rand(2, 1, 3, 6, 6)).isfinite().all()


def test_the_table_is_read_at_80_columns():
    """Names and figures whole, each on a line; no interval of one image."""
    values, statuses = 30 + torch.rand(200), torch.full((200,), int(Status.MAX_ITER))
    counts = torch.full((200,), 640)
    names = ("gradient-descent", "gaussian5-sigma1", "gaussian5-sigma5")
    scores = [Scores(name, values, values / 40, 1.0, {"steps": 640.0}, counts, statuses) for name in names]
    console = Console(record=True, width=80)
    console.print(results_table([*scores, Scores("once", values[:1], values[:1] / 40, 1.0)], "title"))
    text = console.export_text()
    assert "…" not in text and "nan" not in text and "6.02 dB lower" in " ".join(text.split())
    for found in scores:
        cells = score_cells(found.summary())
        (line,) = (line for line in text.splitlines() if found.method in line)
        assert all(cell in line for cell in cells.values())
        assert cells["evaluations"] == "640 (640)" and cells["not_converged"] == "200 of 200" and "±" in cells["ssim"]


def test_a_network_reports_its_solve():
    model = DEGrad(BLUR, DnCNN(3, 4, 3, norm=None), step_size=0.5).eval()
    scores = evaluate(network_method("net", model), Images(pictures(5)), Images([]), BLUR, 0.01, batch_size=2)
    assert scores.evaluations.shape == scores.status.shape == (5,)
    plain = FeedForward(BLUR, nn.Identity(), 0.02)
    scores = evaluate(network_method("plain", plain), Images(pictures(2)), Images([]), BLUR, 0.01)
    assert scores.evaluations is None
    by_hand = [psnr(tikhonov(BLUR, d, 0.02), x) for x, d in measurements(Images(pictures(2)), BLUR, 0.01, 2)]
    assert by_hand[0].shape == (2,)
