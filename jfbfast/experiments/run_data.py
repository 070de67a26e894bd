"""The images of a run: the photographs of a directory, or a torch dataset that is given in Python."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jfbfast.experiments.training_settings import TrainingSettings
from jfbfast.imaging.datasets import Photographs, least_side, split, usable_photographs
from jfbfast.imaging.images import SUFFIXES, DatasetImages, Preparation
from jfbfast.imaging.photographs import image_files
from jfbfast.models.config import ModelConfig

_DATASET = "dataset "  # begins the setting ``data`` of a run on a dataset


class RunImages(NamedTuple):
    """The images of a run, and what a resumed run compares with its own.

    Attributes:
        training, validation: the images.
        names: by "training" and "validation", the names of the photographs, or one line that describes a dataset.
    """

    training: Photographs | DatasetImages
    validation: Photographs | DatasetImages
    names: dict[str, list[str]]


def is_dataset(data: str) -> bool:
    """Whether the setting ``data`` stands for a dataset."""
    return data.startswith(_DATASET)


def _least(settings: TrainingSettings, config: ModelConfig) -> int:
    return 1 if settings.resize else max(least_side(settings.crop), config.least_side)


@dataclass(frozen=True)
class Directory:
    """The photographs below a directory."""

    data: str

    def load(self, settings: TrainingSettings, config: ModelConfig, say: Callable[[str], object]) -> RunImages:
        """Load those that can be used; ``say`` gets a sentence about each other one.

        Raises:
            ImageError: none can be used.
            ValueError: none remains to train on.
        """
        kept, held_out, _ = split(image_files(self.data, SUFFIXES), settings.train, settings.validation)
        if not kept:
            raise ValueError(f"train and validation leave no photograph of {self.data} to train on")
        usable = partial(
            usable_photographs,
            say=say,
            resize=settings.resize,
            squash=settings.squash,
            cache=int(settings.cache * 2**30),
            channels=settings.channels,
            least=_least(settings, config),
            purpose=f"crops of {settings.crop} pixels",
        )
        photographs, validation = usable(kept), usable(held_out, needed=False)
        if not photographs.cached:
            say(f"They take more than {settings.cache:g} GiB decoded, and are decoded at each use.")
        parts = (("training", photographs), ("validation", validation))
        names = {name: [file.relative_to(self.data).as_posix() for file in part.files] for name, part in parts}
        return RunImages(photographs, validation, names)


@dataclass(frozen=True)
class GivenDataset:
    """A torch dataset for training, and one for validation; None takes the first dataset's share of validation.

    Both are as in `DatasetImages`, whose ``value_range`` this is.
    """

    training: Any
    validation: Any = None
    value_range: tuple[float, float] = (0.0, 1.0)

    @property
    def data(self) -> str:
        """The setting ``data`` of the run."""
        return f"{_DATASET}{type(self.training).__name__}"

    def load(self, settings: TrainingSettings, config: ModelConfig, say: Callable[[str], object]) -> RunImages:
        """The images, of which only one of each part is read now.

        Raises:
            ImageError: the first image cannot be used.
            ValueError: none remains to train on.
        """
        prepare = Preparation(
            settings.channels,
            settings.resize,
            settings.squash,
            _least(settings, config),
            f"crops of {settings.crop} pixels",
        )
        images = partial(DatasetImages, value_range=self.value_range, prepare=prepare)
        if self.validation is None:
            count = range(len(self.training))
            kept, held_out, _ = split(count, settings.train, settings.validation)
            training, validation = images(self.training, indices=kept), images(self.training, indices=held_out)
        else:
            training, validation = images(self.training), images(self.validation)
        if not training:
            raise ValueError("train and validation leave no image of the dataset to train on")
        parts = (("training", training), ("validation", validation))
        return RunImages(training, validation, {name: [self._describe(part)] for name, part in parts})

    def _describe(self, images: DatasetImages) -> str:
        low, high = images.value_range
        told = f"{type(images.dataset).__name__}: {len(images)} images on [{low:g}, {high:g}]"
        if not images:
            return told
        first = images[0].contiguous()
        digest = hashlib.sha256(first.numpy().tobytes()).hexdigest()[:16]
        return f"{told}, the first of shape {tuple(first.shape)} and hash {digest}"


def check_same(images: RunImages, started: dict[str, list[str]], data: str, out: Path) -> None:
    """Raise ValueError unless the images are those that the run in ``out`` was started with."""
    for name, names in images.names.items():
        before = started[name]
        if names == before:
            continue
        if is_dataset(data):
            changed = f"now it is {names[0]}; at the start it was {', '.join(before[:3])}"
        else:
            new, gone = sorted({*names} - {*before}), sorted({*before} - {*names})
            parts = ((new, "new"), (gone, "missing or unusable now"))
            told = [f"{len(files)} are {what}, such as {files[0]}" for files, what in parts if files]
            changed = "; ".join(told) or "their order changed"
        kind = "images" if is_dataset(data) else "photographs"
        raise ValueError(f"data is {data}; its {kind} for {name} are not those of the run in {out}: {changed}")
