"""The examples run, say what they should and warn of nothing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jfbfast import UniversalDEGrad
from jfbfast.imaging.estimation import estimator
from jfbfast.imaging.photographs import Photograph, write_photograph

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    "name, words",
    [("train.py", ["step 2:", "dB restored"]), ("any_network.py", ["step 2:", "accuracy"])],
)
def test_example(name, words, one_thread):
    ran = subprocess.run([sys.executable, EXAMPLES / name, "2"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(word in ran.stdout for word in words)


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


def test_the_universal_networks_script_writes_a_network(tmp_path, one_thread):
    for i in range(2):
        pixels = torch.rand(3, 170, 180, generator=torch.Generator().manual_seed(i))
        write_photograph(tmp_path / f"{i}.png", Photograph(pixels, None, np.dtype("uint8")))
    command = [
        sys.executable,
        EXAMPLES / "train_universal.py",
        tmp_path,
        tmp_path / "own.safetensors",
        "--held-out",
        "1",
    ]
    command += ["--steps", "4", "--batch", "2", "--features", "4", "8"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    model = UniversalDEGrad.from_pretrained(tmp_path / "own.safetensors", sigma=1.5, noise=0.02)
    d = torch.rand(1, 3, 20, 21)
    assert model(d).shape == (1, 3, 20 + 2 * 5, 21 + 2 * 5)  # the scene, with what lies beyond the edges


def test_readme_has_the_example_s_loop():
    """The lines of README's loop that are the library's are those of examples/train.py."""
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    block = readme.split("## A training loop")[1].split("```python\n")[1].split("```")[0]
    example = {line.strip() for line in (EXAMPLES / "train.py").read_text(encoding="utf-8").splitlines()}
    lines = [line.strip() for line in block.splitlines()]
    shared = [line for line in lines if any(word in line for word in ("jfbfast.", "loss", "optimizer"))]
    assert shared and not [line for line in shared if line not in example]
