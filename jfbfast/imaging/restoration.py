"""Restore photographs of any size in bounded memory: in overlapping tiles, which are blended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from jfbfast.imaging.classical import tikhonov
from jfbfast.imaging.photographs import check_target, check_unused, read_photograph, write_photograph
from jfbfast.imaging.plausibility import PowerSpectrum
from jfbfast.models.config import SETTING, ModelConfig
from jfbfast.models.pretrained import (
    load_model,
    matching_name,
    measurement_setting,
    set_network,
)
from jfbfast.operators.blur import GaussianBlur, SeparableBlur
from jfbfast.solvers import ConvergenceWarning

Restorer = Callable[[Tensor], Tensor]  # (1, C, h, w) on [−1, 1] to the same shape


class Prepared(NamedTuple):
    """A photograph, and the method that restores it.

    Attributes:
        measured: the photograph on [−1, 1], (C, H + 2m, W + 2m), extended by m pixels beyond each edge.
        margin: m ≥ 0, to be cut off again.
        restore: restores its tiles.
        how: the method, in words.
    """

    measured: Tensor
    margin: int
    restore: Restorer
    how: str


Prepare = Callable[[str, Tensor], Prepared]  # from a photograph's name and its values on [−1, 1], (C, H, W)

ALIGNMENT = 16  # pixels; divisible by the coarsest step of a U-Net of four scales
LEAST_TILE = 2 * ALIGNMENT  # pixels; any overlap then leaves room to align the tiles
HALF_A_GREY_LEVEL = 1 / 255  # half of a step of 8-bit samples, on [−1, 1]
EXTENSIONS: dict[str, Literal["edge", "reflect", "wrap"]] = {  # mode of numpy.pad by padding mode
    "replicate": "edge",
    "reflect": "reflect",
    "circular": "wrap",
}


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return the start and the end of evenly spread tiles, which cover ``length`` and overlap by at least ``overlap``.

    They start at multiples of `ALIGNMENT`, so that a U-Net halves the resolution at the same pixels as in the whole
    image. The last tile can therefore be longer than ``tile``, by less than `ALIGNMENT`.
    """
    if length <= tile:
        return [(0, length)]
    stride = (tile - overlap) // ALIGNMENT * ALIGNMENT
    count = 1 + -(-(length - tile) // stride)
    starts = [i * (length - tile) // (count - 1) // ALIGNMENT * ALIGNMENT for i in range(count)]
    return [(start, start + tile) for start in starts[:-1]] + [(starts[-1], length)]


def _weights(span: tuple[int, int], length: int, overlap: int) -> Tensor:
    """Blending weights: 1 inside a tile; at an inner edge nearly 0 over 3/8 of the overlap, and then a ramp."""
    start, end = span
    margin, width = 3 * overlap // 8, overlap // 4
    ramp = ((torch.arange(end - start) + 1 - margin) / width).clamp(1e-6, 1)
    weights = torch.ones(end - start)
    if start > 0:
        weights = weights * ramp
    if end < length:
        weights = weights * ramp.flip(0)
    return weights


def tiles(height: int, width: int, tile: int, overlap: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the rows, the columns and the blending weights of each tile of an image."""
    for y, x in product(_spans(height, tile, overlap), _spans(width, tile, overlap)):
        yield slice(*y), slice(*x), _weights(y, height, overlap)[:, None] * _weights(x, width, overlap)


def restore_tiled(
    restore: Restorer,
    d: Tensor,
    *,
    tile: int = 512,
    overlap: int = 96,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Apply ``restore`` to overlapping tiles of an image and blend them.

    The blend drops what lies within 3/8 of the overlap of an inner edge. No seam is seen if a restored pixel depends
    only on pixels within that distance; `border_reach` measures it.

    Args:
        restore: (1, C, h, w) to the same shape.
        d: (C, H, W), any size.
        tile: side of a tile in pixels, at least `LEAST_TILE`.
        overlap: least number of pixels that neighbouring tiles share; at least 4 and under half of ``tile``.
        progress: called after each tile with the number of tiles done and of all tiles.

    Raises:
        ValueError: ``tile`` or ``overlap`` out of its range.

    Example:
        >>> import torch, jfbfast
        >>> from jfbfast.imaging.restoration import restore_tiled
        >>> blur, d = jfbfast.GaussianBlur(5, 1.0, "reflect"), torch.rand(3, 90, 70)
        >>> tiled = restore_tiled(lambda part: jfbfast.tikhonov(blur, part, 0.1), d, tile=64, overlap=24)
        >>> torch.allclose(tiled, jfbfast.tikhonov(blur, d, 0.1), atol=0.01)
        True
    """
    if tile < LEAST_TILE:
        raise ValueError(f"tile is {tile}; it takes at least {LEAST_TILE}")
    if not 4 <= overlap < tile / 2:
        raise ValueError(f"overlap is {overlap}; it takes at least 4 and less than half of tile={tile}")
    total, weight = torch.zeros_like(d), torch.zeros(d.shape[-2:], device=d.device)
    plan = list(tiles(d.shape[-2], d.shape[-1], tile, overlap))
    for done, (rows, columns, share) in enumerate(plan, 1):
        share = share.to(d.device)
        total[:, rows, columns] += share * restore(d[None, :, rows, columns].contiguous())[0]
        weight[rows, columns] += share
        if progress is not None:
            progress(done, len(plan))
    return total / weight


def border_reach(restore: Restorer, d: Tensor, tile: int = 512, tolerance: float = HALF_A_GREY_LEVEL) -> int:
    """Measure how far from a cut, in pixels, a restoration differs visibly from the uncut one.

    The image's centre, at most a tile, is restored with and without its upper quarter, and with and without its left
    quarter. This accounts for the network's receptive field, the operator's, and how often the solve applies them.

    Args:
        restore: (1, C, h, w) to the same shape.
        d: (C, H, W).
        tile: side of the centre.
        tolerance: the largest difference on [−1, 1] that does not count.
    """
    top, left = (max(0, (n - tile) // 2) for n in d.shape[-2:])
    part = d[None, :, top : top + tile, left : left + tile].contiguous()
    whole = restore(part)
    reach = 0
    for dim in (-2, -1):
        cut = part.shape[dim] // 4 // ALIGNMENT * ALIGNMENT
        kept = part.shape[dim] - cut
        difference = restore(part.narrow(dim, cut, kept).contiguous()) - whole.narrow(dim, cut, kept)
        seen = (difference.abs().movedim(dim, 0).flatten(1).amax(1) > tolerance).nonzero()
        reach = max(reach, int(seen[-1]) + 1 if cut and len(seen) else 0)
    return reach


def seamless_overlap(restore: Restorer, d: Tensor, tile: int = 512) -> int:
    """Return the overlap at which the tiles of d leave no visible seam: 8/3 of the `border_reach`.

    At least 32 pixels, at most what ``tile`` allows.
    """
    wanted = 8 * -(-border_reach(restore, d, tile) // 3)
    return min(max(32, wanted), (tile - 1) // 2)


def tiling_error(restore: Restorer, d: Tensor, tiled: Tensor) -> float:
    """Return the largest difference on [−1, 1] between d's restoration in tiles, as given, and in one piece."""
    return float((tiled - restore(d[None].contiguous())[0]).abs().max())


def extend(d: Tensor, margin: int, padding_mode: str) -> Tensor:
    """Extend an image (C, H, W) by ``margin`` pixels on every side, as the padding mode continues it."""
    sides = ((0, 0), (margin, margin), (margin, margin))
    return torch.from_numpy(np.pad(d.numpy(), sides, mode=EXTENSIONS[padding_mode]))


def tikhonov_restorer(blur: SeparableBlur, d: Tensor, damping: float) -> Restorer:
    """Return Tikhonov regularisation about a constant c, so that it commutes with an offset of brightness.

        x = c1 + (1 + λ)(AᵀA + λI)⁻¹Aᵀ(d − cA1)

    c is the constant with the measurement cA1 nearest to d, channel by channel. The factor 1 + λ keeps the contrast
    of what the blur does not change.

    Args:
        blur: A.
        d: the whole image, (C, H, W), to which c is fitted.
        damping: λ > 0.
    """

    def constant(like: Tensor) -> Tensor:
        return blur(torch.ones_like(like[..., :1, :, :]))

    unit = constant(d)
    offset = (d * unit).sum((-2, -1), keepdim=True) / unit.square().sum((-2, -1), keepdim=True)
    return lambda part: offset + (1 + damping) * tikhonov(blur, part - offset * constant(part), damping)


def network_restorer(model: nn.Module, channels: int, blur: SeparableBlur | None = None) -> Restorer:
    """Return the model's restoration, for images with any number of channels.

    Args:
        model: a network.
        channels: the model's number; other images are restored channel by channel, as grey ones.
        blur: A with zeros beyond the edges, if the images are pieces that were cut out of a larger scene. The network
            expects images that darken towards the edges, as the blur A1 of a constant does. So it gets d · A1.
    """

    @torch.inference_mode()
    def restore(measured: Tensor) -> Tensor:
        if blur is not None:
            measured = measured * blur(torch.ones_like(measured[:, :1]))
        if measured.shape[1] == channels:
            return model(measured)
        greys = (channel.expand(-1, channels, -1, -1) for channel in measured.split(1, dim=1))
        return torch.cat([model(grey).mean(1, keepdim=True) for grey in greys], dim=1)

    return restore


def _check_surroundings(name: str, setting: ModelConfig) -> None:
    if setting.padding_mode == "valid":
        raise ValueError(f"{name} is 'valid'; restore takes 'zeros', 'reflect', 'replicate' or 'circular'")


def choose_restorer(
    checkpoint: str | None,
    given: Mapping[str, Any],
    say: Callable[[str], object],
    warn: Callable[[str], object],
) -> Prepare:
    """Choose what restores photographs with these measurements: a network, or Tikhonov regularisation.

    With zeros beyond the edges, A pads with zeros. With any other padding mode, the photograph is extended beyond its
    edges, and restored as a piece of a larger scene.

    Args:
        checkpoint: a shipped network's name or a network's file, or "tikhonov". None for the shipped network that was
            trained for these measurements, or Tikhonov if there is none.
        given: kernel_size, sigma and noise, where None stands for the value of the checkpoint, or of `ModelConfig` if
            there is no checkpoint; and padding_mode, what lies beyond the photograph's edges ("replicate" if unknown).
        say: called with the choice if ``checkpoint`` is None, and with the measurements that a network was trained for
            if they are not the given ones.
        warn: called for a photograph that contradicts the blur and the noise. Tikhonov restores it, at the noise that
            it shows.

    Returns:
        A function that prepares a photograph, given its name and its values.

    Raises:
        CheckpointError: no such checkpoint.
        ValueError: an impossible blur; a denoiser alone; a noise level for a network that was trained for one, or none
            for a network that takes one.

    Example:
        >>> import torch
        >>> from jfbfast.imaging.restoration import choose_restorer, restore_tiled
        >>> given = {"kernel_size": 5, "sigma": 1.0, "noise": 0.01, "padding_mode": "replicate"}
        >>> prepare = choose_restorer("tikhonov", given, say=print, warn=print)
        >>> prepared = prepare("grey.png", torch.full((1, 20, 24), 0.5))
        >>> restored = restore_tiled(prepared.restore, prepared.measured)
        >>> torch.allclose(restored, torch.full_like(restored, 0.5), atol=1e-3)
        True
    """
    setting = measurement_setting(given, [])
    setting.blur()  # raises before a network is looked for
    _check_surroundings("padding_mode", setting)
    zeros, picked = setting.padding_mode == "zeros", checkpoint is None
    edges = "zeros" if zeros else None
    if picked:
        checkpoint = matching_name(setting.kernel_size, setting.sigma, setting.noise, edges)
        given = {name: getattr(setting, name) for name in SETTING}
    by_tikhonov = checkpoint is None or checkpoint == "tikhonov"
    if by_tikhonov and not setting.noise > 0:
        raise ValueError(
            f"noise is {setting.noise:g}; Tikhonov regularisation by the discrepancy principle takes a positive "
            "number: rounding to 8 bits alone is 0.0023"
        )
    if picked:
        say(
            f"Restoring by the shipped model {checkpoint}."
            if checkpoint
            else f"No shipped model is for kernel size {setting.kernel_size}, σ = {setting.sigma:g} and noise "
            f"{setting.noise:g}{', zeros beyond the edge' if zeros else ''}: restoring by Tikhonov regularisation, "
            "λ by the discrepancy principle."
        )
    network: Restorer | None = None
    if not by_tikhonov:
        assert checkpoint is not None
        model, config = load_model(checkpoint)
        if config.form == "denoiser":
            raise ValueError(f"checkpoint is {checkpoint}, a denoiser alone; it takes a network that undoes blur")
        _check_surroundings(f"padding_mode of {checkpoint}", config)
        if config.ranges is not None:
            model.adapt_to(given["sigma"], given["noise"], config, checkpoint)  # raises if one is missing
        elif given["noise"] not in (None, config.noise) and not picked:
            raise ValueError(
                f"noise is {given['noise']}; {checkpoint} was trained for noise of {config.noise:g}, so it takes none"
            )
        setting = measurement_setting({**given, "padding_mode": edges}, [config])
        set_network(checkpoint, model, config, setting, say)
        network = network_restorer(model, config.channels, None if zeros else setting.blur())
    blur = GaussianBlur(setting.kernel_size, setting.sigma, "zeros" if zeros else "reflect")
    # Twice the blur's reach and 24 pixels, rounded up; wider margins changed the border by less than 0.05 dB.
    margin = 0 if zeros else -(-(24 + max(blur.kernel_size)) // ALIGNMENT) * ALIGNMENT

    def prepare(name: str, d: Tensor) -> Prepared:
        measured = extend(d, margin, given["padding_mode"]) if margin else d
        spectrum = PowerSpectrum(blur, d)
        noise, contradicted = spectrum.plausible_noise(setting.noise)
        if network is not None and not contradicted:
            assert checkpoint is not None
            if config.ranges is not None:
                model.adapt_to(setting.sigma, min(noise, config.ranges.noise[1]), config, checkpoint)
            return Prepared(measured, margin, network, checkpoint)
        if contradicted:
            warn(
                f"{name} is sharper or noisier than a blur of σ = {setting.sigma:g} and noise of {setting.noise:g} "
                f"could leave it. It is restored by Tikhonov regularisation for noise of {noise:.2g}, and can become "
                "softer than it was: check the blur and the noise level."
            )
        damping = spectrum.damping(noise)
        return Prepared(measured, margin, tikhonov_restorer(blur, measured, damping), f"Tikhonov, λ = {damping:.2g}")

    return prepare


def restore_file(
    source: Path,
    target: Path,
    prepare: Prepare,
    *,
    tile: int = 512,
    overlap: int | None = None,
    check_tiles: bool = False,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> str:
    """Restore a photograph into another file; its depth, alpha, colour profile, EXIF and resolution are kept.

    Args:
        source, target: the files.
        prepare: from `choose_restorer`.
        tile, progress: of `restore_tiled`; a photograph that fits a tile is restored in one piece, margins and all.
        overlap: of `restore_tiled`; None for `seamless_overlap`.
        check_tiles: also restore in one piece, and report the `tiling_error`.
        overwrite: replace an existing file.

    Returns:
        How it was restored, in words.

    Raises:
        ImageError: a file that cannot be read or written, or that exists already.
        ValueError: as `restore_tiled`.
    """
    photograph = read_photograph(source)
    check_unused(target, [source], overwrite)
    check_target(target, photograph)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        measured, margin, restorer, how = prepare(str(source), 2 * photograph.pixels - 1)
        height, width = photograph.pixels.shape[-2:]
        if max(height, width) <= tile:
            tile = max(tile, *measured.shape[-2:])
        if overlap is None:
            several = max(measured.shape[-2:]) > tile
            overlap = seamless_overlap(restorer, measured, tile) if several else min(96, tile // 4)
        caught.clear()  # the warnings of the measured overlap
        restored = restore_tiled(restorer, measured, tile=tile, overlap=overlap, progress=progress)
        late = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        if check_tiles:
            how += f"; tiles differ by {tiling_error(restorer, measured, restored) / 2:.1e} of white"
    restored = restored[:, margin : margin + height, margin : margin + width]
    write_photograph(target, photograph._replace(pixels=(restored + 1) / 2), overwrite=overwrite)
    return f"{how}; {late} tiles did not converge" if late else how
