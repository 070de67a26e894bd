"""Restore what someone uploaded, as `jfbfast restore` would: with limits, and so that it can be stopped."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F

from jfbfast.imaging.batch import FAILURES, Job, failure, plan_jobs, restore_file
from jfbfast.imaging.blurs import AUTO, SIGMAS, BlurChoice, numbers
from jfbfast.imaging.photographs import Metadata, Photograph, read_photograph, write_photograph
from jfbfast.imaging.restoration import Restoration
from jfbfast.models.pretrained import UNIVERSAL, installed_names

TIKHONOV = "tikhonov"
_SHOWN = 6000  # pixels of the longer side of a picture on the page


class Limits(NamedTuple):
    """The largest uploads: of the file in megabytes, and of the photograph in megapixels."""

    megabytes: float = 100.0
    megapixels: float = 50.0

    @property
    def bytes(self) -> int:
        return int(self.megabytes * 1e6)

    @property
    def pixels(self) -> int:
        return int(self.megapixels * 1e6)


class Stopped(Exception):
    """The user has stopped the restoration, or has gone."""


@dataclass(frozen=True)
class Choices:
    """What someone has chosen on the page.

    Attributes:
        blur: which of the next five gives the blur: "auto", "gaussian", "motion" (length and angle), "defocus",
            "psf", or "own" for a network's own.
        sigma: as typed: a number of pixels, or two of them, down and across.
        length, radius: in pixels.
        angle: in degrees.
        psf: a file.
        noise: as typed: a number, auto, or nothing for `Restoration`'s own choice.
        light, checkpoint: of `Restoration`.
    """

    blur: str = AUTO
    sigma: str = ""
    length: float | None = None
    angle: float | None = None
    radius: float | None = None
    psf: str | None = None
    noise: str = ""
    light: str = "linear"
    checkpoint: str = UNIVERSAL

    def choice(self) -> BlurChoice | None:
        """The blur; None for the network's own.

        Raises:
            ValueError: what gives this blur is missing, or no number.
        """
        if self.blur == "own":
            return None
        if self.blur == AUTO:
            return BlurChoice(AUTO)
        if self.blur == "gaussian":
            values = numbers("σ", self.sigma.strip() or "empty", (1, 2), SIGMAS)
            return BlurChoice(values[0] if len(values) == 1 else values)
        if self.blur == "motion":
            return BlurChoice(motion=(_given("length", self.length), _given("angle", self.angle)))
        if self.blur == "defocus":
            return BlurChoice(defocus=_given("radius", self.radius))
        if self.psf is None:
            raise ValueError("the PSF file is missing; it takes the image of a point, as .png, .tif or .npy")
        return BlurChoice(psf=self.psf)

    def level(self) -> float | str | None:
        """The noise level.

        Raises:
            ValueError: neither a number nor auto.
        """
        text = self.noise.strip()
        return text or None if text in ("", AUTO) else numbers("noise", text, (1,), "a number, or auto")[0]

    def command(self, photograph: str) -> str:
        """The command line that writes the same file."""
        given = {
            AUTO: ["--sigma", AUTO],
            "gaussian": ["--sigma", self.sigma.replace(" ", "")],
            "motion": ["--motion", f"{_typed(self.length)},{_typed(self.angle)}"],
            "defocus": ["--defocus", _typed(self.radius)],
            "psf": ["--psf", Path(self.psf or "").name],
        }
        options = given.get(self.blur, [])
        options += ["--noise", self.noise.strip()] if self.noise.strip() else []
        options += ["--light", self.light] if self.light != "linear" else []
        options += ["--checkpoint", self.checkpoint] if self.checkpoint != UNIVERSAL else []
        name = f"./{photograph}" if photograph.startswith("-") else photograph  # else it would look like an option
        return shlex.join(["jfbfast", "restore", name, *options])


def _given(name: str, value: float | None) -> float:
    if value is None:
        raise ValueError(f"the {name} is empty; it takes a number")
    return float(value)


def _typed(value: float | None) -> str:
    """A number as someone would type it, without loss."""
    return "" if value is None else repr(float(value)).removesuffix(".0")


def checkpoints() -> list[str]:
    """What can restore: the installed networks, universal first, and Tikhonov regularisation."""
    return [*sorted(installed_names(), key=lambda name: name != UNIVERSAL), TIKHONOV]


class Outcome(NamedTuple):
    """A restored photograph.

    Attributes:
        file: what `jfbfast restore` writes.
        before, after: pictures of the photograph and of its restoration, for the page.
        report: the values of the `Report` on it.
        sentences, warnings: what the restoration said.
        command: the command line that writes the same file.
    """

    file: Path
    before: Path
    after: Path
    report: dict[str, Any]
    sentences: list[str]
    warnings: list[str]
    command: str


def write_picture(photograph: Photograph, path: Path) -> None:
    """Write a photograph as a JPEG that a browser shows, without alpha; a large one is made smaller."""
    pixels = photograph.pixels
    if (step := -(-max(pixels.shape[-2:]) // _SHOWN)) > 1:
        pixels = F.avg_pool2d(pixels[None], step, ceil_mode=True)[0]
    write_photograph(path, Photograph(pixels, None, np.dtype("uint8"), Metadata(icc=photograph.metadata.icc)))


def without_folders(text: str, *files: Path | str | None) -> str:
    """A sentence that names files on the server by their names alone."""
    for file in files:
        text = text if file is None else text.replace(f"{Path(file).parent}/", "")
    return text


class Work:
    """The restoration of one upload, which another thread watches.

    Args:
        source: the photograph.
        folder: an empty one for the results.
        choices: of the user.
        limits: on the photograph.
        stop: if it is set, the restoration ends with `Stopped` after the next evaluation of the network, or tile.

    Attributes:
        tiles: how many are done, and of how many; None before that is known.
        residuals: of the solves so far, with the one that runs.
    """

    def __init__(self, source: Path, folder: Path, choices: Choices, limits: Limits, stop: threading.Event) -> None:
        self.source, self.folder, self.choices, self.limits, self._stop = source, folder, choices, limits, stop
        self.tiles: tuple[int, int] | None = None
        self.residuals: list[list[float]] = []
        self.evaluations = 0
        self.sentences: list[str] = []
        self.warnings: list[str] = []

    def check(self) -> None:
        if self._stop.is_set():
            raise Stopped("stopped")

    def _watch(self, evaluation: int, residual: float | None) -> None:
        self.evaluations += 1
        if residual is not None:
            if evaluation == 1:
                self.residuals.append([])
            self.residuals[-1].append(residual)
        self.check()

    def _progress(self, done: int, total: int) -> None:
        self.tiles = done, total
        self.check()

    def _collect(self, where: list[str]) -> Callable[[str], None]:
        def told(sentence: str) -> None:
            where.append(self.shown(sentence))
            self.check()

        return told

    def shown(self, text: str) -> str:
        return without_folders(text, self.source, self.folder / "x", self.choices.psf)

    def run(self) -> Outcome:
        """Restore.

        Raises:
            Stopped: the user has stopped it.
            ValueError: it cannot be restored, and why, in a sentence.
        """
        job: Job | None = None
        try:
            self.check()
            choices = self.choices
            restoration = Restoration(
                choices.choice(),
                noise=choices.level(),
                light=choices.light,
                checkpoint=choices.checkpoint,
                say=self._collect(self.sentences),
                warn=self._collect(self.warnings),
                watch=self._watch,
            )
            (job,) = plan_jobs([self.source], self.folder)
            _, report = restore_file(job, restoration, most_pixels=self.limits.pixels, progress=self._progress)
            before, after = self.folder / "before.jpg", self.folder / "after.jpg"
            write_picture(read_photograph(job.source), before)
            write_picture(read_photograph(job.target), after)
        except FAILURES as error:
            raise ValueError(self.shown(str(error) if job is None else failure(job, error))) from error
        report["blur"] = self.shown(report["blur"])
        command = choices.command(self.source.name)
        return Outcome(job.target, before, after, report, self.sentences, self.warnings, command)
