"""Every reader on its seeds, on changed ones, and on what fuzzing has found. `run.py` does it for longer."""

import random
import zlib

import pytest

from fuzz import mutations
from fuzz.readers import READERS, Harness

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def harness(request, tmp_path, monkeypatch):
    return Harness(request.param, tmp_path)


@pytest.mark.parametrize("harness", READERS, indirect=True)
def test_a_reader_accepts_most_of_its_seeds_and_keeps_its_promise_of_changed_ones(harness):
    seeds, rng = harness.reader.seeds(), random.Random(zlib.crc32(harness.name.encode()))
    accepted = sum(harness.read(seed) for seed in seeds)
    assert accepted >= 0.5 * len(seeds)
    refused = sum(not harness.read(mutations.change(harness.name, rng.choice(seeds), rng)) for _ in range(30))
    assert refused > 5
