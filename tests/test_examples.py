"""The examples run, say what they should and warn of nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    "name, words",
    [("train.py", ["step 2:", "dB restored"]), ("any_network.py", ["step 2:", "accuracy"])],
)
def test_example(name, words, one_thread):
    ran = subprocess.run([sys.executable, EXAMPLES / name, "2"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(word in ran.stdout for word in words)


def test_readme_has_the_example_s_loop():
    """The lines of README's loop that are the library's are those of examples/train.py."""
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    block = readme.split("## A training loop")[1].split("```python\n")[1].split("```")[0]
    example = {line.strip() for line in (EXAMPLES / "train.py").read_text(encoding="utf-8").splitlines()}
    lines = [line.strip() for line in block.splitlines()]
    shared = [line for line in lines if any(word in line for word in ("jfbfast.", "loss", "optimizer"))]
    assert shared and not [line for line in shared if line not in example]
