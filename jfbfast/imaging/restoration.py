"""Restore a photograph: choose the method, allow for what is not known exactly, and put the tiles together."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.reference import PADDING_MODES
from jfbfast.imaging.automatic import NOISE, known
from jfbfast.imaging.blurs import AUTO, BlurChoice
from jfbfast.imaging.camera import CLIPPED_SHARE, Camera, clipped
from jfbfast.imaging.light import LIGHTS, linear_noise, to_encoded, to_linear
from jfbfast.imaging.methods import Tikhonov, extend, extension_width
from jfbfast.imaging.networks import AnyBlurNetwork, GaussianNetwork, Watch, load_network, unwatched
from jfbfast.imaging.plausibility import LEAST_NOISE, TOLERANCE, PowerSpectrum
from jfbfast.imaging.report import MeanSquare, Report, Restored
from jfbfast.imaging.tiling import TILE, TileRestorer, restore_tiled, seamless_overlap, tiling_error
from jfbfast.models.pretrained import UNIVERSAL, installed_names, matching_name
from jfbfast.operators.frame import cut
from jfbfast.solvers import ConvergenceWarning

# The error of a blur's size that counts as noise, as a share of the tolerance: of one σ, which is compared with the
# estimate, and of other blurs, which cannot be. Told 20% too much, these lost 1 to 4 dB with 0.25.
CHECKED, UNCHECKED = 0.1, 1.0


class _Plan(NamedTuple):
    """How one photograph is restored: ``restore`` restores the tiles of ``measured``."""

    measured: Tensor
    extension: int
    restore: TileRestorer
    residual: MeanSquare
    network: AnyBlurNetwork | GaussianNetwork | None
    report: Report


class Restoration:
    """Restores photographs with the same blur and noise level. Call it with each of them.

    Args:
        blur: the blur; None for that of a network that was trained for one. With σ "auto" it is estimated.
        noise: standard deviation of the noise of the encoded values, on [−1, 1], or "auto" to estimate it. None takes
            that of a network trained for one; else it is estimated, or 0.01 for a side of less than 64 pixels.
        light: what the blur acted on: "linear" light, as optics do, or "encoded" values, as image editors do.
        padding_mode: what the blur saw beyond the photograph's edges: "valid" if that is unknown, "replicate",
            "reflect", "circular", or "zeros" (mid-grey, of encoded values).
        checkpoint: what restores: a shipped network's name, a network's file, or "tikhonov". None for a shipped network
            that was trained for this kernel size, blur and noise, else the one for any blur; Tikhonov regularisation
            if there is none.
        tolerance: by which share the blur's size may be wrong. What that would typically leave unexplained counts as
            noise, and a σ that the photograph is too sharp for is lowered.
        device: where to restore.
        say: called with sentences on the choice of the method, and on an estimated σ.
        warn: called with a sentence for a photograph that contradicts the blur and the noise. Tikhonov regularisation
            restores it, at the noise that it shows, unless a network can be set for that noise.
        watch: called after each evaluation of a network's layer, with its number in the solve, from 1, and its relative
            residual; or after each of a fixed number of steps, with None. What it raises ends the restoration.

    Raises:
        CheckpointError: no such checkpoint.
        ValueError: an impossible blur; a denoiser alone; a noise level for a network that was trained for one; a
            network that is not for this kind of blur; an argument out of its range.

    Example:
        >>> import torch
        >>> from jfbfast.imaging.blurs import BlurChoice
        >>> from jfbfast.imaging.restoration import Restoration
        >>> restoration = Restoration(BlurChoice(defocus=1.5), noise=0.005, checkpoint="tikhonov")
        >>> grey, bright = restoration(torch.zeros(1, 24, 30)), restoration(torch.full((1, 20, 20), 0.5))
        >>> torch.allclose(grey.image, torch.zeros(1, 24, 30), atol=1e-3), bright.report.blur
        (True, 'a defocus of radius 1.5')
    """

    def __init__(
        self,
        blur: BlurChoice | None,
        *,
        noise: float | str | None = None,
        light: str = "linear",
        padding_mode: str = "valid",
        checkpoint: str | Path | None = None,
        tolerance: float = TOLERANCE,
        device: str | torch.device = "cpu",
        say: Callable[[str], object] = lambda _: None,
        warn: Callable[[str], object] = lambda _: None,
        watch: Watch = unwatched,
    ) -> None:
        for name, value, taken in (("light", light, LIGHTS), ("padding_mode", padding_mode, PADDING_MODES)):
            if value not in taken:
                raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(map(repr, taken))}")
        if padding_mode == "zeros" and light == "linear":
            raise ValueError("light is 'linear'; padding_mode='zeros' takes 'encoded', whose zero is mid-grey")
        checks.non_negative("tolerance", tolerance)
        if noise is not None and noise != AUTO:
            checks.non_negative("noise", noise)
        self.light, self.padding_mode, self.tolerance = light, padding_mode, tolerance
        self.device, self.say, self.warn = torch.device(device), say, warn
        if blur is not None:
            (blur.with_sigma(1.0) if blur.sigma == AUTO else blur).operator(self._mode())  # raises if it is impossible
        if checkpoint is None:
            checkpoint = self._shipped(blur, noise)
        self.network: AnyBlurNetwork | GaussianNetwork | None = None
        if checkpoint is not None and checkpoint != "tikhonov":
            self.network = load_network(str(checkpoint), blur, noise, padding_mode, self.device, say, watch)
        if isinstance(self.network, GaussianNetwork):
            blur, noise = self.network.choice, self.network.setting.noise
        if blur is None:
            raise ValueError("the blur is not given; it takes one of sigma, psf, motion, defocus")
        self.blur, self.noise = blur, noise
        if self.network is None and noise == 0:
            raise ValueError(
                "noise is 0; Tikhonov regularisation by the discrepancy principle takes a positive "
                "number: rounding to 8 bits alone is 0.0023"
            )

    def _mode(self) -> str:
        return "zeros" if self.padding_mode == "zeros" else "valid"

    def _shipped(self, blur: BlurChoice | None, noise: float | str | None) -> str | None:
        """The name of the shipped network for this blur and noise, or None for Tikhonov regularisation."""
        name, zeros = None, self.padding_mode == "zeros"
        if blur is None:
            return None
        if blur.kernel_size is not None and isinstance(blur.sigma, (int, float)) and noise != AUTO:
            level = NOISE if noise is None else float(noise)
            name = matching_name(blur.kernel_size, blur.sigma, level, "zeros" if zeros else None)
        if name is None and UNIVERSAL in installed_names():
            name = UNIVERSAL
        how = f"the shipped model {name}"
        if name is None:
            how = "Tikhonov regularisation, λ by the discrepancy principle, since this installation has no model for it"
        self.say(f"Restoring {blur} by {how}.")
        return name

    def _noise(
        self, name: str, d: Tensor, blur: BlurChoice, given: float, untrusted: Tensor
    ) -> tuple[PowerSpectrum, float, bool]:
        """The spectrum of d in the blur's light, the noise to restore for, and whether d contradicts the given one.

        ``untrusted`` says which values of d may be clipped.
        Linear light is scaled so that the noise has the level of the encoded values.
        """
        seen = d
        if self.light == "linear":
            step = max(1, min(d.shape[-2:]) // 512)  # every so many pixels say enough of a large photograph
            scale = linear_noise(d[:, ::step, ::step], 1.0)
            seen = torch.cat([to_linear(rows).div_(scale) for rows in d.split(512, dim=1)], dim=1)
        spectrum = PowerSpectrum(blur.operator("valid"), seen, untrusted)
        noise, contradicted = spectrum.plausible_noise(given)
        share = CHECKED if isinstance(blur.sigma, (int, float)) else UNCHECKED
        noise = math.hypot(noise, spectrum.mismatch(share * self.tolerance))
        if contradicted:
            self.warn(
                f"{name} is sharper or noisier than {blur} and noise of {given:.3g} could leave it. It is "
                f"restored for noise of {noise:.2g}, and can become softer than it was: check the blur and the noise "
                "level."
            )
        return spectrum, noise, contradicted

    def _plan(self, name: str, d: Tensor) -> _Plan:
        untrusted = clipped(d)
        share = int(untrusted.count_nonzero()) / max(1, d.numel())
        tolerance = 0.0 if isinstance(self.network, GaussianNetwork) else self.tolerance
        blur, given, found = known(name, d, self.blur, self.noise, tolerance, self.say, self.warn)
        spectrum, noise, contradicted = self._noise(name, d, blur, given, untrusted)
        network = None if contradicted and isinstance(self.network, GaussianNetwork) else self.network
        operator, smooth, extension = blur.operator(self._mode()), blur.operator("valid"), 0
        if isinstance(network, GaussianNetwork) and network.extends:
            operator, extension = network.blur, extension_width(network.blur)
        elif self.padding_mode not in ("valid", "zeros"):
            extension = extension_width(operator)
        mode = "replicate" if self.padding_mode == "valid" else self.padding_mode

        encoded = PowerSpectrum(smooth, d, untrusted) if self.light == "linear" else spectrum
        damping, linear_damping = (each.damping(max(noise, LEAST_NOISE)) for each in (encoded, spectrum))
        rough, rough_linear = (Tikhonov(operator, smooth, value) for value in (damping, linear_damping))
        solve = None if network is None else network.prepare(noise, operator, self.warn)
        camera, residual = Camera(operator, self.light), MeanSquare()

        def first(part: Tensor) -> Tensor:
            return to_encoded(rough_linear(to_linear(part))) if self.light == "linear" else rough(part)

        def restore(part: Tensor) -> Tensor:
            part = part.to(self.device)
            if self.light == "linear" or share > CLIPPED_SHARE:
                x = camera.restore(part, first, rough, solve)
            else:
                x = (solve or rough)(part, None)
            residual.add(camera.corrected(part, x) - operator(x))
            return cut(x, operator.margin).cpu()

        report = Report(
            method=f"Tikhonov, λ = {damping:.2g}" if network is None else network.name,
            blur=str(blur),
            light=self.light,
            padding_mode=self.padding_mode,
            noise=noise,
            contradicted=contradicted,
            clipped=share,
            estimated=found,
        )
        measured = extend(d, extension, mode) if extension else d
        return _Plan(measured, extension, restore, residual, network, report)

    def __call__(
        self,
        photo: Tensor,
        name: str = "the photograph",
        *,
        tile: int = TILE,
        overlap: int | None = None,
        check_tiles: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Restored:
        """Restore a photograph.

        Args:
            photo: (C, H, W) on [−1, 1], encoded values, any number of channels.
            name: its name in warnings.
            tile, progress: of `restore_tiled`; a photograph that fits a tile is restored in one piece.
            overlap: of `restore_tiled`; None for `seamless_overlap`.
            check_tiles: also restore in one piece, and report the `tiling_error`.

        Raises:
            TypeError: no tensor.
            ValueError: another shape; ``tile`` or ``overlap`` out of its range.
        """
        if not isinstance(photo, Tensor):
            raise TypeError(f"photo is a {type(photo).__name__}; it takes a tensor (C, H, W)")
        if photo.dim() != 3:
            raise ValueError(f"photo has shape {tuple(photo.shape)}; it takes one image (C, H, W)")
        started, d = time.perf_counter(), photo.detach().float().cpu()
        height, width = d.shape[-2:]
        measured, extension, restore, residual, network, report = self._plan(name, d)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            if max(height, width) <= tile:
                tile = max(tile, *measured.shape[-2:])
            if overlap is None:
                several = max(measured.shape[-2:]) > tile
                overlap = seamless_overlap(restore, measured, tile) if several else min(96, tile // 4)
            caught.clear()  # only the restoration itself is reported, not the measurement of the overlap
            residual.clear()
            if network is not None:
                network.solves.clear()

            def count(done: int, total: int) -> None:
                report.tiles = total
                if progress is not None:
                    progress(done, total)

            restored = restore_tiled(restore, measured, tile=tile, overlap=overlap, progress=count)
            report.unconverged = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
            report.residual = residual.root()
            if network is not None:
                report.solves = list(network.solves)
                report.evaluations = sum(solve.evaluations for solve in report.solves) / report.tiles
            if check_tiles:
                report.tiling_error = tiling_error(restore, measured, restored)
        report.seconds = time.perf_counter() - started
        return Restored(restored[:, extension : extension + height, extension : extension + width], report)


def restore(
    photo: Tensor,
    *,
    sigma: float | Sequence[float] | str | None = None,
    psf: Tensor | str | Path | None = None,
    motion: Sequence[float] | None = None,
    defocus: float | None = None,
    kernel_size: int | None = None,
    noise: float | str | None = None,
    light: str = "linear",
    padding_mode: str = "valid",
    checkpoint: str | Path | None = None,
    tolerance: float = TOLERANCE,
    device: str | torch.device = "cpu",
    tile: int = TILE,
    overlap: int | None = None,
) -> Restored:
    """Undo a known blur in a photograph of any size. `jfbfast restore` does this with files.

    Args:
        photo: (C, H, W) on [−1, 1], as its file encodes the values, with any number of channels.
        sigma, psf, motion, defocus: one of them, the blur, as in `BlurChoice`; sigma="auto" estimates a Gaussian's σ.
        kernel_size: of a Gaussian, odd; None for 2⌈3σ⌉ + 1.
        noise, light, padding_mode, checkpoint, tolerance, device: as in `Restoration`, which restores many photographs.
        tile: side in pixels of the tiles, which are restored one by one.
        overlap: pixels that tiles share; None for enough to leave no seam.

    Returns:
        The image (C, H, W), unclipped, and the `Report` on how it was restored.

    Raises:
        ValueError: a value out of its range.

    Warns:
        UserWarning: the photograph is sharper or noisier than the blur and the noise could leave it, or it hardly
            shows the blur that is to be estimated.

    Example:
        >>> import torch, jfbfast
        >>> sharp = torch.zeros(3, 48, 56)
        >>> sharp[:, :, 20:40] = 0.5
        >>> d = jfbfast.GaussianBlur(sigma=1.2, padding_mode="valid")(sharp)
        >>> restored = jfbfast.restore(d, sigma=1.2, light="encoded", noise=0.003)
        >>> restored.image.shape, restored.report.blur
        (torch.Size([3, 40, 48]), 'a Gaussian of σ = 1.2 pixels')
        >>> error, before = (float((x - sharp[:, 4:-4, 4:-4]).square().mean()) for x in (restored.image, d))
        >>> error < 0.6 * before
        True
    """
    blur = None
    if (sigma, psf, motion, defocus, kernel_size) != (None,) * 5 or checkpoint in (None, "tikhonov"):
        blur = BlurChoice(sigma, psf, motion, defocus, kernel_size)
    restoration = Restoration(
        blur,
        noise=noise,
        light=light,
        padding_mode=padding_mode,
        checkpoint=checkpoint,
        tolerance=tolerance,
        device=device,
        warn=partial(warnings.warn, stacklevel=4),
    )
    return restoration(photo, tile=tile, overlap=overlap)
