"""The report on a restored photograph."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from jfbfast.imaging.estimation import Estimate


@dataclass(frozen=True)
class Solve:
    """One solve of a network for a tile; in linear light, a tile takes three, each for a corrected measurement.

    Attributes:
        evaluations: of the network's layer.
        status: the name of its `Status`; "" for a network with a fixed number of steps.
        residuals: ‖T(x) − x‖ / ‖T(x)‖ at each evaluation, and last that of the result; none for fixed steps.
    """

    evaluations: int
    status: str = ""
    residuals: tuple[float, ...] = ()


@dataclass
class Report:
    """How a photograph was restored.

    Attributes:
        method: what restored it.
        blur: the blur that was undone, in words.
        light, padding_mode: as given.
        noise: the noise level that it was restored for: the given or estimated one, or the higher one that the
            photograph shows, and what the tolerance adds to it.
        estimated: what the photograph shows of its blur and noise, if one of them was to be estimated, else None.
        contradicted: whether the photograph is sharper or noisier than the given blur and noise could leave it.
        clipped: the share of its values that may be clipped.
        evaluations: of the network's layer, the mean number in a tile; None for Tikhonov regularisation.
        unconverged: the number of solves that did not converge.
        solves: of the network, in turn; none for Tikhonov regularisation.
        residual: root mean square of d − F(x), with what the camera makes of the restored scene, on [−1, 1].
        tiles: their number.
        tiling_error: with ``check_tiles``, the largest difference from the restoration in one piece, on [−1, 1].
        seconds: that it took.
    """

    method: str
    blur: str
    light: str
    padding_mode: str
    noise: float
    contradicted: bool
    clipped: float
    estimated: Estimate | None = None
    evaluations: float | None = None
    unconverged: int = 0
    solves: list[Solve] = field(default_factory=list)
    residual: float = math.nan
    tiles: int = 1
    tiling_error: float | None = None
    seconds: float = 0.0

    def values(self) -> dict[str, Any]:
        """The attributes, for JSON."""
        estimated = None if self.estimated is None else self.estimated._asdict()
        return {**asdict(self), "estimated": estimated}

    def __str__(self) -> str:
        parts = [self.method]
        if self.tiling_error is not None:
            parts.append(f"tiles differ by {self.tiling_error / 2:.1e} of white")
        if self.unconverged:
            parts.append(f"{self.unconverged} solves did not converge")
        return "; ".join(parts)


class Restored(NamedTuple):
    """A restored photograph: ``image`` (C, H, W) on [−1, 1], unclipped, and the `Report` on it."""

    image: Tensor
    report: Report


class MeanSquare:
    """The mean square of what is added."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().square().sum())
        self.count += values.numel()

    def root(self) -> float:
        return math.sqrt(self.total / self.count) if self.count else math.nan
