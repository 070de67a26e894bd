"""The command line on real files, and a small demo."""

import json
import re
import subprocess
import sys
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
import yaml
from skimage import data as photographs

from helpers.command_line import run
from helpers.small_runs import write_photographs
from jfbfast import demo
from jfbfast.experiments.settings import make_settings, write_settings
from jfbfast.imaging.photographs import read_photograph
from jfbfast.models import pretrained
from jfbfast.models.checkpoint import load_checkpoint, save_checkpoint
from jfbfast.models.config import ModelConfig


def write_network(path, form="filtered", **values):
    """A small network without training."""
    config = ModelConfig(form, {**demo.CONFIG.denoiser, "features": 4, "depth": 3}, **values)
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, config.model(), config)
    return path


def write_crops(folder, count, height, width):
    """Photographs of this size, cut from one above each other."""
    folder.mkdir()
    step = (photographs.coffee().shape[0] - height) // (count - 1)
    for i in range(count):
        cv2.imwrite(
            str(folder / f"{i}.png"), photographs.coffee()[step * i : step * i + height, 100 : 100 + width, ::-1]
        )
    return folder


@pytest.fixture
def blurred(tmp_path):
    """A sharp photograph, and the path of a blurred, noisy one."""
    truth = photographs.astronaut()[:160, 150:300].astype(np.float32) / 255
    d = cv2.GaussianBlur(truth, (5, 5), 1.0, borderType=cv2.BORDER_REFLECT_101)
    d = d + 0.005 * np.random.default_rng(0).standard_normal(d.shape).astype(np.float32)
    path = tmp_path / "blurred.png"
    cv2.imwrite(str(path), (d[:, :, ::-1].clip(0, 1) * 65535).round().astype(np.uint16))
    return torch.from_numpy(truth).permute(2, 0, 1), path


@pytest.mark.compiled
def test_info_names_the_backends(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "jfbfast", "info"], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert "native (CPU)" in out and "C++" in out and "triton (CUDA)" in out


def test_restore_without_a_network_is_tikhonov_and_says_so(blurred, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    truth, path = blurred
    out = tmp_path / "restored.png"
    exact = ("--light", "encoded", "--tolerance", 0)  # as the fixture made it
    result = run("restore", path, "--sigma", 1, "--kernel-size", 7, "--noise", 0.01, *exact, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Tikhonov" in result.output
    before, after = (float((read_photograph(p).pixels - truth).square().mean()) for p in (path, out))
    assert after < 0.8 * before
    assert read_photograph(out).dtype == np.uint16


def test_a_photograph_that_contradicts_its_blur_is_named_and_left_nearly_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("sharp.png", photographs.coffee()[80:280, 150:350, ::-1])
    small = ("--sigma", 1, "--kernel-size", 5)
    cases = (small, 0.002), ((*small, "--padding-mode", "zeros", "--light", "encoded"), 0.002), (("--sigma", 3), 0.015)
    for options, most in cases:  # unguarded 0.0103, 0.0109 and 0.36
        result = run("restore", "sharp.png", "--overwrite", *options)
        assert result.exit_code == 0, result.output
        told = " ".join(result.output.split())
        assert re.search("warning: sharp.png is sharper (or noisier )?than a Gaussian", told)
        before, after = (read_photograph(name).pixels for name in ("sharp.png", "sharp-restored.png"))
        assert float((after - before).square().mean()) < most


def test_restore_does_not_change_its_input(blurred):
    _, path = blurred
    before = path.read_bytes()
    result = run("restore", path, "--sigma", 1, "--kernel-size", 5, "--noise", 0.01, "--out", path)
    assert result.exit_code == 1 and "the photograph itself" in " ".join(result.output.split())
    assert path.read_bytes() == before


def test_train_then_restore_with_the_checkpoint(blurred, tmp_path):
    truth, path = blurred
    folder = write_crops(tmp_path / "photographs", 4, 100, 200)
    checkpoint = tmp_path / "run" / "model.safetensors"
    options = "--features 8 --depth 3 --pretraining-steps 3 --steps 3 --batch-size 2 --crop 32 --validation 0.25"
    settings = tmp_path / "settings.yaml"
    settings.write_text("depth: 5\ninterval: 2\nfeatures: [8]\n")
    result = run("train", folder, "--out", tmp_path / "run", "--config", settings, *options.split())
    assert result.exit_code == 0, result.output
    assert "3 photographs to train on, 1 to validate on" in result.output and "validation PSNR" in result.output
    assert load_checkpoint(checkpoint)[1].denoiser["features"] == 8
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (resolved["depth"], resolved["interval"], resolved["training_tol"]) == (3, 2, 1e-3)
    assert any((tmp_path / "run" / "tensorboard" / "training").iterdir())
    result = run("restore", path, "--checkpoint", checkpoint, "--out", tmp_path / "out", "--tile", 128)
    assert result.exit_code == 0, result.output
    assert read_photograph(tmp_path / "out" / "blurred-restored.png").pixels.shape == truth.shape


def test_restore_picks_the_shipped_model_for_the_blur(blurred, tmp_path, monkeypatch):
    truth, path = blurred
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    write_network(tmp_path / "small.safetensors")
    for options, name in (
        (("--sigma", 1, "--kernel-size", 5), "the shipped model small"),
        (("--checkpoint", "small", "--sigma", 2), "small was trained for other measurements (sigma = 1.0)"),
        (
            ("--checkpoint", "small", "--padding-mode", "zeros", "--light", "encoded"),
            "other measurements (padding_mode = reflect)",
        ),
        (("--checkpoint", "small"), "(small; tiles"),
        (("--sigma", 1), "Restoring a Gaussian of σ = 1 pixels by Tikhonov regularisation"),
        (("--checkpoint", "tikhonov", "--sigma", 1), "Tikhonov, λ"),
    ):
        again = ("--out", tmp_path / "out", "--overwrite")
        result = run("restore", path, *again, "--tile", 128, "--check-tiles", *options)
        assert result.exit_code == 0, result.output
        told = " ".join(result.output.split())
        assert name in told and "of white" in told
    assert read_photograph(tmp_path / "out" / "blurred-restored.png").pixels.shape == truth.shape


def test_evaluate_prints_and_writes_one_table(tmp_path):
    folder = write_crops(tmp_path / "photographs", 5, 32, 32)
    for name, form in (("small", "filtered"), ("alone", "denoiser")):
        write_network(tmp_path / f"{name}.safetensors", form, padding_mode="zeros")
    methods = "blurred,direct-inverse,gradient-descent,tikhonov,tv,pnp"
    options = ("--methods", methods, "--denoiser", tmp_path / "alone.safetensors", "--validation", 2)
    out = tmp_path / "made" / "table.json"
    result = run("evaluate", tmp_path / "small.safetensors", folder, *options, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["padding_mode"], found["images"]) == ("zeros", ["2.png", "3.png", "4.png"])
    rows = {row["method"]: row for row in found["methods"]}
    assert list(rows) == [*methods.split(","), "small"]
    assert all(row["images"] == 3 == len(row["per_image"]["psnr"]) for row in rows.values())
    assert rows["tikhonov"]["psnr"] > rows["blurred"]["psnr"] + 0.5 and "damping" in rows["tikhonov"]["parameter"]
    best = max(rows["tikhonov"]["tuning"], key=lambda trial: trial["validation_psnr"])
    assert len(rows["tikhonov"]["tuning"]) == 49 and rows["blurred"]["tuning"] == []
    assert rows["tikhonov"]["parameter"] == f"damping = {best['value']:.3g}"
    assert rows["small"]["evaluations_max"] >= 1 and "small" in result.output
    result = run("evaluate", tmp_path / "alone.safetensors", folder)
    assert result.exit_code == 1 and "a denoiser alone" in " ".join(result.output.split())


def test_train_and_evaluate_with_unknown_surroundings(tmp_path):
    folder = write_photographs(tmp_path / "photographs", 4, (6, 7), (24, 20))
    write_photographs(folder / "small", 1, (4, 4), (9, 24))
    options = "--features 4 --depth 2 --pretraining-steps 0 --steps 2 --batch-size 2 --crop 16 --validation 1"
    result = run("train", folder, "--out", tmp_path / "run", "--padding-mode", "valid", *options.split())
    assert result.exit_code == 0, result.output
    file = tmp_path / "run" / "model.safetensors"
    options = ("--train", 0, "--validation", 1, "--methods", "blurred,direct-inverse,tikhonov")
    result = run("evaluate", file, folder, *options, "--out", tmp_path / "table.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "table.json").read_text())
    assert (found["padding_mode"], found["images"]) == ("valid", ["1.png", "2.png", "3.png"])
    assert [row["method"] for row in found["methods"]] == ["blurred", "tikhonov", "run"]
    assert "direct-inverse is not in the table: padding_mode is 'valid'" in " ".join(result.output.split())
    result = run("diagnose", file, folder / "1.png", "--out", tmp_path, "--crop", 12, "--samples", 1, "--iterations", 5)
    assert result.exit_code == 0, result.output
    result = run("restore", folder / "1.png", "--checkpoint", file, "--out", tmp_path)
    assert result.exit_code == 0 and f"1-restored.png ({file})" in result.output


def test_evaluate_leaves_out_what_a_network_was_trained_on(tmp_path):
    folder = write_photographs(tmp_path / "photographs", 10, (4, 4), (20, 20))
    file = write_network(tmp_path / "run" / "model")
    for values, options, chosen, scored in (
        ({"train": 0.5, "validation": 2}, (), "56", "789"),
        ({}, (), "", "9"),  # nine to train on and one to validate on
        ({"validation": 0.4}, (), "67", "89"),  # six to train on: half of the rest chooses
        ({"validation": 0.4}, ("--validation", 1), "6", "789"),
        ({"validation": 0.4}, ("--train", 4), "45", "6789"),
        ({"data": str(tmp_path)}, (), "01", "23456789"),
    ):
        write_settings(file.parent / "config.yaml", make_settings({"data": str(folder), **values}))
        result = run("evaluate", file, folder, "--methods", "blurred", "--out", tmp_path / "table.json", *options)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "table.json").read_text())
        assert [[f"{i}.png" for i in each] for each in (chosen, scored)] == [found["validation"], found["images"]]
        told = " ".join(result.output.split())
        assert ("of these photographs: they are left out" in told) == (
            "data" not in values and "--train" not in options
        )
        assert ("was trained on 2 of the photographs that choose or are scored" in told) == ("--train" in options)


def test_evaluate_knows_a_runs_photographs_by_name(tmp_path, monkeypatch):
    folder = write_photographs(tmp_path / "photographs", 8, (4, 4), (20, 20))
    file = write_network(tmp_path / "run" / "model")
    settings = make_settings({"data": str(folder), "train": 0.5, "validation": 2})
    write_settings(file.parent / "config.yaml", settings)
    seen = {"training": ["1.png", "3.png", "5.png", "gone.png"], "validation": ["2.png"]}
    (file.parent / "photographs.json").write_text(json.dumps(seen))
    monkeypatch.chdir(tmp_path)
    for options, chosen, scored in (((), "2", "0467"), (("--validation", 3), "204", "67")):
        result = run("evaluate", file, "photographs", "--methods", "blurred", "--out", "table.json", *options)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "table.json").read_text())
        assert [[f"{i}.png" for i in each] for each in (chosen, scored)] == [found["validation"], found["images"]]
        assert "was trained on 3 of these photographs: they are left out" in " ".join(result.output.split())
    result = run("evaluate", file, "photographs", "--methods", "blurred", "--train", 2)
    assert "was trained on 2 of the photographs that choose or are scored" in " ".join(result.output.split())
    result = run("evaluate", "photographs", "--methods", "blurred", "--squash")
    assert result.exit_code == 1 and "--squash has an effect only with --resize" in result.output


def test_bench_names_are_checked_before_any_runs(tmp_path):
    for names, message in (
        (("--quick", "paper"), "paper has options of its own; it takes the first place"),
        (("kernels", "nonsense"), "there is no benchmark 'nonsense'"),
    ):
        result = run("bench", "--out", tmp_path / "out", *names)
        assert result.exit_code == 1 and message in " ".join(result.output.split())
        assert not (tmp_path / "out").exists()


def test_two_models_are_diagnosed_in_two_pictures(tmp_path, monkeypatch):
    report = Mock(return_value=Mock(table=lambda: "measured"))
    monkeypatch.setattr("jfbfast.diagnostics.report", report)
    photograph = next(write_photographs(tmp_path / "photographs", 1).iterdir())
    for name in ("a", "b"):
        file = write_network(tmp_path / name / "model.safetensors")
        result = run("diagnose", file, photograph, "--crop", 16, "--out", tmp_path)
        assert result.exit_code == 0, result.output
    pictures = [call.args[0].name for call in report.return_value.plot.call_args_list]
    assert pictures == ["a-diagnosis.png", "b-diagnosis.png"]


def test_commands_take_a_directory_that_was_saved_or_trained_in(tmp_path, monkeypatch):
    monkeypatch.setattr("jfbfast.diagnostics.report", Mock(return_value=Mock(table=lambda: "measured")))
    folder = write_photographs(tmp_path / "photographs", 4, (4, 4), (20, 20))
    file = write_network(tmp_path / "run" / "model.safetensors")
    write_settings(file.parent / "config.yaml", make_settings({"data": str(folder), "train": 0.5, "validation": 1}))
    pretrained.load_model(file)[0].save_pretrained(tmp_path / "saved")
    for path, seen in ((file.parent, True), (tmp_path / "saved", False)):
        result = run("restore", folder / "0.png", "--checkpoint", path, "--out", tmp_path / path.name / "out")
        assert result.exit_code == 0, result.output
        result = run("evaluate", path, folder, "--methods", "blurred")
        told = " ".join(result.output.split())
        assert result.exit_code == 0 and (f"{path} was trained on 2 of these" in told) == seen, result.output
        result = run("diagnose", path, folder / "1.png", "--crop", 16, "--out", tmp_path)
        assert result.exit_code == 0 and f"{path.name}-diagnosis.png" in result.output, result.output


def test_a_small_demo_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(demo, "JFB_STEPS", 2)
    crop = demo.photograph("astronaut")[:, :200, :200]
    small = {"astronaut": crop, **{name: demo.photograph(name) for name in demo.TRAINING}}
    monkeypatch.setattr(demo, "photograph", small.__getitem__)
    monkeypatch.setattr(demo, "DETAIL", (20, 20, 60))
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for expected in (
        "blurred",
        "direct inverse",
        "gradient descent",
        "Tikhonov",
        "DE-GRAD with JFB",
        "universal",
        "jfbfast-demo.png",
    ):
        assert expected in result.output
    assert read_photograph(tmp_path / "jfbfast-demo.png").pixels.shape[0] == 3
    assert load_checkpoint(tmp_path / "jfbfast-demo.safetensors")[1] == demo.CONFIG


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("restore", "missing.png", "--sigma", -1), "sigma is -1.0"),
        (("restore", "missing.png", "--sigma", 1, "--kernel-size", 4), "kernel_size is 4"),
        (("restore", "missing.png", "--noise", 0, "--sigma", 1, "--checkpoint", "tikhonov"), "error: noise is 0; Tik"),
        (("restore", "missing.png", "--checkpoint", "none.safetensors"), "there is no such file"),
        (("restore", "missing.png", "--sigma", 1), "missing.png: there is no such file"),
        (("train", "nowhere"), "no image files"),
        (("train",), "data is missing"),
        (("train", ".", "--config", "none.yaml"), "none.yaml: not a file of settings"),
        (("train", ".", "--resume"), "holds no run to resume"),
        (("train", ".", "--ema", "1.5"), "ema is 1.5"),
        (("evaluate", "nowhere"), "nowhere is no directory; the last argument takes the one of the photographs"),
        (("evaluate", "nobody", "."), "nobody: there is no such file"),
        (("evaluate", ".", "--methods", "pnp"), "pnp, which takes a --denoiser"),
        (("evaluate", ".", "--denoiser", "x"), "--denoiser is x; it is for pnp, which --methods does not have"),
        (("evaluate", ".", "--methods", "magic"), "--methods has 'magic'; it takes blurred"),
        (("evaluate", ".", "--out", "table.txt"), "--out is table.txt"),
        (("evaluate", ".", "--methods", ""), "--methods is empty; without networks it takes one or more of blurred"),
        (("evaluate", ".", "--device", "foo"), "--device is foo; it takes cpu or cuda"),
        (("evaluate", ".", "--device", "cuda:99"), "--device is cuda:99; it takes cpu or cuda"),
        (("evaluate", ".", "--device", "meta"), "--device is meta; it takes cpu or cuda"),
        (("restore", "missing.png", "--tile", 0), "--tile is 0; it takes an integer of at least 32"),
        (("restore", "missing.png", "--tile", -5), "--tile is -5"),
        (("restore", "missing.png", "--sigma", 1, "--padding-mode", "foo"), "padding_mode is 'foo'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_missing_package_is_reported_with_the_extra_to_install(monkeypatch):
    def refuse(*arguments, **options):
        raise ModuleNotFoundError("refused", name="safetensors")

    monkeypatch.setattr("jfbfast.imaging.restoration.Restoration", refuse)
    result = run("restore", "missing.png", "--sigma", 1)
    told = " ".join(result.stderr.split())
    assert result.exit_code == 1 and "safetensors is not installed" in told and "'jfbfast[train]'" in told


def test_an_unknown_padding_mode_is_refused_before_a_model_is_loaded():
    assert "model" not in run("restore", "missing.png", "--sigma", 1, "--padding-mode", "foo").output


def test_a_bad_image_does_not_stop_the_restoration_of_the_others(blurred, tmp_path):
    (tmp_path / "corrupt.png").write_bytes(blurred[1].read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    bad = (tmp_path / "corrupt.png", tmp_path / "empty.png")
    result = run("restore", *bad, blurred[1], "--sigma", 1, "--kernel-size", 5, "--out", tmp_path / "out")
    assert result.exit_code == 1 and read_photograph(tmp_path / "out" / "blurred-restored.png")
    told = " ".join(result.output.split())
    assert "corrupt.png: " in told and "empty.png: the file is empty" in told and "(gaussian5-sigma1)" in told


@pytest.mark.parametrize(
    ("out", "message"),
    [("x.xyz", r"x.xyz: .xyz is no format to write"), ("nodir/x.png", "there is no directory"), ("x.jpg", "uint16")],
)
def test_a_file_that_cannot_be_written_is_reported_before_the_restoration(blurred, tmp_path, monkeypatch, out, message):
    monkeypatch.setattr("jfbfast.imaging.restoration.restore_tiled", None)
    result = run("restore", blurred[1], "--sigma", 1, "--out", tmp_path / out)
    assert result.exit_code == 1 and message in " ".join(result.output.split())


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_freed_memory_is_kept():
    script = """
import resource, sys, torch, jfbfast
assert "keep" not in sys.argv or jfbfast.keep_freed_memory()
def faults():
    for _ in range(20):
        torch.ones(12_000_000).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults()
print(faults() - first)
"""
    default, kept = (
        int(subprocess.run([sys.executable, "-c", script, *a], capture_output=True, text=True, check=True).stdout)
        for a in ([], ["keep"])
    )
    assert kept < 0.1 * default
