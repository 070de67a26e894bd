"""Read and write photographs as files without loss."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.files import check_writable, write_whole
from jfbfast.imaging.formats import eight_bit, netpbm, png, tiff
from jfbfast.imaging.formats.metadata import MOST_PIXELS as MOST_PIXELS  # exported from here
from jfbfast.imaging.formats.metadata import Decoded, kept_dpi, kept_exif, orientation
from jfbfast.imaging.formats.metadata import ImageError as ImageError  # exported from here
from jfbfast.imaging.formats.metadata import Metadata as Metadata

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_DECODERS: dict[bytes, Callable[[bytes, int], Decoded]] = {  # by the first bytes of a file
    png.SIGNATURE: png.decode,
    b"\xff\xd8\xff": eight_bit.decode_jpeg,
    b"II*\0": tiff.decode,
    b"MM\0*": tiff.decode,
    b"RIFF": eight_bit.decode_webp,
    b"BM": eight_bit.decode_bmp,
    b"P5": netpbm.decode,
    b"P6": netpbm.decode,
}
_ENCODERS: dict[str, Callable[[np.ndarray, Metadata], bytes]] = {
    ".png": png.encode,
    ".tif": tiff.encode,
    ".tiff": tiff.encode,
    ".jpg": eight_bit.encode_jpeg,
    ".jpeg": eight_bit.encode_jpeg,
}
LEAST, MOST = -0.5, 1.5  # float32 samples; noise can take them somewhat beyond [0, 1]
_LONGEST_JPEG = 65_500  # pixels of a side


class Photograph(NamedTuple):
    """The content of an image file.

    Attributes:
        pixels: (1 or 3, H, W) in float32, in [0, 1].
        alpha: (1, H, W) in [0, 1], or None.
        dtype: of the file's samples: uint8, uint16 or float32.
        metadata: the metadata that a restored photograph keeps.
    """

    pixels: Tensor
    alpha: Tensor | None
    dtype: np.dtype
    metadata: Metadata = Metadata()


def _decode(content: bytes, most_pixels: int) -> Decoded:
    if not content:
        raise ImageError("the file is empty")
    decoder = next((decoder for start, decoder in _DECODERS.items() if content.startswith(start)), None)
    if decoder is None:
        raise ImageError(f"begins with {content[:12]!r}; it takes JPEG, PNG, TIFF, WebP, BMP, and binary PGM and PPM")
    return decoder(content, most_pixels)


def _photograph(decoded: Decoded) -> Photograph:
    turn, array = orientation(decoded.exif), decoded.array
    dpi = kept_dpi(decoded.dpi, decoded.exif)
    if turn >= 5:
        array, dpi = array.swapaxes(0, 1), None if dpi is None else dpi[::-1]
    if turn in (3, 4, 7, 8):
        array = array[::-1]
    if turn in (2, 3, 6, 7):
        array = array[:, ::-1]
    values = torch.from_numpy(array.astype(np.float32, order="C") / np.float32(decoded.white)).permute(2, 0, 1)
    if not values.isfinite().all():
        raise ImageError(f"{int((~values.isfinite()).sum())} of its values are not finite")
    least, most = float(values.min()), float(values.max())
    if not LEAST <= least <= most <= MOST:
        raise ImageError(f"its float32 samples go from {least:g} to {most:g}; it takes [0, 1]")
    exif = kept_exif(decoded.exif, values.shape[2], values.shape[1], dpi)
    colours = len(values) - (len(values) in (2, 4))
    return Photograph(
        values[:colours],
        values[colours:] if colours < len(values) else None,
        decoded.array.dtype,
        Metadata(decoded.icc, exif, dpi, decoded.colour),
    )


def read_photograph(path: str | Path, *, most_pixels: int = MOST_PIXELS) -> Photograph:
    """Read an image file: 8-bit, 16-bit or float32, grey or colour, with or without alpha; turned upright.

    It reads JPEG, PNG, TIFF, WebP, BMP, and binary PGM and PPM, whatever the file's name. It refuses files that it
    would misread, such as CMYK or several images in one file.

    Args:
        path: of the file.
        most_pixels: a larger image is refused before it is decoded.

    Raises:
        ImageError: not such an image, a damaged one, one of more than ``most_pixels``, a pixel that is not finite, or
            float32 samples far from [0, 1].

    Example:
        >>> import os, tempfile, numpy, torch
        >>> from jfbfast.imaging.photographs import Photograph, read_photograph, write_photograph
        >>> path = os.path.join(tempfile.mkdtemp(), "deep.png")
        >>> write_photograph(path, Photograph(torch.full((3, 4, 5), 0.6), None, numpy.dtype("uint16")))
        >>> found = read_photograph(path)
        >>> found.pixels.shape, found.dtype, round(float(found.pixels.mean()), 4)
        (torch.Size([3, 4, 5]), dtype('uint16'), 0.6)
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ImageError("there is no such file")
        if not path.is_file():
            raise ImageError("is a directory" if path.is_dir() else "is no regular file")
        return _photograph(_decode(path.read_bytes(), most_pixels))
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except struct.error as error:
        raise ImageError(f"{path}: ends too early, or is damaged") from error
    except Exception as error:  # a broken file makes a decoder raise nearly anything
        raise ImageError(f"{path}: cannot be read ({checks.one_line(error)})") from error


def check_place(path: str | Path) -> None:
    """Check that `write_photograph` could write some photograph there.

    Raises:
        ImageError: the suffix is of a format that is not written, or the directory is missing or not writable.
    """
    path = Path(path)
    if path.suffix.lower() not in _ENCODERS:
        suffix = path.suffix or "a name without a suffix"
        raise ImageError(f"{path}: {suffix} is no format to write; .png, .tiff and .jpg are")
    if not path.parent.is_dir():
        raise ImageError(f"{path}: there is no directory {path.parent}")
    try:
        check_writable(path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({error.strerror or error})") from error


def check_unused(path: Path, sources: Collection[Path], overwrite: bool = False) -> None:
    """Check that a file can be written without the loss of another.

    Args:
        path: the file.
        sources: the photographs that are to be read.
        overwrite: replace an existing file.

    Raises:
        ImageError: the file is one of the photographs or a link to one, or it exists and is not to be overwritten.
    """
    if path.exists() and any(path.samefile(source) for source in sources):
        raise ImageError(f"{path}: is the photograph itself, or another to restore; choose another file")
    if os.path.lexists(path) and not overwrite:
        raise ImageError(f"{path}: is there already; --overwrite replaces it")


def check_target(path: str | Path, photograph: Photograph) -> None:
    """Check that `write_photograph` could write this photograph, before there is anything to write.

    Raises:
        ImageError: as `check_place`; or the format cannot hold the samples' depth, the alpha channel, or the metadata.
    """
    check_place(path)
    path, suffix = Path(path), Path(path).suffix.lower()
    pixels, alpha, dtype, metadata = photograph
    jpeg, longest = suffix in (".jpg", ".jpeg"), max(pixels.shape[1:])
    colours = metadata.colour.keys() - {b"sRGB"} if suffix != ".png" else ()  # without sRGB, readers assume it
    for refused, what in (
        (jpeg and dtype != np.uint8, f"{dtype} samples; .png and .tiff can"),
        (suffix == ".png" and dtype == np.float32, "float32 samples; .tiff can"),
        (jpeg and alpha is not None, "an alpha channel; .png and .tiff can"),
        (jpeg and longest > _LONGEST_JPEG, f"a side of {longest} pixels; .png and .tiff can"),
        (colours, f"the definition of its colours ({b', '.join(sorted(colours)).decode()}); .png can"),
    ):
        if refused:
            raise ImageError(f"{path}: {suffix} cannot hold {what}")
    if suffix in (".tif", ".tiff") and alpha is not None and len(pixels) == 1 and metadata.icc:
        raise ImageError(f"{path}: grey with alpha becomes colour, which its profile is not for; .png can hold it")
    corner = Photograph(pixels[:, :1, :1], None if alpha is None else alpha[:, :1, :1], dtype, metadata)
    _encode(path, corner)  # raises if the metadata cannot be written


def _encode(path: Path, photograph: Photograph) -> bytes:
    pixels, alpha, dtype, metadata = photograph
    suffix = path.suffix.lower()
    if alpha is not None and len(pixels) == 1 and suffix != ".png":
        pixels = pixels.expand(3, -1, -1)
    values = pixels if alpha is None else torch.cat((pixels, alpha))
    array = values.clamp(0, 1).permute(1, 2, 0).numpy()
    if np.issubdtype(dtype, np.integer):
        array = np.rint(array * np.iinfo(dtype).max)
    try:
        return _ENCODERS[suffix](np.ascontiguousarray(array.astype(dtype)), metadata)
    except Exception as error:  # an encoder raises nearly anything for metadata that it cannot hold
        raise ImageError(f"{path}: cannot be written ({checks.one_line(error)})") from error


def write_photograph(path: str | Path, photograph: Photograph, *, overwrite: bool = True) -> None:
    """Write an image file with the photograph's sample type and metadata; values outside [0, 1] are clipped.

    A reader sees the old file or the whole new one. See `read_photograph` for an example.

    Raises:
        ImageError: as `check_target`, or a failed write; without ``overwrite``, an existing file.
    """
    check_target(path, photograph)
    path = Path(path)
    content = _encode(path, photograph)
    try:
        write_whole(path, lambda partial: partial.write_bytes(content), overwrite=overwrite)
    except FileExistsError as error:
        raise ImageError(f"{path}: is there already; --overwrite replaces it") from error
    except OSError as error:
        raise ImageError(f"{path}: could not be written ({error.strerror or error})") from error


def image_files(directory: str | Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> list[Path]:
    """List the image files below a directory, recognised by their suffixes, sorted by name.

    Raises:
        ImageError: no such directory, or no image in it.
    """
    files = sorted(p for p in Path(directory).rglob("*") if p.suffix.lower() in suffixes and not os.path.isdir(p))
    if not files:
        raise ImageError(f"{directory}: no image files there")
    return files
