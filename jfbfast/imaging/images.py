"""Images to train on, from files and from torch datasets: 1, 3 or more channels, of 8 bits or floats.

Images of 8 bits stay uint8. All others become float32 in [0, 1], which holds 16 bits without rounding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms import v2

from jfbfast import checks
from jfbfast.imaging.formats import tiff
from jfbfast.imaging.formats.metadata import ImageError, check_size
from jfbfast.imaging.photographs import IMAGE_SUFFIXES, LEAST, MOST, read_photograph

SUFFIXES = IMAGE_SUFFIXES | {".npy"}
_LUMA = 0.299, 0.587, 0.114  # of ITU-R BT.601, as Pillow's and torchvision's grey images
_WITH_ALPHA, _MODES = ("RGBA", "LA"), ("L", "RGB", "I;16", "F")  # of Pillow


def to_floats(image: Tensor) -> Tensor:
    """Convert uint8, or floats in [0, 1], to floats in [−1, 1]."""
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else 2 * image - 1


def _unit(values: Tensor, value_range: tuple[float, float] = (0, 1)) -> Tensor:
    """Convert uint16, or floats in ``value_range``, to float32 in [0, 1]; uint8 stays as it is."""
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.uint16:
        return values.float() / 65535
    if not values.is_floating_point():
        raise ImageError(f"its samples are {values.dtype}; it takes uint8, uint16 and floats")
    low, high = value_range
    if not values.isfinite().all():
        raise ImageError(f"{int((~values.isfinite()).sum())} of its values are not finite")
    unit = values.float() if (low, high) == (0, 1) else ((values.double() - low) / (high - low)).float()
    if not LEAST <= float(unit.min()) <= float(unit.max()) <= MOST:
        found = f"{float(values.min()):g} to {float(values.max()):g}"
        raise ImageError(f"its floats go from {found}; it takes a range of [{low:g}, {high:g}]")
    return unit


def _channels_first(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) as (C, H, W); C is the smaller one of the first and the last side."""
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3 or array.shape[0] == array.shape[2]:
        raise ImageError(
            f"its shape is {array.shape}; it takes (H, W), (H, W, C) or (C, H, W), where C is the smaller side"
        )
    return array if array.shape[0] < array.shape[2] else array.transpose(2, 0, 1)


def _from_array(array: np.ndarray, value_range: tuple[float, float] = (0, 1)) -> Tensor:
    dtype = array.dtype.newbyteorder("=")  # a file may have another byte order than this machine
    if dtype not in (np.uint8, np.uint16, np.float16, np.float32, np.float64):
        raise ImageError(f"its samples are {array.dtype}; it takes uint8, uint16 and floats")
    native = array.astype(dtype, order="C")  # a copy, which torch may write to
    return _unit(torch.from_numpy(native), value_range)


def _read(path: Path) -> Tensor:
    if path.suffix.lower() == ".npy":
        stored = np.load(path, mmap_mode="r", allow_pickle=False)  # reads the header alone
        if stored.size == 0:
            raise ImageError(f"its shape is {stored.shape}; it takes an image")
        array = _channels_first(stored)
        check_size(array.shape[2], array.shape[1])
        return _from_array(array)
    if path.suffix.lower() in (".tif", ".tiff"):
        channels = tiff.decode_channels(path.read_bytes())
        if channels is not None:
            return _from_array(channels.transpose(2, 0, 1))
    pixels, _, dtype, _ = read_photograph(path)
    return (pixels * 255).round().byte() if dtype == np.uint8 else pixels


def read_image(path: Path) -> Tensor:
    """Read an image file to train on: what `read_photograph` reads, without alpha, and images of more channels.

    Those are TIFFs whose extra samples are not alpha, and arrays of numpy: a ``.npy`` of (H, W), (H, W, C) or
    (C, H, W), where C is the smaller side, in uint8, uint16, or floats in [0, 1].

    Returns:
        (C, H, W): uint8, or float32 in [0, 1].

    Raises:
        ImageError: as `read_photograph`.

    Example:
        >>> import tempfile, numpy
        >>> from pathlib import Path
        >>> from jfbfast.imaging.images import read_image
        >>> file = Path(tempfile.mkdtemp()) / "bands.npy"
        >>> numpy.save(file, numpy.full((4, 20, 30), 65535, numpy.uint16))
        >>> read_image(file).shape, float(read_image(file).max())
        (torch.Size([4, 20, 30]), 1.0)
    """
    try:
        return _read(path)
    except ImageError as error:
        told = str(error)
        raise ImageError(told if told.startswith(f"{path}: ") else f"{path}: {told}") from error
    except Exception as error:  # a broken file makes a decoder raise nearly anything
        raise ImageError(f"{path}: cannot be read ({checks.one_line(error)})") from error


def _as_image(item: Any, value_range: tuple[float, float]) -> Tensor:
    """The image of an item of a dataset: a tensor, an array, a PIL image, or the first of a tuple."""
    if isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, Image.Image):
        if item.mode not in _WITH_ALPHA + _MODES:
            raise ImageError(f"its mode is {item.mode}; it takes {', '.join(_MODES)} and alpha: use convert('RGB')")
        array = np.atleast_3d(np.asarray(item)).transpose(2, 0, 1)
        return _from_array(array[:-1] if item.mode in _WITH_ALPHA else array, value_range)
    if isinstance(item, np.ndarray) and item.size:
        return _from_array(_channels_first(item), value_range)
    if not isinstance(item, Tensor) or item.dim() not in (2, 3) or not item.numel():
        found = f"a tensor of shape {tuple(item.shape)}" if isinstance(item, Tensor) else f"of type {type(item)}"
        raise ImageError(
            f"is {found}; it takes a tensor (C, H, W) or (H, W), an array, a PIL image, or a tuple that begins with one"
        )
    values = item.detach().as_subclass(Tensor).cpu()
    return _unit(values if item.dim() == 3 else values[None], value_range)


@dataclass(frozen=True)
class Preparation:
    """How an image is made fit for a network, whose number of channels decides.

    A grey image gets equal channels for a network of three, and a colour image becomes grey, by its luma
    (0.299 R + 0.587 G + 0.114 B), for a network of one. All others need the network's number.

    Attributes:
        channels: of the network.
        resize: side in pixels to resize to; None keeps the size.
        squash: resize both sides to exactly that, as the paper's code does. By default the shorter side is resized,
            and the centre square is kept.
        least: pixels of the shortest side, after resizing.
        purpose: of the images, for the message that one is too small for it.
    """

    channels: int = 3
    resize: int | None = None
    squash: bool = False
    least: int = 1
    purpose: str = ""

    def __post_init__(self) -> None:
        checks.integer("channels", self.channels, 1)
        if self.resize is not None:
            checks.integer("resize", self.resize, 1)

    def __call__(self, image: Tensor) -> Tensor:
        """Prepare an image (C, H, W); raises ImageError if it cannot be used."""
        found, wanted = len(image), self.channels
        if (found, wanted) == (1, 3):
            image = image.expand(3, -1, -1)
        elif (found, wanted) == (3, 1):
            unit = image.float() / 255 if image.dtype == torch.uint8 else image
            image = torch.einsum("c,chw->hw", unit.new_tensor(_LUMA), unit)[None]
        elif found != wanted:
            also = {1: " or 3", 3: " or 1"}.get(wanted, "")
            raise ImageError(f"has {found} channels without alpha; a network of channels={wanted} takes {wanted}{also}")
        if self.resize is not None:
            size = [self.resize, self.resize] if self.squash else [self.resize]
            image = v2.functional.resize(image, size, antialias=True)
            image = v2.functional.center_crop(image, [self.resize, self.resize])
        if min(image.shape[-2:]) < self.least:
            sides = f"{image.shape[-1]} × {image.shape[-2]}"
            raise ImageError(f"too small for {self.purpose}: {sides} pixels; it takes {self.least} a side")
        return image


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Within this context, the random numbers of torch, numpy and Python depend on ``key`` alone."""
    first, second = np.random.SeedSequence(key).generate_state(2, np.uint32).tolist()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(first)
        np.random.seed(second)
        torch.default_generator.manual_seed(first)  # torch.manual_seed would queue a call for CUDA each time
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class DatasetImages(Sequence[Tensor]):
    """The images of a torch dataset as uint8, or float32 in [0, 1], tensors (C, H, W).

    Its random transforms draw numbers that depend on a key alone, so that a run is reproducible.

    Args:
        dataset: has ``len()`` and ``[index]``. An item is an image or a tuple that begins with one: a tensor (C, H, W)
            or (H, W), an array (H, W), (H, W, C) or (C, H, W), or a PIL image; of uint8, uint16 or floats.
        value_range: the values of black and white in images of floats.
        prepare: what is done to each image.
        indices: of the images to take; None for all.

    Raises:
        ValueError: no such dataset, or an empty or reversed range.
        ImageError: when it is read, an item that is no image, or one that cannot be used; it has the item's number.

    Example:
        >>> import torch
        >>> from jfbfast.imaging.images import DatasetImages
        >>> images = DatasetImages(torch.utils.data.TensorDataset(torch.zeros(5, 3, 8, 9)), value_range=(-1, 1))
        >>> len(images), images[0].shape, float(images[0].mean())
        (5, torch.Size([3, 8, 9]), 0.5)
    """

    def __init__(
        self,
        dataset: Any,
        value_range: tuple[float, float] = (0.0, 1.0),
        prepare: Preparation | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        check_dataset("dataset", dataset)
        low, high = value_range
        if not -np.inf < low < high < np.inf:
            raise ValueError(f"value_range is {value_range}; it takes two numbers, the lesser first")
        self.dataset, self.value_range = dataset, (float(low), float(high))
        self.prepare = Preparation() if prepare is None else prepare
        self.indices = range(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, *key: int) -> Tensor:
        """An image, with random transforms by the numbers of ``key``."""
        number = self.indices[index]
        with _seeded(*key):
            item = self.dataset[number]
        try:
            return self.prepare(_as_image(item, self.value_range))
        except ImageError as error:
            raise ImageError(f"image {number} of the dataset: {error}") from error

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(index, index)


def check_dataset(name: str, dataset: Any) -> None:
    """Raise ValueError unless ``dataset`` has a length and numbered items."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}; it takes a dataset with len() and [index], for example "
            "list(itertools.islice(iterable, 1000))"
        )
