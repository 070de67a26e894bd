"""Files that cannot be used are left out of training and evaluation, and named."""

import json
import os
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.photographs import samples
from helpers.small_runs import write_photographs
from jfbfast.cli import app
from jfbfast.experiments.comparison import unseen_photographs
from jfbfast.experiments.run_data import RunImages, check_same
from jfbfast.experiments.settings import make_settings, write_settings


def spoil(folder):
    """Add files that cannot be used: first by name, in the middle and last."""
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / "1a.avif.png").write_bytes(b"\0\0\0\x20ftypavif")
    (folder / "folder.png").mkdir()
    Image.fromarray(samples("uint8", size=(1, 20))).save(folder / "z.png")


def test_evaluate_leaves_out_files_that_cannot_be_used(tmp_path):
    folder = write_photographs(tmp_path / "photographs", 5)
    spoil(folder)
    arguments = ["evaluate", str(folder), "--methods", "blurred", "--out", "table.csv"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for name in ("._0.png", "1a.avif.png", "z.png"):
        assert f"left out: {folder / name}: " in result.output
    assert "4 images" in result.output and "chosen on 1 other" in " ".join(result.output.split())
    for i in range(5):
        (folder / f"{i}.png").unlink()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "none of the 2 photographs can be used" in result.output


def test_train_leaves_out_files_that_cannot_be_used(tmp_path):
    folder = write_photographs(tmp_path / "photographs", 5)
    spoil(folder)
    if sys.platform == "linux":
        os.rename(folder / "0.png", os.fsencode(folder) + b"/0\xe9.png")  # a name that is not UTF-8
    options = "--form denoiser --features 4 --depth 3 --pretraining-steps 1 --batch-size 2 --crop 16 --validation 2"
    result = CliRunner().invoke(app, ["train", str(folder), "--out", "run", *options.split()])
    assert result.exit_code == 0, result.output
    assert "4 photographs to train on, 1 to validate on" in result.output
    assert "2 of 6 photographs cannot be used" in result.output and "1 of 2 photographs cannot" in result.output
    assert "z.png: too small for crops of 16 pixels: 20 × 1 pixels; it takes 6 a side" in result.output


def test_an_unusable_photograph_is_not_among_the_photographs_to_score(tmp_path):
    folder, run = write_photographs(tmp_path / "photographs", 5), tmp_path / "run"
    spoil(folder)
    run.mkdir()
    (run / "model").touch()
    write_settings(run / "config.yaml", make_settings({"data": str(folder)}))
    seen = {"training": ["0.png", "1.png", "2.png"], "validation": ["3.png", "4.png"]}
    (run / "photographs.json").write_text(json.dumps(seen))
    chosen, scored = unseen_photographs(folder, [str(run / "model")], None, None, print)
    assert [path.name for path in chosen] == ["3.png"] and "4.png" in [path.name for path in scored]


def test_a_resumed_run_says_which_photographs_changed(tmp_path):
    images = RunImages(None, None, {"training": ["a.png", "c.png", "d.png"]})
    told = (
        r"data is photos; its photographs for training .*: 2 are new, such as c\.png; 1 are missing .*, such as b\.png"
    )
    with pytest.raises(ValueError, match=told):
        check_same(images, {"training": ["a.png", "b.png"]}, "photos", tmp_path)
    check_same(images, images.names, "photos", tmp_path)
