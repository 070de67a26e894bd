"""Every reader on its seeds, on changed ones, and on what fuzzing has found. `run.py` does it for longer."""

import io
import json
import random
import struct
import zipfile
import zlib

import pytest

from fuzz import mutations, seeds
from fuzz.readers import READERS, Harness
from helpers import photographs
from jfbfast.imaging.images import read_image
from jfbfast.imaging.photographs import ImageError, read_photograph

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def harness(request, tmp_path):
    return Harness(request.param, tmp_path)


@pytest.mark.parametrize("harness", READERS, indirect=True)
def test_a_reader_accepts_most_of_its_seeds_and_keeps_its_promise_of_changed_ones(harness):
    seeds, rng = harness.reader.seeds(), random.Random(zlib.crc32(harness.name.encode()))
    accepted = sum(harness.read(seed) for seed in seeds)
    assert accepted >= 0.5 * len(seeds)
    refused = sum(not harness.read(mutations.change(harness.name, rng.choice(seeds), rng)) for _ in range(30))
    assert refused > 5


@pytest.mark.parametrize("blur", [1, "x", [], {"kind": 1}])
def test_a_model_whose_blur_is_none_is_refused_by_the_command_line(blur, tmp_path):
    changed = json.loads(seeds.directories()[0][1:])
    changed["model"]["blur"] = blur
    assert not Harness("directory", tmp_path).read(b"\0" + json.dumps(changed).encode())


def test_a_small_tiff_with_thousands_of_channels_is_refused_before_it_is_decoded(tmp_path):
    many = photographs.tiff(
        photographs.samples("uint8", 50_000, (1, 1)), planarconfig="contig", photometric="minisblack"
    )
    for tag in (256, 257):  # width and height
        place = many.index(struct.pack("<HHL", tag, 4 if struct.pack("<HH", tag, 4) in many else 3, 1)) + 8
        many = many[:place] + struct.pack("<L", 15_000) + many[place + 4 :]
    (tmp_path / "many.tif").write_bytes(many)
    with pytest.raises(ValueError, match="samples in its 50000 channels; it takes 1000000000"):
        read_image(tmp_path / "many.tif")


def test_the_channels_of_a_tiff_count_against_a_smaller_limit_too(tmp_path):
    many = photographs.samples("uint8", 50, (10, 10))
    (tmp_path / "many.tif").write_bytes(photographs.tiff(many, planarconfig="contig", photometric="minisblack"))
    with pytest.raises(ImageError, match="has 5000 samples in its 50 channels; it takes 4000"):
        read_photograph(tmp_path / "many.tif", most_pixels=1000)


def test_a_compressed_checkpoint_of_a_run_is_refused_before_it_is_expanded(tmp_path):
    (whole,) = seeds.run_checkpoints()
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    harness = Harness("run", tmp_path)
    assert harness.read(whole) and not harness.read(out.getvalue())
