"""What a release states in several places is the same everywhere."""

import re
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent


def found(pattern, file):
    return re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_version_is_the_same_in_every_file_that_states_it():
    own = found(r'^version = "(\d+\.\d+\.\d+)"$', "pyproject.toml")[1]
    assert found(r"^version: (.*)$", "CITATION.cff")[1] == own
    assert found(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", "CHANGELOG.md")[1] == own
    assert version("jfbfast") == own
