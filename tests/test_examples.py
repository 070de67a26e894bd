"""The examples run, say what they should and warn of nothing."""

import ast
import csv
import importlib.util
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jfbfast import PlugAndPlay, UniversalDEGrad
from jfbfast.imaging.estimation import estimator
from jfbfast.imaging.photographs import Photograph, read_photograph, write_photograph

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    "name, words",
    [
        ("train.py", ["step 2:", "dB restored"]),
        ("any_network.py", ["step 2:", "accuracy"]),
        ("multiscale.py", ["step 2:", "accuracy"]),
    ],
)
def test_example(name, words, one_thread):
    ran = subprocess.run([sys.executable, EXAMPLES / name, "2"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(word in ran.stdout for word in words)


@pytest.mark.parametrize("name", ["deepinv_training.py", "deepinv_equivariant.py"])
def test_a_deepinv_script_has_at_most_25_lines_and_trains(name, one_thread):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 25
    ran = subprocess.run([sys.executable, EXAMPLES / name, "2"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    found = ast.literal_eval(ran.stdout.splitlines()[-1])
    assert found["PSNR"] > found["PSNR no learning"]


@pytest.mark.slow
def test_the_comparison_on_deepinvs_operators_prints_its_table(tmp_path, one_thread):
    for i in range(4):
        pixels = torch.rand(3, 20, 22, generator=torch.Generator().manual_seed(i)).repeat_interleave(10, 1)
        write_photograph(tmp_path / f"{i}.jpg", Photograph(pixels.repeat_interleave(10, 2), None, np.dtype("uint8")))
    script = EXAMPLES.parent / "docs" / "deepinv_operators.py"
    command = [sys.executable, script, tmp_path, "--seconds", "0.1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout.splitlines()) == 2 + 3 + 12


def test_the_estimator_is_trained_and_measured_on_a_directory(tmp_path, one_thread):
    for i in range(3):
        blocks = torch.rand(3, 20, 20).repeat_interleave(8, 1).repeat_interleave(8, 2)
        write_photograph(tmp_path / f"{i}.png", Photograph(blocks, None, np.dtype("uint8")))
    command = [sys.executable, EXAMPLES / "train_estimator.py", tmp_path, "--samples", "4", "--held-out", "1"]
    ran = subprocess.run([*command, "--out", tmp_path / "own.npz"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("| all |") == 2
    with np.load(tmp_path / "own.npz") as own:
        assert {name: own[name].shape for name in own} == {name: tuple(v.shape) for name, v in estimator().items()}


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
def test_the_universal_network_is_trained_resumed_and_trained_further(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.syspath_prepend(EXAMPLES)
    script = importlib.import_module("train_universal")
    for i in range(2):
        pixels = torch.rand(3, 170, 180, generator=torch.Generator().manual_seed(i))
        write_photograph(tmp_path / f"{i}.png", Photograph(pixels, None, np.dtype("uint8")))

    def train(name, *words):
        common = [str(tmp_path), str(tmp_path / name), "--held-out", "1", "--batch", "2", "--device", "cpu", *words]
        script.main(script.options().parse_args(common))
        return UniversalDEGrad.from_pretrained(tmp_path / name, sigma=1.5, noise=0.02)

    words = ["--steps", "5", "--features", "4", "8"]  # the steps 3 and 4 are for any point spread function
    model = train("whole", *words)
    train("parts", *words, "--stop-after", "1e-6")
    assert "20% of the training; go on with --resume" in capsys.readouterr().out
    resumed = train("parts", *words, "--resume").state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in model.state_dict().items())
    assert model(torch.rand(1, 3, 20, 21)).shape == (1, 3, 20 + 2 * 5, 21 + 2 * 5)  # with what lies beyond the edges
    train("further", "--init", str(tmp_path / "whole"), "--steps", "1", "--bfloat16")
    with pytest.raises(ValueError, match="--features or --gradient is given; with --init"):
        train("further", "--init", str(tmp_path / "whole"), "--features", "4")


def test_the_denoisers_script_writes_a_network(tmp_path, one_thread):
    for i in range(2):
        blocks = torch.rand(3, 9, 10, generator=torch.Generator().manual_seed(i))
        blocks = blocks.repeat_interleave(20, 1).repeat_interleave(20, 2)
        write_photograph(tmp_path / f"{i}.png", Photograph(blocks, None, np.dtype("uint8")))
    out = tmp_path / "own.safetensors"
    command = [sys.executable, EXAMPLES / "train_denoiser.py", tmp_path, out, "--held-out", "1"]
    command += ["--minutes", "0.01", "--batch", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "dB less noise" in ran.stdout
    model = PlugAndPlay.from_pretrained(out)
    assert model(torch.rand(1, 3, 20, 21)).shape == (1, 3, 20 + 2 * 2, 21 + 2 * 2)  # the scene, blurred by 5 × 5


def test_readme_has_the_example_s_loop():
    """The lines of README's loop that are the library's are those of examples/train.py."""
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    block = readme.split("## Train a network")[1].split("```python\n")[1].split("```")[0]
    example = {line.strip() for line in (EXAMPLES / "train.py").read_text(encoding="utf-8").splitlines()}
    lines = [line.strip() for line in block.splitlines()]
    shared = [line for line in lines if any(word in line for word in ("jfbfast.", "loss", "optimizer"))]
    assert shared and not [line for line in shared if line not in example]


spec = importlib.util.spec_from_file_location("gather_photographs", EXAMPLES / "gather_photographs.py")
gather_photographs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gather_photographs)


def resource(contents, version=3):
    """One of Qt's resource files, with a directory "pictures" of `contents`: name, flags, bytes as they are stored."""
    names, nodes, data = b"", [(0, 2, 1, 1)], b""
    for name, flags, stored in [("pictures", 2, b""), *contents]:
        place = (len(contents), 2) if flags & 2 else (0, len(data))
        nodes.append((len(names), flags, *place))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        data += b"" if flags & 2 else struct.pack(">I", len(stored)) + stored
    tree = b"".join(struct.pack(">IHII", *node) + bytes(0 if version == 1 else 8) for node in nodes)
    return b"qres" + struct.pack(">4I", version, 20, 20 + len(tree), 20 + len(tree) + len(data)) + tree + data + names


def webp(width, height):
    file = io.BytesIO()
    Image.effect_noise((width, height), 40).convert("RGB").save(file, "WEBP", quality=50)
    return file.getvalue()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_a_resource_file_are_found_by_its_own_lengths(version):
    text = b"RIFF____WEBP is said here, but no image begins"
    compressed = struct.pack(">I", len(text)) + zlib.compress(text)
    made = resource([("b.webp", 0, b"RIFF second"), ("README", 1, compressed), ("a.webp", 0, b"")], version)
    files = gather_photographs.resource_files(made)
    assert files == [("/pictures/b.webp", b"RIFF second"), ("/pictures/README", text), ("/pictures/a.webp", b"")]


def test_resource_files_that_are_cut_short_or_of_another_kind_are_refused():
    short = resource([("a.webp", 0, b"RIFF")]).replace(b"\x04RIFF", b"\x63RIFF")  # 99 bytes are said to follow
    with pytest.raises(ValueError, match=r"/pictures/a\.webp is cut short"):
        gather_photographs.resource_files(short)
    with pytest.raises(ValueError, match="compressed by Zstandard"):
        gather_photographs.resource_files(resource([("a.webp", 4, b"RIFF")]))
    with pytest.raises(ValueError, match="begins with b'RIFF'; a resource file of Qt"):
        gather_photographs.resource_files(b"RIFF" + bytes(40))


def test_photographs_are_gathered_from_unpacked_packages(tmp_path):
    packages, out = tmp_path / "packages", tmp_path / "out"
    out.mkdir()
    for package in gather_photographs.PACKAGES:
        licence = packages / package / f"usr/share/doc/{package}/copyright"
        licence.parent.mkdir(parents=True)
        licence.write_text(f"the licence of {package}")
    for package, (path, names) in gather_photographs.WALLPAPERS.items():
        for name in names.split():
            file = packages / package / path.format(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2400, 9) if name == "Grey" else (9, 8), 99).save(file)
    folder = packages / "gcompris-qt-data/usr/share/gcompris-qt/rcc"
    folder.mkdir(parents=True)
    pictures = [("small.webp", 0, webp(30, 10)), ("README", 0, b"authors"), ("large.webp", 0, webp(1502, 15))]
    for name in gather_photographs.RESOURCES.values():
        (folder / f"{name}.rcc").write_bytes(resource([*pictures, ("drawing.svg", 0, b"<svg/>")]))

    assert gather_photographs.write_all(packages, out) == 2 * 5 + 36
    sizes = {"gcompris-erase-001": (22, 8), "gcompris-erase-002": (901, 9), "mate-backgrounds-wood": (9, 8)}
    for name, size in (sizes | {"plasma-workspace-wallpapers-grey": (1600, 6)}).items():
        with Image.open(out / f"{name}.jpg") as image:
            assert (image.size, image.mode) == (size, "RGB")
            assert [component[1:3] for component in image.layer] == [(1, 1)] * 3  # 4:4:4
    assert (out / "licences/mate-backgrounds.copyright").read_text() == "the licence of mate-backgrounds"
    assert (out / "licences/gcompris-monuments.README").read_bytes() == b"authors"
    readme = (out / "README.md").read_text()
    assert "| gcompris-erase-002.jpg | gcompris-qt-data, erase.rcc: /pictures/large.webp |" in readme
    assert "| mate-backgrounds | 1.26.0-1 | 12 | GPL 2 or later |" in readme


def test_gathering_says_in_a_sentence_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(SystemExit, match="full, which has files in it; it takes a new or an empty folder"):
        gather_photographs.main([str(tmp_path / "full")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"apt-get is missing; this takes Debian 12"):
        gather_photographs.main([str(tmp_path / "new")])
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho \"E: Version '3.1-2' was not found\" >&2; exit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    with pytest.raises(
        SystemExit, match=r"gcompris-qt-data 3\.1-2 could not be downloaded .*\nE: Version '3\.1-2' was"
    ):
        gather_photographs.main([str(tmp_path / "new")])


def test_the_table_of_the_fixed_point_is_made_from_a_directory(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("fixed_point", EXAMPLES.parent / "docs" / "fixed_point.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fixed_point", script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "SIDE", 32)
    monkeypatch.setattr(script, "COUNTS", (1, 2))
    monkeypatch.setattr(script, "SETTINGS", (script.SETTINGS[1], script.SETTINGS[5], script.SETTINGS[9]))
    monkeypatch.setattr(script, "CURVES", (script.SETTINGS[0].name, script.SETTINGS[1].name))
    for i in range(2):
        blocks = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)).repeat_interleave(4, 1)
        pixels = blocks.repeat_interleave(4, 2)
        write_photograph(tmp_path / f"{i}.png", Photograph(pixels, None, np.dtype("uint8")))
    words = ["fixed_point.py", str(tmp_path), "--network", "fixed point=universal", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    script.main(script.arguments())
    printed = capsys.readouterr().out
    assert "| blur, noise | fixed point | Tikhonov | universal |" in printed
    assert printed.count("(+0.00 ± 0.00)") == 3  # universal against itself
    with (tmp_path / "fixed_point.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2 and all(float(row["psnr"]) > 10 for row in rows)
    assert read_photograph(tmp_path / "fixed_point.jpg").pixels.shape[0] == 3
