"""The data for training and evaluation: photographs in memory, and samples that depend only on a seed and an index.

Sample i of a dataset is always the same, including its noise. So the order of the data needs no saved state: a resumed
run continues at its step, and N processes can share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

from jfbfast import checks
from jfbfast.imaging.images import DatasetImages, Preparation, read_image, to_floats
from jfbfast.imaging.photographs import ImageError

_T = TypeVar("_T")
_ORDER, _CROP, _MEASUREMENT, _READ = range(4)  # independent streams of random numbers


class Sample(NamedTuple):
    """An image and the random numbers of its measurement.

    Attributes:
        x: (C, h, w) in [−1, 1].
        noise: white noise of standard deviation 1, like x.
        level: uniform in [0, 1), of shape ().
    """

    x: Tensor
    noise: Tensor
    level: Tensor


def _sample(x: Tensor, generator: np.random.Generator) -> Sample:
    noise = torch.from_numpy(generator.standard_normal(tuple(x.shape), np.float32))
    return Sample(x.contiguous(), noise, torch.tensor(generator.random(), dtype=torch.float32))


def _count(name: str, value: float, total: int) -> int:
    if not (0 <= value < math.inf) or (value >= 1 and value != int(value)):
        raise ValueError(f"{name} is {value}; it takes a share in [0, 1), or a count")
    return int(value) if value >= 1 else round(value * total)


def split(files: Sequence[_T], train: float | None, validation: float) -> tuple[list[_T], list[_T], list[_T]]:
    """Split files, or numbers of images, in their order: those for training, for validation, and the rest, for tests.

    Args:
        files: sorted by name.
        train, validation: each a share in [0, 1), or a count; ``train=None`` trains on all but the validation's.

    Raises:
        ValueError: neither a share nor a count; more than there are.
    """
    held_out = _count("validation", validation, len(files))
    kept = len(files) - held_out if train is None else _count("train", train, len(files))
    if train is not None and max(train, validation) < 1 and train + validation <= 1 + 1e-9:
        kept = min(kept, len(files) - held_out)  # both can have been rounded up
    if kept < 0 or kept + held_out > len(files):
        raise ValueError(f"train is {train} and validation {validation}, which is more than the {len(files)} there are")
    return list(files[:kept]), list(files[kept : kept + held_out]), list(files[kept + held_out :])


class Photographs(Sequence[Tensor]):
    """Image files as tensors (channels, H, W), decoded once into one block of memory if they fit.

    Files of 8 bits give uint8; others, and those that are turned grey, give float32 in [0, 1].

    Args:
        files: see `read_image`.
        resize, squash, least, purpose, channels: see `Preparation`.
        cache: the most bytes of memory; if the files need more, each is decoded again at every use.
        leave_out: called with the error of each file that cannot be used, which is left out; None raises it.

    Attributes:
        files: those that are used.
        sizes: (H, W) of each.

    Raises:
        ImageError: a file that cannot be used.

    Example:
        >>> import tempfile, numpy, torch
        >>> from pathlib import Path
        >>> from jfbfast.imaging.datasets import Photographs
        >>> from jfbfast.imaging.photographs import Photograph, write_photograph
        >>> file = Path(tempfile.mkdtemp()) / "a.png"
        >>> write_photograph(file, Photograph(torch.rand(3, 20, 30), None, numpy.dtype("uint8")))
        >>> photographs = Photographs([file], resize=16)
        >>> len(photographs), photographs[0].shape
        (1, torch.Size([3, 16, 16]))
    """

    def __init__(
        self,
        files: Sequence[Path],
        resize: int | None = None,
        squash: bool = False,
        cache: int = 2 << 30,
        *,
        channels: int = 3,
        least: int = 1,
        purpose: str = "",
        leave_out: Callable[[ImageError], object] | None = None,
    ) -> None:
        self.prepare = Preparation(channels, resize, squash, least, purpose)
        self.files: list[Path] = []
        self.sizes: list[tuple[int, int]] = []
        self._places: list[tuple[int, int, torch.dtype]] = []  # start and end in the block
        end = 0
        block = np.empty(0, np.uint8)  # one array, which worker processes share without a handle for each image
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for file, image in zip(files, pool.map(self._try, files), strict=True):
                if isinstance(image, ImageError):
                    if leave_out is None:
                        raise image
                    leave_out(image)
                    continue
                start = -(-end // 4) * 4  # where float32 can start
                end = start + image.numel() * image.element_size()
                self.files.append(file)
                self.sizes.append((image.shape[-2], image.shape[-1]))
                self._places.append((start, end, image.dtype))
                if end <= cache:
                    if end > len(block):
                        block.resize(min(cache, end + end // 4), refcheck=False)
                    block[start:end] = image.contiguous().flatten().view(torch.uint8).numpy()
        self.cached = end <= cache
        if self.cached:
            block.resize(end, refcheck=False)
            self._block = torch.from_numpy(block)

    def _read(self, file: Path) -> Tensor:
        image = read_image(file)
        try:
            return self.prepare(image)
        except ImageError as error:
            raise ImageError(f"{file}: {error}") from error

    def _try(self, file: Path) -> Tensor | ImageError:
        try:
            return self._read(file)
        except ImageError as error:
            return error

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if not self.cached:
            return self._read(self.files[index])
        start, end, dtype = self._places[index]
        return self._block[start:end].view(dtype).view(self.prepare.channels, *self.sizes[index])


def usable_photographs(
    files: Sequence[Path], say: Callable[[str], object], *, needed: bool = True, **options: Any
) -> Photographs:
    """Load the files that can be used as `Photographs`, with its options.

    Args:
        say: called with each file that is left out and why, and with their number.
        needed: require at least one usable file.

    Raises:
        ImageError: no file can be used, although one is needed.
    """
    errors: list[ImageError] = []
    photographs = Photographs(files, **options, leave_out=errors.append)
    if needed and errors and not photographs:
        raise ImageError(f"none of the {len(files)} photographs can be used, such as {errors[0]}")
    for error in errors:
        say(f"left out: {error}")
    if errors:
        say(f"{len(errors)} of {len(files)} photographs cannot be used, and are left out.")
    return photographs


def least_side(crop: int) -> int:
    """Return the shortest side of a photograph for `RandomCrops`: reflection adds less than the side at both ends."""
    return -(-(crop + 2) // 3)


class RandomCrops(Dataset[Sample]):
    """Random square crops, flipped at random, of photographs taken in a random order, each once an epoch.

    Args:
        photographs: (C, H, W) each, uint8, or floats in [0, 1].
        crop: side in pixels; photographs down to just over a third of it are padded by reflection.
        length: number of crops, over as many epochs as it takes; None for one epoch.
        flips: mirror every other crop, left to right.
        seed: of the order, the crops, and the measurements' random numbers; at least 0.

    Raises:
        ValueError: a crop below 1, a negative seed, or no photograph.
        ImageError: a photograph that is too small.

    Example:
        >>> import torch
        >>> from jfbfast.imaging.datasets import RandomCrops
        >>> crops = RandomCrops([torch.rand(3, 40, 50), torch.rand(3, 20, 90)], crop=16, length=10)
        >>> len(crops), crops[0].x.shape, crops[0].noise.shape
        (10, torch.Size([3, 16, 16]), torch.Size([3, 16, 16]))
    """

    def __init__(
        self, photographs: Sequence[Tensor], crop: int, length: int | None = None, flips: bool = True, seed: int = 0
    ) -> None:
        checks.integer("crop", crop, 1)
        checks.integer("seed", seed, 0)
        checks.integer("photographs", len(photographs), 1)
        names: Sequence[object] = [f"photograph {which}" for which in range(len(photographs))]
        sizes: list[tuple[int, int]] = []
        if isinstance(photographs, Photographs):
            names, sizes = photographs.files, photographs.sizes
        elif isinstance(photographs, DatasetImages):
            names = []  # reading all its images would take long; each is checked when it is read
        else:
            sizes = [(image.shape[-2], image.shape[-1]) for image in photographs]
        for name, size in zip(names, sizes, strict=True):
            if min(size) < least_side(crop):
                raise ImageError(f"{name}: too small for crops of {crop} pixels; resize it, or take smaller crops")
        self.photographs = photographs
        self.crop, self.flips, self.seed = crop, flips, seed
        self.length = len(photographs) if length is None else length
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.length

    def _photograph(self, index: int) -> int:
        epoch, position = divmod(index, len(self.photographs))
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, _ORDER, epoch))
            self._epoch, self._order = epoch, generator.permutation(len(self.photographs))
        return int(self._order[position])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        which, images = self._photograph(index), self.photographs
        image = images.read(which, self.seed, _READ, index) if isinstance(images, DatasetImages) else images[which]
        short = [max(0, self.crop - side) for side in image.shape[-2:]]
        if any(short):
            top, left = (s // 2 for s in short)
            around = [left, top, short[1] - left, short[0] - top]
            image = v2.functional.pad(image, around, padding_mode="reflect")
        generator = np.random.default_rng((self.seed, _CROP, index))
        top, left = (int(generator.integers(side - self.crop + 1)) for side in image.shape[-2:])
        x = to_floats(image[:, top : top + self.crop, left : left + self.crop])
        if self.flips and generator.random() < 0.5:
            x = x.flip(-1)
        return _sample(x, generator)


class Images(Dataset[Sample]):
    """Whole photographs, or their centre squares, each with the random numbers of one fixed measurement.

    Args:
        photographs: (C, H, W) each, uint8, or floats in [0, 1].
        crop: the longest side of the centre square; None for the whole.
        seed: of the measurements' random numbers, which depend only on it and on the index; at least 0.
    """

    def __init__(self, photographs: Sequence[Tensor], crop: int | None = None, seed: int = 0) -> None:
        checks.integer("seed", seed, 0)
        self.photographs = photographs
        self.crop, self.seed = crop, seed

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.photographs):
            raise IndexError(index)
        x = to_floats(self.photographs[index])
        if self.crop is not None:
            top, left = (max(0, (side - self.crop) // 2) for side in x.shape[-2:])
            x = x[:, top : top + self.crop, left : left + self.crop]
        return _sample(x, np.random.default_rng((self.seed, _MEASUREMENT, index)))


def batches(samples: Dataset[Sample], batch_size: int) -> Iterator[Sample]:
    """Yield all samples in their order, at most ``batch_size`` at once; neighbours of the same size share a batch."""
    batch: list[Sample] = []
    for index in range(len(samples)):  # type: ignore[arg-type]
        sample = samples[index]
        if batch and (len(batch) == batch_size or sample.x.shape != batch[0].x.shape):
            yield default_collate(batch)
            batch = []
        batch.append(sample)
    if batch:
        yield default_collate(batch)
