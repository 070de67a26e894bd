"""The paper's two tables: their data are what the library measures and chooses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from helpers.paper import QUIET, read
from jfbfast.benchmarks import paper
from jfbfast.benchmarks.paper import tables
from jfbfast.benchmarks.paper.study import LABELS, Study
from jfbfast.experiments.evaluation import evaluate, measurements
from jfbfast.experiments.settings import make_settings, write_settings
from jfbfast.imaging.classical import gradient_descent
from jfbfast.imaging.quality import PAPER_OFFSET, psnr

pytestmark = pytest.mark.usefixtures("one_thread")


def same(text, value):
    """Whether a CSV's cell holds the value."""
    return text == ("" if value is None else str(value)) or float(text) == pytest.approx(value, nan_ok=True)


def test_table2_holds_what_evaluate_measures(plan, tmp_path):
    paper.run(tmp_path, True, QUIET, plan, ("table2",))
    rows = read(tmp_path / "table2.csv")
    assert [row["method"] for row in rows] == list(LABELS)
    study = Study(plan, QUIET)
    assert [file.name for file in study.files] == ["4.png", "5.png"]
    for row in rows:
        name = row["method"]
        assert row["missing"] == "" and row["checkpoint"] == plan.checkpoints.get(
            "denoiser" if name == "pnp" else name, ""
        )
        found = evaluate(study.methods[name], study.images, study.validation, study.blur, 0.01, **study.options)
        for column, value in found.summary().items():
            assert column == "seconds" or same(row[column], value), (name, column)
        assert float(row["psnr"]) - float(row["psnr_paper"]) == pytest.approx(6.0206, abs=1e-3)
    assert {row["method"]: row["evaluations_max"] for row in rows}["unrolled"] == "3"
    assert (tmp_path / "table2.png").read_bytes().startswith(b"\x89PNG")


def test_tuning_takes_the_best_of_the_validation_images_alone(plan, tmp_path):
    paper.run(tmp_path, True, QUIET, plan, ("table2",))
    rows = read(tmp_path / "table2-tuning.csv")
    assert {row["method"] for row in rows} == {"gradient-descent", "tikhonov", "tv", "pnp"}
    told = {row["method"]: row["parameter"] for row in read(tmp_path / "table2.csv")}
    for name in {row["method"] for row in rows}:
        grid = [row for row in rows if row["method"] == name]
        quality = [float(row["validation_psnr"]) for row in grid]
        (chosen,) = (row for row in grid if row["chosen"] == "True")
        assert quality.index(max(quality)) == grid.index(chosen)
        assert (chosen["at_end"] == "True") == (chosen in (grid[0], grid[-1]))
        assert told[name] == f"{chosen['parameter']} = {float(chosen['value']):.3g}"
    study = Study(plan, QUIET)
    assert [file.name for file in study.validation_files] == ["2.png", "3.png"]
    assert study.validation.seed != study.images.seed  # or the first of both would share their noise
    ((x, d),) = measurements(study.validation, study.blur, 0.01, 16)
    for row in rows:
        if row["method"] == "gradient-descent" and int(row["value"]) < 100:
            descent = gradient_descent(study.blur, d, max_iter=int(row["value"]))
            assert float(row["validation_psnr"]) == pytest.approx(float(psnr(descent.value, x).mean()), abs=1e-4)


def test_what_is_missing_is_said(plan, tmp_path):
    console = Console(record=True, width=200)
    ours = {"ours": plan.checkpoints["ours"]}
    paper.run(tmp_path, True, console, replace(plan, checkpoints=ours, validation=0, train=4), ("table2",))
    rows = {row["method"]: row for row in read(tmp_path / "table2.csv")}
    assert "no --denoiser is given" in rows["pnp"]["missing"] and "no --paper" in rows["paper"]["missing"]
    assert "validation is empty" in rows["tikhonov"]["missing"]  # nothing chooses its parameter
    assert all(rows[name]["psnr"] == "" for name in ("pnp", "paper", "tikhonov"))
    assert float(rows["ours"]["psnr"]) > 0 and rows["ours"]["missing"] == ""
    text = console.export_text()
    assert "plug-and-play: missing" in text and "Tikhonov is not in the table: validation is empty" in text


def test_the_tables_leave_out_what_a_network_was_trained_on(plan, folder):
    values = {"data": str(folder), "train": 3, "validation": 1}
    write_settings(Path(plan.checkpoints["feed-forward"]).parent / "config.yaml", make_settings(values))
    console = Console(record=True, width=200)
    study = Study(replace(plan, train=None, validation=None), console)
    assert [[file.name for file in each] for each in (study.validation_files, study.files)] == [
        ["3.png"],
        ["4.png", "5.png"],
    ]
    assert "was trained on 3 of these photographs: they are left out." in console.export_text()
    Study(plan, console)
    assert "was trained on 1 of the photographs that choose or are scored." in console.export_text()


def test_a_checkpoint_of_another_kind_is_refused(plan):
    for role, wrong in (("ours", "implicit"), ("implicit", "ours"), ("denoiser", "paper"), ("paper", "ours")):
        given = {role: plan.checkpoints[wrong]}
        with pytest.raises(ValueError, match=rf"--{role} is .*{wrong}\.safetensors, of the form .*; it takes a"):
            Study(replace(plan, checkpoints=given), QUIET)


def test_table1_restores_the_measurements_of_table2(plan, tmp_path):
    paper.run(tmp_path, True, QUIET, plan, ("table1",))
    rows = read(tmp_path / "table1.csv")
    assert [(row["method"], row["image"]) for row in rows] == [
        (name, image) for name in tables.METHODS for image in ("4.png", "5.png")
    ]
    study = Study(plan, QUIET)
    for name in tables.METHODS:
        scores = evaluate(study.methods[name], study.images, study.validation, study.blur, 0.01, **study.options)
        mine = [row for row in rows if row["method"] == name]
        for column in ("psnr", "ssim"):
            found = [float(row[column]) for row in mine]
            assert found == pytest.approx(getattr(scores, column).tolist(), abs=1e-3), (name, column)
        assert float(mine[0]["psnr_paper"]) == pytest.approx(float(mine[0]["psnr"]) - PAPER_OFFSET)
        assert mine[0]["parameter"] == scores.summary()["parameter"]
    truth, restored = tables.restore(Study(replace(plan, pictures=1), QUIET))
    assert len(truth) == 1 and torch.equal(truth[0], study.images[0].x)
    assert (tmp_path / "table1.png").read_bytes().startswith(b"\x89PNG")
    assert all(len(each.images) == 1 and each.images[0].isfinite().all() for each in restored)


def test_table1_leaves_out_what_cannot_restore(plan, tmp_path):
    console = Console(record=True, width=200)
    paper.run(tmp_path, True, console, replace(plan, validation=0), ("table1",))
    assert "gradient-descent" not in {row["method"] for row in read(tmp_path / "table1.csv")}
    assert "gradient descent, stopped early is not in the table: validation is empty" in console.export_text()
