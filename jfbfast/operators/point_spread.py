"""Point spread functions: the image of a point, for `Blur`.

Every function returns a float64 tensor (k_y, k_x) with odd sides and the sum 1. Its centroid is within half a pixel of
the middle. Lengths are in pixels. Angles are in degrees, counter-clockwise from the x axis as a picture is seen.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jfbfast import checks

__all__ = ["defocus", "gaussian", "motion", "read", "trajectory"]

_STEPS_PER_PIXEL = 64  # points of a straight path
_WALK = 400  # points of a random path
_ROWS_PER_PIXEL = 64  # of the quadrature of a disc
_LARGEST = 1001  # pixels of a side
_LARGEST_TILE = 2048  # of a TIFF, whose decoder makes room for a whole one


def _normalised(weights: np.ndarray) -> Tensor:
    return torch.from_numpy(weights / weights.sum())


def _angle(angle: object) -> float:
    checks.number("angle", angle, lambda _: True, "a finite number of degrees")
    return math.radians(float(angle))  # type: ignore[arg-type]


def gaussian(
    sigma: float | Sequence[float], angle: float = 0.0, kernel_size: int | Sequence[int] | None = None
) -> Tensor:
    """A Gaussian, sampled at the pixels' centres: exp(−pᵀC⁻¹p/2) with the covariance C.

    Args:
        sigma: σ > 0, or a (y, x) pair of them.
        angle: the rotation of the Gaussian with that pair.
        kernel_size: an odd number, or a (y, x) pair of them; None for 2·ceil(3 s) + 1, with the standard
            deviation s along each axis of the image.

    Raises:
        ValueError: σ that is not positive, an even kernel size, or one over 1001.

    Example:
        >>> import jfbfast
        >>> jfbfast.point_spread.gaussian((0.5, 2.0)).shape
        torch.Size([5, 13])
        >>> jfbfast.point_spread.gaussian((0.5, 2.0), angle=90).shape
        torch.Size([13, 5])
    """
    sigmas = (sigma, sigma) if not isinstance(sigma, Sequence) else tuple(sigma)
    if len(sigmas) != 2:
        raise ValueError(f"sigma is {sigma}; it takes a number or a (y, x) pair")
    for value in sigmas:
        checks.positive("sigma", value)
    across, along = (float(value) for value in sigmas)
    turn = _angle(angle)
    axes = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])  # columns, in (y, x)
    covariance = (axes * np.array([across**2, along**2])) @ axes.T
    if kernel_size is None:
        spread = np.sqrt(covariance.diagonal()).round(9)
        sizes: Any = tuple(2 * math.ceil(3 * s) + 1 for s in spread)
    else:
        sizes = kernel_size if isinstance(kernel_size, Sequence) else (kernel_size, kernel_size)
    if len(sizes) != 2 or any(not checks.is_integer(size) or size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"kernel_size is {kernel_size}; it takes an odd positive integer, or a (y, x) pair of them")
    _check_size("sigma", sigma, max(sizes))
    points = np.stack(np.meshgrid(*(np.arange(size) - size // 2 for size in sizes), indexing="ij"), axis=-1)
    return _normalised(np.exp(-0.5 * (points @ np.linalg.inv(covariance) * points).sum(-1)))


def defocus(radius: float) -> Tensor:
    """A uniform disc; a pixel on its edge counts by the share of its area that the disc covers.

    Args:
        radius: above 0; up to 0.5 the disc is a single pixel.

    Raises:
        ValueError: a radius that is not positive, or one over 500.

    Example:
        >>> import jfbfast
        >>> jfbfast.point_spread.defocus(1.0).mul(1000).round()
        tensor([[ 25., 145.,  25.],
                [145., 318., 145.],
                [ 25., 145.,  25.]], dtype=torch.float64)
    """
    checks.positive("radius", radius)
    half = max(0, math.ceil(radius - 0.5))
    _check_size("radius", radius, 2 * half + 1)
    rows = (2 * half + 1) * _ROWS_PER_PIXEL
    y = (np.arange(rows) + 0.5) / _ROWS_PER_PIXEL - half - 0.5  # the middle of each thin row of a pixel
    chord = np.sqrt(np.maximum(radius**2 - y**2, 0))[:, None]  # half of the disc's width in that row
    edges = np.arange(2 * half + 2) - half - 0.5
    covered = np.diff(np.clip(edges, -chord, chord), axis=1)
    weights = covered.reshape(2 * half + 1, _ROWS_PER_PIXEL, -1).mean(1)
    weights = weights + weights.T + weights[::-1] + weights.T[::-1]  # symmetric under quarter turns, to rounding
    return _normalised(weights + weights[:, ::-1])


def motion(length: float, angle: float) -> Tensor:
    """A straight motion at constant speed: a line, whose points count for the four nearest pixels by distance.

    Args:
        length: of the line, above 0.
        angle: of the line; 0 is horizontal, 45 rises to the right.

    Raises:
        ValueError: a length that is not positive or over 1000; an angle that is not finite.

    Example:
        >>> import jfbfast
        >>> jfbfast.point_spread.motion(3.0, 0.0).mul(1000).round()
        tensor([[ 42., 292., 333., 292.,  42.]], dtype=torch.float64)
    """
    checks.positive("length", length)
    _check_size("length", length, length)
    turn, steps = _angle(angle), math.ceil(length) * _STEPS_PER_PIXEL
    position = ((np.arange(steps) + 0.5) / steps - 0.5) * length
    return _drawn(np.stack((-math.sin(turn) * position, math.cos(turn) * position), axis=1).round(9))


def trajectory(length: float, generator: np.random.Generator) -> Tensor:
    """A random shake of a camera: a smooth path at constant speed, drawn as `motion` draws its line.

    The velocity of a point keeps its direction by inertia; it is changed by random impulses, by a pull back to where
    the path began, and now and then by a jerk that nearly turns it round (Boracchi and Foi, "Modeling the performance
    of image restoration from motion blur", 2012). How strong these are is drawn anew for each path, so that
    some paths are nearly straight, and others curl.

    Args:
        length: of the path, above 0. The point spread function is smaller if the path bends.
        generator: the source of randomness.

    Raises:
        ValueError: a length that is not positive, or over 1000.

    Example:
        >>> import jfbfast, numpy
        >>> psf = jfbfast.point_spread.trajectory(12.0, numpy.random.default_rng(0))
        >>> psf.sum().round(), max(psf.shape) <= 15
        (tensor(1., dtype=torch.float64), True)
    """
    checks.positive("length", length)
    _check_size("length", length, length)
    if not isinstance(generator, np.random.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; it takes a numpy.random.Generator")
    # In units of a step: the impulses, the pull for each step of distance, and the chance of a jerk at a step.
    impulse = 0.25 * generator.random() ** 2
    pull = 2e-4 * generator.random()
    jerk = 4.0 / _WALK * generator.random() * (generator.random() < 0.3)
    heading = 2j * math.pi * generator.random()
    velocity, position = complex(np.exp(heading)), 0j
    pushes = impulse * (generator.standard_normal((_WALK, 2)) @ np.array([1, 1j]))
    jerks, turns = generator.random(_WALK) < jerk, generator.random(_WALK) - 0.5
    path = np.empty(_WALK, complex)
    for step in range(_WALK):
        if jerks[step]:
            velocity *= complex(-np.exp(1j * turns[step]))
        velocity += pushes[step] - pull * position
        velocity /= abs(velocity)
        position += velocity
        path[step] = position
    path = (path - path.mean()) * (length / _WALK)
    return _drawn(np.stack((path.imag, path.real), axis=1))


def read(path: str | Path) -> Tensor:
    """Read a point spread function from a file: a picture of a point, with light as linear numbers and black around it.

    Colours are averaged. What is zero around the point is cut off, and the centroid is moved to the middle by
    whole pixels, so that a restoration may be moved by as many against the photograph that the file was made from.

    Args:
        path: a .npy file (H, W), a PNG or a TIFF (H, W) or (H, W, 3), each with at most 1001 pixels a side.

    Raises:
        ValueError: another file, or one with values that are negative, not finite, or all zero.
        OSError: a file that cannot be read.

    Example:
        >>> import os, tempfile, numpy, jfbfast
        >>> path = os.path.join(tempfile.mkdtemp(), "psf.npy")
        >>> numpy.save(path, numpy.array([[0, 0, 0, 0], [0, 0, 1, 3]]))
        >>> jfbfast.point_spread.read(path)
        tensor([[0.2500, 0.7500, 0.0000]], dtype=torch.float64)
    """
    path = Path(path)
    weights = _file_values(path)
    if weights.ndim == 3 and weights.shape[2] == 3:
        weights = weights.mean(2)
    if weights.ndim != 2 or not 1 <= min(weights.shape) <= max(weights.shape) <= _LARGEST:
        raise ValueError(
            f"{path} has the shape {weights.shape}; it takes grey or RGB, with at most {_LARGEST} pixels a side"
        )
    if not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise ValueError(
            f"{path} has values from {weights.min()} to {weights.max()}; it takes numbers ≥ 0, not all zero"
        )
    for axis in (0, 1):
        weights = _centred(weights, axis)
    return _normalised(weights)


def _file_values(path: Path) -> np.ndarray:
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".png", ".tif", ".tiff"):
        raise ValueError(f"{path} ends in {suffix!r}; it takes .npy, .png, .tif or .tiff")
    content = path.read_bytes()
    try:
        if suffix == ".npy":
            values = np.load(BytesIO(content), allow_pickle=False)
        else:
            import imagecodecs

            _check_picture(suffix, content)
            values = (imagecodecs.png_decode if suffix == ".png" else imagecodecs.tiff_decode)(content)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"it holds {values.dtype}; it takes real numbers")
        return np.asarray(values).astype(np.float64)
    except ImportError:
        raise
    except Exception as error:  # a broken file makes a decoder raise nearly anything
        raise ValueError(f"{path} cannot be read ({checks.one_line(error)})") from error


def _check_picture(suffix: str, content: bytes) -> None:
    """Raise ValueError for a picture that is too large, before it is decoded: a small file may hold gigabytes."""
    import tifffile

    if suffix == ".png":
        width, height, samples = (*struct.unpack_from(">2I", content, 16), 1)
    else:
        with tifffile.TiffFile(BytesIO(content)) as file:
            page = file.pages.first
            width, height, samples = page.imagewidth, page.imagelength, page.samplesperpixel
        if page.is_tiled and max(page.tilewidth, page.tilelength, page.tiledepth) > _LARGEST_TILE:
            raise ValueError(
                f"its tiles have {page.tilewidth} × {page.tilelength} pixels; it takes {_LARGEST_TILE} a side"
            )
    if max(width, height) > _LARGEST or samples > 4:
        raise ValueError(f"it has {width} × {height} pixels; it takes grey or RGB, with at most {_LARGEST} a side")


def _centred(weights: np.ndarray, axis: int) -> np.ndarray:
    """Cut or fill with zeros along one axis, to the least odd size with the centroid in the middle and nothing lost."""
    profile = weights.sum(1 - axis)
    used = np.flatnonzero(profile)
    middle = round(float((profile * np.arange(len(profile))).sum() / profile.sum()))
    half = int(max(middle - used[0], used[-1] - middle))
    weights = np.pad(weights, [(half, half) if axis == a else (0, 0) for a in (0, 1)])
    return np.take(weights, np.arange(middle, middle + 2 * half + 1), axis)


def _drawn(points: np.ndarray) -> Tensor:
    """Points (n, 2) as (y, x) from the middle, each shared among its four nearest pixels by bilinear weights."""
    half = np.ceil(np.abs(points).max(0)).astype(int)
    base = np.floor(points).astype(int)
    part = points - base
    weights = np.zeros(2 * half + 3)  # with a border, for neighbours that get the weight zero
    for down in (0, 1):
        for right in (0, 1):
            share = np.abs(1 - down - part[:, 0]) * np.abs(1 - right - part[:, 1])
            np.add.at(weights, (base[:, 0] + half[0] + 1 + down, base[:, 1] + half[1] + 1 + right), share)
    return _normalised(weights[1:-1, 1:-1])


def _check_size(name: str, value: object, size: float) -> None:
    if size > _LARGEST:
        raise ValueError(f"{name} is {value}; it takes what keeps a side within {_LARGEST} pixels")
