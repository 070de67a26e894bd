"""The readers that are fuzzed: each takes a file's content, and returns a valid object or raises its documented error.

Any other exception, a hang, a file written outside of the reader's folder, a new process or a connection is a finding.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fuzz import seeds
from jfbfast import point_spread
from jfbfast.experiments.callbacks import _read_rows
from jfbfast.experiments.run_files import CheckpointFiles
from jfbfast.experiments.settings import read_photographs, read_run_settings
from jfbfast.imaging import images
from jfbfast.imaging.formats import eight_bit, metadata, netpbm, png, tiff
from jfbfast.imaging.photographs import LEAST, MOST, ImageError, read_photograph, write_photograph
from jfbfast.models.checkpoint import CheckpointError, load_checkpoint
from jfbfast.models.directory import load_directory, read_settings

MOST_PIXELS = 1_000_000  # of an image here, so that a small file cannot ask for gigabytes and be right
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


INPUT = "input"  # the file with the content that is being read, for whoever finds a crash


class Reader(NamedTuple):
    """A reader with its seeds and its documented error."""

    read: Callable[[Path, bytes], object]
    seeds: Callable[[], list[bytes]]
    error: type[Exception]


class Finding(AssertionError):
    """A reader broke its promise."""


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _image(folder: Path, content: bytes) -> None:
    if content.startswith(b"\x93NUMPY") or content[:4] in (b"II*\0", b"MM\0*"):
        suffix = ".npy" if content.startswith(b"\x93NUMPY") else ".tif"
        try:
            pixels = images.read_image(_file(folder, f"image{suffix}", content))
        except ImageError as error:
            _check_sentence(error)
        else:
            assert pixels.dim() == 3 and pixels.dtype in (torch.uint8, torch.float32), (pixels.shape, pixels.dtype)
            assert pixels.isfinite().all()
    found = read_photograph(_file(folder, "image", content))
    colours, height, width = found.pixels.shape
    assert colours in (1, 3) and height * width > 0, found.pixels.shape
    assert found.alpha is None or found.alpha.shape == (1, height, width)
    assert LEAST <= float(found.pixels.min()) <= float(found.pixels.max()) <= MOST
    target = folder / ("written.tif" if found.dtype == np.float32 else "written.png")
    write_photograph(target, found)
    again = read_photograph(target)
    if found.dtype != np.float32:  # samples with another maximum, as a PGM has, are rounded
        assert (again.pixels - found.pixels).abs().max() <= 0.5001 / np.iinfo(found.dtype).max
        assert again.dtype == found.dtype
    assert again.metadata.icc == found.metadata.icc, "the colour profile is lost"


def _point_spread(folder: Path, content: bytes) -> None:
    suffix = ".png" if content.startswith(b"\x89PNG") else ".npy" if content.startswith(b"\x93NUMPY") else ".tif"
    found = point_spread.read(_file(folder, f"psf{suffix}", content))
    assert found.dtype == torch.float64 and found.dim() == 2 and all(side % 2 for side in found.shape)
    assert float(found.min()) >= 0 and math.isclose(float(found.sum()), 1, rel_tol=1e-9)


def _checkpoint(folder: Path, content: bytes) -> None:
    model, config = load_checkpoint(_file(folder, "model.safetensors", content))
    assert not model.training and isinstance(config.channels, int)
    config.blur()
    assert config.least_side >= 1


@functools.cache
def _weights() -> list[bytes]:
    found = []
    for model in seeds.models():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found.append(Path(folder, "model.safetensors").read_bytes())
    return found


def _directory(folder: Path, content: bytes) -> None:
    weights = _weights()
    _file(folder, "model.safetensors", weights[content[0] % len(weights) if content else 0])
    _file(folder, "config.json", content[1:])
    try:
        read_settings(folder).blur()
    except CheckpointError as error:
        _check_sentence(error)
    model = load_directory(folder, nn.Module, {})
    assert isinstance(model, nn.Module) and not model.training


def _settings(folder: Path, content: bytes) -> None:
    settings = read_run_settings(_file(folder, "config.yaml", content))
    config = settings.resolved().model_config()
    with torch.device("meta"):
        assert isinstance(config.model(), nn.Module)


def _run_checkpoint(folder: Path, content: bytes) -> None:
    step = CheckpointFiles("training", {}).step(_file(folder, "training.ckpt", content), nn.Linear(2, 1), 5)
    assert 0 <= step <= 5


def _run_text(folder: Path, content: bytes) -> None:
    try:
        assert all(isinstance(row, dict) for row in _read_rows(_file(folder, "metrics.csv", content)))
    except ValueError as error:
        _check_sentence(error)
    assert read_photographs(_file(folder, "photographs.json", content)).keys() == {"training", "validation"}


READERS = {
    "image": Reader(_image, seeds.images, ImageError),
    "psf": Reader(_point_spread, seeds.point_spreads, ValueError),
    "checkpoint": Reader(_checkpoint, seeds.checkpoints, CheckpointError),
    "directory": Reader(_directory, seeds.directories, CheckpointError),
    "settings": Reader(_settings, seeds.settings, ValueError),
    "run": Reader(_run_checkpoint, seeds.run_checkpoints, CheckpointError),
    "text": Reader(_run_text, seeds.run_texts, ValueError),
}


def _check_sentence(error: Exception) -> None:
    told = str(error)
    if not told or "\n" in told or len(told) > 1000:
        raise Finding(f"the error is not one sentence: {told[:2000]!r}") from error


_watched: list[Path] = []  # the folder of the reader that reads now


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: raise for a change outside of the reader's folder, a new process or a connection."""
    if not _watched:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event in _CHANGES) and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = Path(os.fsdecode(arguments[0])).resolve()
        if not path.is_relative_to(_watched[0]) and path != Path(os.devnull):
            raise Finding(f"{event} of {path}")
    if event in _FORBIDDEN:
        raise Finding(f"{event} {arguments}")


@functools.cache  # hooks stay until the process ends
def _add_hook() -> None:
    sys.addaudithook(_watch)


def limit_pixels() -> None:
    """From now on, in this process, images of more than `MOST_PIXELS` are refused."""

    def limited(width: int, height: int, *most: int) -> None:
        metadata.check_size(width, height)
        if width * height > MOST_PIXELS:
            raise ImageError(f"has {width} × {height} pixels")

    for module in (eight_bit, images, netpbm, png, tiff):
        module.check_size = limited  # type: ignore[attr-defined]


class Harness:
    """Feeds contents to one reader, in a folder of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.reader, self.folder = name, READERS[name], folder.resolve()
        _weights()  # in advance, outside of the folder
        _add_hook()

    def read(self, content: bytes) -> bool:
        """Whether the reader accepts the content; raises for a finding."""
        (self.folder / INPUT).write_bytes(content)
        _watched.append(self.folder)
        try:
            self.reader.read(self.folder, content)
        except self.reader.error as error:
            _check_sentence(error)
            return False
        finally:
            _watched.clear()
        return True
