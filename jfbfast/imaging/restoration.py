"""Restoring photographs of any size: in overlapping tiles, blended so that memory stays bounded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from jfbfast.imaging.classical import tikhonov
from jfbfast.imaging.photographs import check_target, check_unused, file_identity, read_photograph, write_photograph
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

Restorer = Callable[[Tensor], Tensor]


class Prepared(NamedTuple):
    """A photograph, and what restores it.

    Attributes:
        measured: the photograph on [−1, 1], (C, H + 2m, W + 2m), extended by m pixels of what lies beyond its edges.
        margin: m ≥ 0, to be cut off again.
        restore: its tiles.
        how: in words.
    """

    measured: Tensor
    margin: int
    restore: Restorer
    how: str


Prepare = Callable[[str, Tensor], Prepared]  # of a photograph's name and its values on [−1, 1], (C, H, W)

ALIGNMENT = 16  # pixels; what the coarsest scale of a U-Net of four scales divides
LEAST_TILE = 2 * ALIGNMENT  # pixels; from here on any overlap leaves room to align the tiles
HALF_A_GREY_LEVEL = 1 / 255  # on [−1, 1]
EXTENSIONS: dict[str, Literal["edge", "reflect", "wrap"]] = {  # by padding mode, for numpy.pad
    "replicate": "edge",
    "reflect": "reflect",
    "circular": "wrap",
}


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Where tiles start and end that cover ``length`` and overlap by at least ``overlap``, evenly spread.

    They start at multiples of `ALIGNMENT`, so that a U-Net halves the resolution of each at the pixels
    at which it would halve that of the whole; so the last one can be that much longer than ``tile``.
    """
    if length <= tile:
        return [(0, length)]
    stride = (tile - overlap) // ALIGNMENT * ALIGNMENT
    count = 1 + -(-(length - tile) // stride)
    starts = [i * (length - tile) // (count - 1) // ALIGNMENT * ALIGNMENT for i in range(count)]
    return [(start, start + tile) for start in starts[:-1]] + [(starts[-1], length)]


def _weights(span: tuple[int, int], length: int, overlap: int) -> Tensor:
    """One inside a tile; at an edge that another tile covers, nearly nothing over 3/8 of the overlap, then a ramp."""
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
    """Rows, columns and blending weights of each tile of an image."""
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
    """Apply ``restore`` to overlapping tiles of one image and blend them.

    What lies within 3/8 of the overlap of an edge is dropped, so no seam is seen where a restored pixel depends
    on what is no further away; `border_reach` measures that.

    Args:
        restore: (1, C, h, w) to the same shape.
        d: (C, H, W), any size.
        tile: side of a tile in pixels, at least `LEAST_TILE`.
        overlap: pixels that neighbouring tiles share at least, under half of ``tile``.
        progress: called after each tile with the tiles done and the tiles in all.

    Raises:
        ValueError: a smaller tile; an overlap below 4, or not under half of the tile.
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
    """How far from a cut a restoration differs visibly from that of the uncut image, in pixels.

    Measured: the image's centre, a tile at most, is restored with and without its upper quarter, and so
    much for the left one. It counts a network's receptive field, the operator's, and how often the
    solve applies them, as far as they matter.

    Args:
        restore: (1, C, h, w) to the same shape.
        d: (C, H, W).
        tile: side of the part that is restored.
        tolerance: the largest difference that does not count; on [−1, 1], half a grey level of 8 bits is 1/255.
    """
    part = _centre(d, tile)[None].contiguous()
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
    """The overlap at which the tiles of d leave no visible seam: of which 3/8 are the `border_reach`.

    At least 32 pixels, at most what ``tile`` allows.
    """
    wanted = 8 * -(-border_reach(restore, d, tile) // 3)
    return min(max(32, wanted), (tile - 1) // 2)


def tiling_error(restore: Restorer, d: Tensor, tiled: Tensor) -> float:
    """The largest difference on [−1, 1] between d's restoration in tiles, as given, and in one piece."""
    return float((tiled - restore(d[None].contiguous())[0]).abs().max())


def _centre(d: Tensor, side: int) -> Tensor:
    top, left = (max(0, (n - side) // 2) for n in d.shape[-2:])
    return d[..., top : top + side, left : left + side]


def extend(d: Tensor, margin: int, padding_mode: str) -> Tensor:
    """An image (C, H, W) with ``margin`` more pixels on every side: what lies beyond its edges, by the padding mode."""
    sides = ((0, 0), (margin, margin), (margin, margin))
    return torch.from_numpy(np.pad(d.numpy(), sides, mode=EXTENSIONS[padding_mode]))


def margin_for(blur: GaussianBlur) -> int:
    """How far an image is extended, in pixels: twice the blur's reach and 24 more, up to a multiple of `ALIGNMENT`.

    Wider margins changed a photograph's border by less than 0.05 dB, for the shipped networks and for Tikhonov's
    restoration at σ = 1 to 3.
    """
    return -(-(24 + max(blur.kernel_size)) // ALIGNMENT) * ALIGNMENT


def tikhonov_restorer(blur: SeparableBlur, d: Tensor, damping: float) -> Restorer:
    """Tikhonov's restoration about a constant c, so that it commutes with an offset of brightness.

        x = c1 + (1 + λ)(AᵀA + λI)⁻¹Aᵀ(d − cA1)

    c is the constant whose measurement cA1 is nearest to d, channel by channel; the factor 1 + λ keeps the contrast
    of what the blur leaves as it is.

    Args:
        blur: A.
        d: the whole image, (C, H, W), which c is fitted to.
        damping: λ > 0.
    """

    def constant(like: Tensor) -> Tensor:
        return blur(torch.ones_like(like[..., :1, :, :]))

    unit = constant(d)
    offset = (d * unit).sum((-2, -1), keepdim=True) / unit.square().sum((-2, -1), keepdim=True)

    def restore(measured: Tensor) -> Tensor:
        return offset + (1 + damping) * tikhonov(blur, measured - offset * constant(measured), damping)

    return restore


def for_cuts(restore: Restorer, blur: SeparableBlur) -> Restorer:
    """A restorer of measurements by A, edges and all, made one for pieces that were cut out of a larger scene.

    A piece d is restored as d · A1: with zeros beyond the edges, A takes a constant to mid-grey there. Without that a
    network sees a bright or dark edge that is none.
    """
    return lambda measured: restore(measured * blur(torch.ones_like(measured[:, :1])))


def network_restorer(model: nn.Module, channels: int) -> Restorer:
    """The model's restoration, for images of one channel too: they pass as ``channels`` equal ones."""

    @torch.inference_mode()
    def restore(measured: Tensor) -> Tensor:
        if measured.shape[1] == channels:
            whole: Tensor = model(measured)
            return whole
        if measured.shape[1] == 1:
            restored: Tensor = model(measured.expand(-1, channels, -1, -1))
            return restored.mean(1, keepdim=True)
        return torch.cat([model(channel) for channel in measured.split(1, dim=1)], dim=1)

    return restore


def choose_restorer(
    checkpoint: str | None,
    given: Mapping[str, Any],
    say: Callable[[str], object],
    warn: Callable[[str], object],
) -> Prepare:
    """What restores photographs that were measured so: a network, or Tikhonov regularisation.

    With zeros beyond the edges, A has them. Otherwise the photograph is extended by what lies there, and restored as a
    piece of a larger scene.

    Args:
        checkpoint: a shipped network's name or a network's file, or "tikhonov"; None for the shipped network that
            was trained for these measurements, and for Tikhonov where there is none.
        given: kernel_size, sigma and noise; None for the checkpoint's, or without one for those of `ModelConfig`. And
            padding_mode: what lies beyond the photograph's edges, "replicate" where that is not known.
        say: is told what None chose, and of a network that was trained for other measurements.
        warn: is told of a photograph that contradicts the blur and the noise; Tikhonov restores it, at the noise that
            it shows.

    Raises:
        CheckpointError: no such checkpoint.
        ValueError: a blur that there is none of; a denoiser alone; a noise level for a network that was trained for
            one, or none for a network that takes one.
    """
    setting = measurement_setting(given, [])
    setting.blur()  # raises before a network is looked for
    edges, picked = ("zeros" if setting.padding_mode == "zeros" else None), checkpoint is None
    if picked:
        checkpoint = matching_name(setting.kernel_size, setting.sigma, setting.noise, edges)
        given = {name: getattr(setting, name) for name in SETTING}
    if checkpoint in (None, "tikhonov") and not setting.noise > 0:
        raise ValueError(
            f"noise is {setting.noise:g}; Tikhonov regularisation by the discrepancy principle takes a positive "
            "number: rounding to 8 bits alone is 0.0023"
        )
    if picked:
        say(
            f"Restoring by the shipped model {checkpoint}."
            if checkpoint
            else f"No shipped model is for kernel size {setting.kernel_size}, σ = {setting.sigma:g} and noise "
            f"{setting.noise:g}{', zeros beyond the edge' if edges else ''}: restoring by Tikhonov regularisation, "
            "λ by the discrepancy principle."
        )
    network: Callable[[float], Restorer] | None = None
    if checkpoint is not None and checkpoint != "tikhonov":
        model, config = load_model(checkpoint)
        if config.form == "denoiser":
            raise ValueError(f"checkpoint is {checkpoint}, a denoiser alone; it takes a network that undoes blur")
        if config.ranges is not None:
            model.adapt_to(given["sigma"], given["noise"], config, checkpoint)  # raises where one is missing
        elif given["noise"] not in (None, config.noise) and not picked:
            raise ValueError(
                f"noise is {given['noise']}; with a checkpoint, which was trained for its own, it is of no use"
            )
        setting = measurement_setting({**given, "padding_mode": edges}, [config])
        set_network(checkpoint, model, config, setting, say)
        network = partial(_network, checkpoint, model, config, setting, edges is None)
    return partial(_prepare, network, checkpoint or "", setting, given["padding_mode"], warn)


def _network(name: str, model: Any, config: ModelConfig, setting: ModelConfig, cuts: bool, noise: float) -> Restorer:
    """The network's restorer, set for this noise where it takes a range of them."""
    if config.ranges is not None:
        model.adapt_to(setting.sigma, min(noise, config.ranges.noise[1]), config, name)
    restorer = network_restorer(model, config.channels)
    return for_cuts(restorer, setting.blur()) if cuts else restorer


def _prepare(
    network: Callable[[float], Restorer] | None,
    checkpoint: str,
    setting: ModelConfig,
    padding_mode: str,
    warn: Callable[[str], object],
    name: str,
    d: Tensor,
) -> Prepared:
    """Extend a photograph, and restore it by the network, or by Tikhonov without one or where it is contradicted."""
    blur = GaussianBlur(setting.kernel_size, setting.sigma, "zeros" if padding_mode == "zeros" else "reflect")
    margin = 0 if padding_mode == "zeros" else margin_for(blur)
    measured = extend(d, margin, padding_mode) if margin else d
    spectrum = PowerSpectrum(blur, d)
    noise, contradicted = spectrum.plausible_noise(setting.noise)
    if network is not None and not contradicted:
        return Prepared(measured, margin, network(noise), checkpoint)
    if contradicted:
        warn(
            f"{name} is sharper or noisier than a blur of σ = {setting.sigma:g} and noise of {setting.noise:g} could "
            f"leave it. It is restored mildly, by Tikhonov regularisation for noise of {noise:.2g}."
        )
    damping = spectrum.damping(noise)
    return Prepared(measured, margin, tikhonov_restorer(blur, measured, damping), f"Tikhonov, λ = {damping:.2g}")


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
        prepare: of `choose_restorer`.
        tile, progress: of `restore_tiled`; a photograph that fits a tile is restored in one piece, margins and all.
        overlap: of `restore_tiled`; None for `seamless_overlap`.
        check_tiles: restore in one piece too, to tell the `tiling_error`.
        overwrite: replace a file that is there.

    Returns:
        How it was restored, in words.

    Raises:
        ImageError: a file that cannot be read or written, or that is there.
        ValueError: of `restore_tiled`.
    """
    photograph = read_photograph(source)
    check_unused(target, [file_identity(source)], overwrite)
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
        caught.clear()  # those of the measured overlap
        restored = restore_tiled(restorer, measured, tile=tile, overlap=overlap, progress=progress)
        late = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        if check_tiles:
            how += f"; tiles differ by {tiling_error(restorer, measured, restored) / 2:.1e} of white"
    restored = restored[:, margin : margin + height, margin : margin + width]
    write_photograph(target, photograph._replace(pixels=(restored + 1) / 2), overwrite=overwrite)
    return f"{how}; {late} tiles did not converge" if late else how
