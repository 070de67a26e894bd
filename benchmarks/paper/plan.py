"""What the paper's parts are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """Photographs, networks and sizes.

    Attributes:
        data: directory of photographs; None takes three of scikit-image's.
        checkpoints: role, of `jfbfast.benchmarks.paper.study.ROLES`, to a shipped name or a file.
        kernel_size, sigma, noise, padding_mode: of the measurements; None for the first network's.
        train, validation, limit: of `jfbfast evaluate`: photographs that are left out, that choose parameters,
            and that are scored at most; None for a run's on the same photographs, or 0 and 0.2.
        resize, squash: of `jfbfast evaluate`; the paper's images are 128 × 128, squashed.
        batch_size: images restored together.
        pictures: images in Table 1.
        runs: directories of `jfbfast train`, or NAME=DIRECTORY, whose curves Figure 1 shows; with none, it trains.
        published: minutes to train the published loop for, as one more curve of Figure 1; None for no such curve.
        images: photographs that Figure 1 trains on and validates on, 80 to 20, first by name.
        steps, crop, training_batch, training_max_iter: of that training.
        sizes, step_batch: of the images in Figure 2.
        evaluations: of the layer in each solve of Figure 2.
        seconds: for the rounds at one size.
        cap: seconds; a Jacobian-based step that is expected to take longer is extrapolated.
        seed: of measurements and training.
    """

    data: Path | None = None
    checkpoints: Mapping[str, str] = field(default_factory=lambda: {"ours": "gaussian5-sigma1"})
    kernel_size: int | None = None
    sigma: float | None = None
    noise: float | None = None
    padding_mode: str | None = None
    train: float | None = None
    validation: float | None = None
    limit: int | None = None
    resize: int | None = 128
    squash: bool = True
    batch_size: int = 16
    pictures: int = 3
    runs: tuple[str, ...] = ()
    published: float | None = None
    images: int = 2000
    steps: int = 2000
    crop: int = 128
    training_batch: int = 16
    training_max_iter: int = 50
    sizes: tuple[int, ...] = (16, 32, 48, 64, 80, 96, 112, 128)
    step_batch: int = 16
    evaluations: int = 20
    seconds: float = 20.0
    cap: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pictures", "steps", "crop", "training_batch", "step_batch", "evaluations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes an integer of at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it takes None or an integer of at least 1")
        if self.images < 2:
            raise ValueError(f"images is {self.images}; it takes an integer of at least 2")
        if self.published is not None and not 0 < self.published < math.inf:
            raise ValueError(f"published is {self.published}; it takes a positive number of minutes")
        if not self.sizes or min(self.sizes) < 8:
            raise ValueError(f"sizes is {self.sizes}; it takes integers of at least 8")


QUICK = replace(
    Plan(),
    validation=2,
    limit=4,
    resize=64,
    pictures=2,
    images=10,
    steps=8,
    crop=32,
    training_batch=4,
    training_max_iter=8,
    sizes=(16, 24, 32),
    step_batch=4,
    evaluations=5,
    seconds=2.0,
    cap=10.0,
)
