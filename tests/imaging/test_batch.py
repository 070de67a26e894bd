"""Many photographs in one call: targets are checked first, files are written whole, a bad one stops no other."""

import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from helpers.photographs import PROFILE, samples, tagged
from helpers.small_runs import write_photographs
from jfbfast.cli import app
from jfbfast.files import write_whole
from jfbfast.imaging import batch
from jfbfast.imaging.photographs import ImageError, Metadata, Photograph, image_files, read_photograph, write_photograph

SMALL = Photograph(torch.rand(3, 40, 30), None, np.dtype("uint16"))


@pytest.fixture
def photograph(tmp_path):
    """Make a photograph in the current directory, and return its name."""
    write_photographs(tmp_path / "made", 1)
    (tmp_path / "made" / "0.png").rename(tmp_path / "x.png")
    (tmp_path / "made").rmdir()
    return "x.png"


def restore(*arguments):
    fixed = ("--checkpoint", "tikhonov", "--sigma", "1", "--kernel-size", "5", "--noise", "0.01")
    result = CliRunner().invoke(app, ["restore", *fixed, *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(tmp_path, message, *arguments):
    before = contents(tmp_path)
    result = restore(*arguments)
    assert result.exit_code == 1 and message in result.stderr, result.output
    assert contents(tmp_path) == before and "→" not in result.stdout


def test_a_photograph_is_restored_with_its_profile(tmp_path, monkeypatch):
    (tmp_path / "deep.png").write_bytes(tagged("png", samples("uint16", size=(40, 30)), 6))
    (tmp_path / "eight.jpg").write_bytes(tagged("jpeg", samples("uint8", size=(40, 30)), 6))
    result = restore("deep.png", "eight.jpg", "--padding-mode", "reflect")
    assert result.exit_code == 0, result.output
    for name, dtype in (("deep-restored.png", "uint16"), ("eight-restored.png", "uint8")):
        found = read_photograph(name)
        assert found.metadata.icc == PROFILE and found.dtype == dtype and found.pixels.shape == (3, 30, 40)


def test_no_photograph_is_ever_a_target(tmp_path, photograph):
    (tmp_path / "x-restored.png").write_bytes((tmp_path / photograph).read_bytes())
    refused(tmp_path, "x-restored.png: is the photograph itself, or another", photograph, "x-restored.png")
    os.link(photograph, "hard.png")
    os.symlink(photograph, "soft.png")
    for name in ("x.png", "hard.png", "soft.png"):
        refused(tmp_path, "is the photograph itself", photograph, "--out", name, "--overwrite")


def test_arguments_are_checked_before_anything_is_restored(tmp_path, photograph):
    (tmp_path / "x.jpg").write_bytes((tmp_path / photograph).read_bytes())
    for message, *arguments in (
        ("out.png: there is no such file", photograph, "out.png"),
        ("would both become x-restored.png", photograph, "x.jpg"),
        ("would both become x-restored.png", photograph, photograph),
        ("a.gif: .gif is no format to write", photograph, "--out", "a.gif"),
        ("there is no directory none", photograph, "--out", "none/a.png"),
        ("name too long", photograph, "--out", f"{'a' * 255}.png"),
        ("x.jpg: is there already", photograph, "--out", "x.jpg"),
    ):
        refused(tmp_path, message, *arguments)
    (tmp_path / "folder.png").mkdir()
    assert restore(photograph, "--out", "folder.png").exit_code == 0  # it is a directory, whatever its name
    (tmp_path / "x-restored.png").mkdir()
    refused(tmp_path, "is a directory", photograph, "--overwrite")


def test_a_file_is_overwritten_only_on_request(tmp_path, photograph):
    (tmp_path / "x-restored.png").write_text("old")
    refused(tmp_path, "x-restored.png: is there already; --overwrite replaces it", photograph)
    assert restore(photograph, "--overwrite").exit_code == 0
    assert read_photograph("x-restored.png").pixels.shape == (3, 24, 30)
    (tmp_path / "x-restored.png").unlink()
    os.symlink("nowhere", "x-restored.png")
    refused(tmp_path, "x-restored.png: is there already", photograph)


def test_a_bad_file_does_not_affect_the_others(tmp_path, photograph):
    (tmp_path / "._x.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "broken.avif").write_bytes(b"\0\0\0\x20ftypavif")
    Image.fromarray(samples("uint8", size=(1, 20))).save("line.png")
    os.mkfifo("pipe.png")
    bad = ["._x.png", "broken.avif", "pipe.png"]
    result = restore(*bad, "line.png", photograph, "--out", "out", "--padding-mode", "reflect")
    assert result.exit_code == 1 and sorted(os.listdir("out")) == ["line-restored.png", "x-restored.png"]
    told = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(told) == 4 and told[-1] == "error: 3 of 5 photographs could not be restored"
    assert all(name in line for name, line in zip(bad, told, strict=False))


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_and_terminals_need_not_be_unicode(tmp_path, photograph, encoding):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    os.rename(photograph, name)
    command = [sys.executable, "-m", "jfbfast", "restore", "--sigma", "1", "--noise", "0.02"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, name, "--out", "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "\\u2192" in done.stdout, done.stderr
    assert os.listdir(b"out") == [b"caf\xe9-restored.png"]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_a_failed_write_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ImageError, match=rf"a\.{suffix}: could not be written \(File too large\)"):
            write_photograph(path, SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == {path.name: b"old"}


def test_two_writers_leave_one_whole_file_that_the_umask_allows(tmp_path):
    path = tmp_path / ("a" * 251 + ".png")

    def write(partial):
        partial.write_bytes(b"first")
        write_whole(path, lambda other: other.write_bytes(b"second"))
        assert path.read_bytes() == b"second"

    before = os.umask(0o027)
    try:
        write_whole(path, write)
    finally:
        os.umask(before)
    assert contents(tmp_path) == {path.name: b"first"} and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_created_during_a_restoration_is_not_overwritten(tmp_path):
    path = tmp_path / "late.png"
    path.write_text("precious")
    with pytest.raises(ImageError, match="is there already; --overwrite replaces it"):
        write_photograph(path, SMALL, overwrite=False)
    assert contents(tmp_path) == {path.name: b"precious"}


def test_directories_that_cannot_be_entered_are_skipped(tmp_path, monkeypatch, photograph):
    is_dir = Path.is_dir

    def refused(self):
        if self.suffix:
            raise PermissionError(13, "Permission denied")
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", refused)
    assert Path(photograph) in [file.relative_to(Path.cwd()) for file in image_files(Path.cwd())]


def test_a_profile_that_is_too_long_for_png_is_refused(tmp_path):
    long = SMALL._replace(metadata=Metadata(icc=bytes(1 << 21)))
    with pytest.raises(ImageError, match=r"of 2097152 bytes is too long for \.png; \.tiff can hold it"):
        write_photograph(tmp_path / "a.png", long)
    write_photograph(tmp_path / "a.tiff", long)


def test_directories_and_patterns_stand_for_their_photographs(tmp_path, photograph):
    (tmp_path / "trip" / "day").mkdir(parents=True)
    for name in ("trip/a.png", "trip/day/b.png", "trip/day/b-restored.png", "trip/c-compared.png"):
        (tmp_path / name).write_bytes((tmp_path / photograph).read_bytes())
    (tmp_path / "trip" / "notes.txt").write_text("no photograph")
    assert restore("trip", "--out", "out").exit_code == 0
    assert sorted(str(p.relative_to("out")) for p in Path("out").rglob("*.png")) == [
        "a-restored.png",
        "day/b-restored.png",
    ]
    assert restore("trip/*/b.p?g", "x.png", "--out", "made/{name}.tiff").exit_code == 0
    assert sorted(os.listdir("made")) == ["b.tiff", "x.tiff"]
    refused(tmp_path, "trip/*.jpg: no file has such a name", "trip/*.jpg")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "empty: no image files there", "empty")


def test_a_comparison_and_a_report_lie_beside_the_restoration(tmp_path, photograph):
    (tmp_path / "bad.png").write_bytes(b"")
    result = restore(photograph, "bad.png", "--compare", "--report", "report.json", "--out", "out", "-q")
    assert result.exit_code == 1 and result.stdout == ""
    assert sorted(os.listdir("out")) == ["x-compared.png", "x-restored.png"]
    assert read_photograph("out/x-compared.png").pixels.shape[0] == 3
    good, bad = json.loads((tmp_path / "report.json").read_text())
    assert good["restored"] == "out/x-restored.png" and good["compared"] == "out/x-compared.png"
    assert good["method"].startswith("Tikhonov") and good["blur"] == "a Gaussian of σ = 1 pixels"
    assert good["seconds"] > 0 and good["evaluations"] is None and 0 < good["residual"] < 0.1
    assert bad == {"photograph": "bad.png", "error": "bad.png: the file is empty"}
    (tmp_path / "out" / "x-restored.png").unlink()
    refused(tmp_path, "x-compared.png: is there already", photograph, "--compare", "--out", "out")


def test_several_sigmas_are_tried_side_by_side(tmp_path, photograph):
    result = CliRunner().invoke(app, ["restore", photograph, "--sigma", "0.8", "--sigma", "1,2", "--report", "r.json"])
    assert result.exit_code == 0 and f"{photograph} → x-trials.png" in result.stdout
    assert sorted(name for name in contents(tmp_path) if name != photograph) == ["r.json", "x-trials.png"]
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert [trial["blur"] for trial in row["trials"]] == [
        "a Gaussian of σ = 0.8 pixels",
        "a Gaussian of σ = 1, 2 pixels",
    ]
    result = CliRunner().invoke(app, ["restore", photograph, "--sigma", "0.8", "--sigma", "1", "--compare"])
    assert result.exit_code == 1 and "--compare is given; it takes one --sigma" in result.stderr


def test_two_photographs_never_share_a_picture(tmp_path, photograph):
    """Their restorations differ in the suffix, or are not written."""
    write_photograph("x.tif", read_photograph(photograph))
    for options in (
        ("--compare",),
        ("--compare", "--overwrite"),
        ("--sigma", "2"),
        ("--sigma", "2", "--skip-existing"),
    ):
        picture = "x-compared.png" if "--compare" in options else "x-trials.png"
        told = f"x.png and x.tif would both become {picture}; restore them into two directories"
        refused(tmp_path, told, photograph, "x.tif", *options)
    (tmp_path / "y.png").write_bytes((tmp_path / photograph).read_bytes())
    (tmp_path / photograph).rename("y-compared.png")
    told = "y.png and y-compared.png would both become out/y-compared.png"
    refused(tmp_path, told, "y.png", "y-compared.png", "--compare", "--out", "out/{name}.png")


def test_a_missing_restoration_is_written_beside_a_picture_that_stays(tmp_path, photograph):
    options = (photograph, "--compare", "--skip-existing")
    assert restore(*options).exit_code == 0
    (tmp_path / "x-restored.png").unlink()
    made = (tmp_path / "x-compared.png").stat().st_mtime_ns
    result = restore(*options)
    assert result.exit_code == 0 and (tmp_path / "x-restored.png").is_file(), result.output
    assert (tmp_path / "x-compared.png").stat().st_mtime_ns == made


def test_a_blur_is_given_in_one_way(tmp_path, photograph):
    write_photograph("psf.png", Photograph(torch.ones(1, 3, 5), None, np.dtype("uint8")))
    for number, given in enumerate((("--psf", "psf.png"), ("--motion", "4,-30"), ("--defocus", "1.5"))):
        result = CliRunner().invoke(app, ["restore", photograph, *given, "--out", f"{number}.png"])
        assert result.exit_code == 0, result.output
    for given, message in (
        ((), "the blur is given by nothing; it takes one of sigma, psf, motion, defocus"),
        (("--sigma", "1", "--psf", "psf.png"), "the blur is given by sigma and psf"),
        (("--sigma", "1,2,3"), "--sigma is 1,2,3; it takes a number of pixels, two of them, down and across, or auto"),
        (("--sigma", "much"), "--sigma is much"),
        (("--motion", "9"), "--motion is 9; it takes a length in pixels and an angle in degrees"),
        (("--psf", "none.png"), "none.png"),
        (("--defocus", "-1"), "radius is -1"),
        (("--sigma", "1", "--report", "x.png"), "--report is x.png; it takes a name that ends in .json"),
        (("--sigma", "1", "--light", "red"), "light is 'red'"),
        (("--sigma", "1", "--device", "foo"), "--device is foo; it takes cpu or cuda"),
    ):
        result = CliRunner().invoke(app, ["restore", photograph, *given])
        assert result.exit_code == 1 and message in result.stderr, result.output


def test_an_interrupted_folder_is_gone_on_with(tmp_path, photograph):
    """What is there stays as it is, also in the report; what is missing, or failed, is restored."""
    (tmp_path / "trip").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "trip" / f"{name}.png").write_bytes((tmp_path / photograph).read_bytes())
    (tmp_path / "trip" / "d.png").write_bytes(b"")
    options = ("trip", "--out", "out", "--report", "r.json", "--skip-existing")
    assert restore("trip/a.png", "--out", "out").exit_code == 0
    result = restore(*options)
    assert result.exit_code == 1 and "1 of 4 photographs are restored already." in result.stdout
    before = contents(tmp_path / "out")
    first = json.loads((tmp_path / "r.json").read_text())
    assert first[0] == {"photograph": "trip/a.png", "kept": ["out/a-restored.png"]} and "error" in first[3]
    os.unlink("out/b-restored.png")
    (tmp_path / "trip" / "d.png").write_bytes((tmp_path / photograph).read_bytes())
    old = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    result = restore(*options)
    assert result.exit_code == 0 and "2 of 4 photographs are restored already." in result.stdout
    after = contents(tmp_path / "out")
    assert after == before | {"b-restored.png": before["a-restored.png"], "d-restored.png": before["a-restored.png"]}
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in old.items())
    second = json.loads((tmp_path / "r.json").read_text())
    assert [row["photograph"] for row in second] == [f"trip/{name}.png" for name in "abcd"]
    assert second[0] == first[0] and second[2] == first[2] and second[3]["restored"] == "out/d-restored.png"
    assert not (tmp_path / "r.json.parts").exists()
    refused(tmp_path, "--overwrite and --skip-existing are given; restore takes one", *options, "--overwrite")


def test_files_of_an_interrupted_call_are_no_photographs(tmp_path, photograph):
    assert restore(photograph).exit_code == 0
    (tmp_path / "y.png").write_bytes((tmp_path / photograph).read_bytes())
    assert restore("x-restored.png", photograph, "y.png", "--skip-existing").exit_code == 0
    assert sorted(contents(tmp_path)) == ["x-restored.png", "x.png", "y-restored.png", "y.png"]
    refused(tmp_path, "x.png: is the photograph itself", photograph, "--out", "x.png", "--skip-existing")


def test_an_interrupted_call_leaves_its_part_of_the_report(tmp_path, photograph, monkeypatch):
    (tmp_path / "y.png").write_bytes((tmp_path / photograph).read_bytes())
    genuine = batch.read_photograph

    def interrupted(path, **limits):
        if path.name == "y.png":
            raise KeyboardInterrupt
        return genuine(path, **limits)

    monkeypatch.setattr(batch, "read_photograph", interrupted)
    options = ("x.png", "y.png", "--compare", "--report", "r.json", "--skip-existing")
    assert restore(*options).exit_code == 130
    assert not (tmp_path / "r.json").exists() and (tmp_path / "r.json.parts").is_dir()
    monkeypatch.setattr(batch, "read_photograph", genuine)
    (tmp_path / "x-compared.png").unlink()
    made = (tmp_path / "x-restored.png").stat().st_mtime_ns
    assert restore(*options).exit_code == 0
    assert (tmp_path / "x-restored.png").stat().st_mtime_ns == made  # only its picture was missing
    assert (tmp_path / "x-compared.png").exists() and not (tmp_path / "r.json.parts").exists()
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(row["photograph"], row["compared"]) for row in rows] == [
        ("x.png", "x-compared.png"),
        ("y.png", "y-compared.png"),
    ]


def test_srun_without_torchrun_is_refused(tmp_path, photograph, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    refused(tmp_path, "would restore by itself; start one for each machine: srun", photograph)
