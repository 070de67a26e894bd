"""What the paper's parts are made of: photographs, networks and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from jfbfast import checks

SIZES = (16, 32, 48, 64, 80, 96, 112, 128)


@dataclass(frozen=True)
class Plan:
    """Every annotated field is an option of `jfbfast bench paper`, and its annotation is the help."""

    data: Path | None = None  # directory of photographs; None takes three of scikit-image's
    checkpoints: Mapping[str, str] = field(default_factory=lambda: {"ours": "gaussian5-sigma1"})  # by role of `ROLES`
    runs: Annotated[
        tuple[str, ...],
        "Directory of jfbfast train for figure1, as [NAME=]DIR; may be repeated. (default: figure1 trains two)",
    ] = ()
    published: Annotated[
        float | None,
        "Minutes for figure1 to train the paper's layer by its published loop too. (default: it does not)",
    ] = None
    kernel_size: Annotated[int | None, "Side of the blur in pixels, odd. (default: as for --ours)"] = None
    sigma: Annotated[float | None, "Standard deviation of the blur in pixels. (default: as for --ours)"] = None
    noise: Annotated[float | None, "Standard deviation of the noise on [−1, 1]. (default: as for --ours)"] = None
    padding_mode: Annotated[str | None, "What the blur sees beyond the edge. (default: as for --ours)"] = None
    train: Annotated[
        float | None,
        "Photographs that the tables leave out, first by name: a share or a count. "
        "(default: those that a network's run trained on, or 0)",
    ] = None
    validation: Annotated[
        float | None,
        "Photographs that choose parameters, next by name: a share or a count. "
        "(default: those that it validated on, or 0.2)",
    ] = None
    limit: Annotated[int | None, "Most photographs to score, of the rest. (default: all)"] = None
    resize: Annotated[
        int | None, "First resize to a square of this side in pixels, like the paper; 0 for no resizing."
    ] = 128
    squash: Annotated[bool, "With --resize, stretch to that square, like the paper, instead of keeping the centre."] = (
        True
    )
    batch_size: Annotated[int, "Images restored together."] = 16
    pictures: Annotated[int, "Images in table1."] = 3
    images: Annotated[int, "Photographs that figure1 trains and validates on, 80 to 20, first by name."] = 2000
    steps: Annotated[int, "Batches of figure1's training."] = 2000
    crop: Annotated[int, "Side of figure1's crops in pixels."] = 128
    sizes: Annotated[tuple[int, ...], "Sides of figure2's images in pixels, with commas between."] = SIZES
    evaluations: Annotated[int, "Evaluations of the layer in figure2's solves."] = 20
    cap: Annotated[float, "Seconds; figure2 extrapolates a Jacobian-based step that would take longer."] = 120.0
    seed: Annotated[int, "Seed of all random numbers."] = 0
    training_batch: int = 16  # in figure1
    training_max_iter: int = 50
    step_batch: int = 16  # in figure2
    seconds: float = 20.0  # for the rounds at one size

    def __post_init__(self) -> None:
        for name in ("pictures", "steps", "crop", "training_batch", "step_batch", "evaluations", "batch_size"):
            checks.integer(name, getattr(self, name), 1)
        checks.integer("images", self.images, 2)
        if self.limit is not None:
            checks.integer("limit", self.limit, 1)
        if self.published is not None:
            checks.positive("published", self.published)
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
