"""Photographs as files: reading and writing them without loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_SIXTEEN_BIT_SUFFIXES = frozenset({".png", ".tif", ".tiff"})
_EIGHT_BIT = (b"\xff\xd8", b"BM", b"RIFF")  # how JPEG, BMP and WebP files begin, which hold no deeper samples
_LEAST, _MOST = -0.5, 1.5  # of float32 samples, which noise can take somewhat beyond [0, 1]
_ALPHA_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".webp"})


class ImageError(ValueError):
    """An image file that cannot be read, written, or used as it is."""


class Photograph(NamedTuple):
    """An image file's content.

    Attributes:
        pixels: (1 or 3, H, W) in float32, in [0, 1].
        alpha: (1, H, W) in [0, 1], or None.
        dtype: of the file's samples: uint8, uint16 or float32.
    """

    pixels: Tensor
    alpha: Tensor | None
    dtype: np.dtype


# What undoes each orientation that EXIF knows.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def _orientation(path: Path) -> int:
    """EXIF's orientation, 1 to 8; 1, upright, where Pillow cannot tell."""
    try:
        with Image.open(path) as image:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except OSError:
        return 1


def _pages(path: Path) -> int:
    """How many images a TIFF holds; 1 of another file, or of one that Pillow cannot read."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return 1
    try:
        with Image.open(path) as image:
            return int(getattr(image, "n_frames", 1))
    except OSError:
        return 1


def _read_array(path: Path) -> np.ndarray:
    """(H, W, channels) in RGB order: OpenCV for what Pillow would cut to 8 bits, Pillow for the rest."""
    try:
        content = np.fromfile(path, np.uint8)
        if not content.size:
            raise ImageError(f"{path}: the file is empty")
        shallow = content[:4].tobytes().startswith(_EIGHT_BIT)
        deep = None if shallow else cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
        if deep is not None and deep.dtype in (np.uint16, np.float32):
            order = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}
            if deep.ndim == 3 and deep.shape[2] not in order:
                raise ImageError(f"{path}: has {deep.shape[2]} channels; 1, 3 and 4 are known")
            deep = deep if deep.ndim == 2 else cv2.cvtColor(deep, order[deep.shape[2]])
            upright = _UPRIGHT[_orientation(path)](deep)
            return upright if upright.ndim == 3 else upright[:, :, None]
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ImageError(f"{path}: its samples are neither 8-bit, 16-bit nor float32")
            transparent = image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
            grey = image.mode in ("1", "L", "LA")
            mode = ("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB")
            array = np.asarray(ImageOps.exif_transpose(image).convert(mode))
    except (OSError, SyntaxError, Image.DecompressionBombError, cv2.error) as error:  # Pillow's of a broken PNG
        raise ImageError(f"{path}: {error}") from error
    return array if array.ndim == 3 else array[:, :, None]


def read_photograph(path: str | Path) -> Photograph:
    """Read an image file: 8-bit, 16-bit or float32, grey or colour, with or without alpha, upright.

    Raises:
        ImageError: not an image, one of several pages, a kind of sample not listed, a pixel that is not finite, or
            float32 samples far from [0, 1].
    """
    array = _read_array(Path(path))
    if (pages := _pages(Path(path))) > 1:
        raise ImageError(f"{path}: has {pages} pages; it takes one image a file")
    scale = np.iinfo(array.dtype).max if np.issubdtype(array.dtype, np.integer) else 1.0
    values = torch.from_numpy(array.astype(np.float32, order="C") / np.float32(scale)).permute(2, 0, 1)
    if not values.isfinite().all():
        raise ImageError(f"{path}: {int((~values.isfinite()).sum())} of its values are not finite")
    if scale == 1.0 and values.numel() and not (float(values.min()) >= _LEAST and float(values.max()) <= _MOST):
        raise ImageError(
            f"{path}: its float32 samples go from {float(values.min()):g} to {float(values.max()):g}; it takes [0, 1]"
        )
    colours = len(values) - (len(values) in (2, 4))
    return Photograph(values[:colours], values[colours:] if colours < len(values) else None, array.dtype)


def check_target(path: str | Path, photograph: Photograph) -> None:
    """Tell, before there is anything to write, whether `write_photograph` could.

    Raises:
        ImageError: no such directory; another format than those of images, or one that cannot hold the samples'
            depth or the alpha channel.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    _, alpha, dtype = photograph
    if not path.parent.is_dir():
        raise ImageError(f"{path}: there is no directory {path.parent}")
    if not cv2.haveImageWriter(str(path)):
        raise ImageError(f"{path}: {suffix or 'a name without a suffix'} is no format to write; .png and .tiff are")
    if dtype != np.uint8 and suffix not in _SIXTEEN_BIT_SUFFIXES:
        raise ImageError(f"{path}: {suffix} cannot hold {dtype} samples; .png and .tiff can")
    if dtype == np.float32 and suffix == ".png":
        raise ImageError(f"{path}: .png cannot hold float32 samples; .tiff can")
    if alpha is not None and suffix not in _ALPHA_SUFFIXES:
        raise ImageError(f"{path}: {suffix} cannot hold an alpha channel; .png and .tiff can")


def write_photograph(path: str | Path, photograph: Photograph) -> None:
    """Write an image file of the photograph's own sample type; values outside [0, 1] are clipped.

    Raises:
        ImageError: as `check_target`, or a failed write.
    """
    check_target(path, photograph)
    pixels, alpha, dtype = photograph
    if alpha is not None and len(pixels) == 1:
        pixels = pixels.expand(3, -1, -1)
    values = pixels if alpha is None else torch.cat((pixels, alpha))
    array = values.clamp(0, 1).permute(1, 2, 0).numpy()
    if np.issubdtype(dtype, np.integer):
        array = np.rint(array * np.iinfo(dtype).max)
    array = np.ascontiguousarray(array.astype(dtype))
    order = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    if array.shape[2] in order:
        array = cv2.cvtColor(array, order[array.shape[2]])
    try:
        written = cv2.imwrite(str(path), array)
    except cv2.error as error:
        raise ImageError(f"{path}: {error}") from error
    if not written:
        raise ImageError(f"{path}: could not be written")


def image_files(directory: str | Path) -> list[Path]:
    """The image files below a directory, sorted by name.

    Raises:
        ImageError: no such directory, or no image in it.
    """
    files = sorted(p for p in Path(directory).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ImageError(f"{directory}: no image files there")
    return files
