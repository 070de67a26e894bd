"""Scores of restoration methods on the same measurements: PSNR, SSIM, evaluations, and how the solves ended."""

from __future__ import annotations

import csv
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor, nn

from jfbfast.imaging.classical import direct_inverse, gradient_descent, tikhonov, tv
from jfbfast.imaging.datasets import Images, batches
from jfbfast.imaging.quality import PAPER_OFFSET, measure, psnr, ssim
from jfbfast.models.degrad import DEGrad
from jfbfast.models.feed_forward import plug_and_play
from jfbfast.operators.blur import SeparableBlur
from jfbfast.operators.frame import cut_to
from jfbfast.solvers import ConvergenceWarning, FixedPointSolution, Status


class Restoration(NamedTuple):
    """Restored images (B, C, H, W), with each sample's evaluations (B,) and `Status` (B,) where the method has them.

    The images have the size of the measurement or, with the padding mode "valid", the margin around it too.
    """

    images: Tensor
    evaluations: Tensor | None = None
    status: Tensor | None = None


Restore = Callable[[Tensor], Restoration]


@dataclass(frozen=True)
class Method:
    """A restoration method: ``restore(value)`` restores with a value of its parameter, one of ``candidates``.

    A method without a parameter ignores the value; its ``parameter`` is None.
    """

    name: str
    restore: Callable[[float], Restore]
    parameter: str | None = None
    candidates: Sequence[float] = (math.nan,)


@dataclass(frozen=True)
class Choice:
    """The parameter with the best mean PSNR on the validation images, and this PSNR in dB for every candidate."""

    value: float
    trials: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """How well one method restored each of N images, in their order.

    Attributes:
        psnr: (N,) in dB, at the true range 2 of images in [−1, 1]; NaN for an image that is not finite.
        ssim, evaluations, status: (N,); the last two are None if the method has none.
        seconds: for all images together.
        parameter, trials: the name and the value of the parameter, and the trials of its `Choice`.
    """

    method: str
    psnr: Tensor
    ssim: Tensor
    seconds: float
    parameter: Mapping[str, float] = field(default_factory=dict)
    evaluations: Tensor | None = None
    status: Tensor | None = None
    trials: Mapping[float, float] = field(default_factory=dict)

    @property
    def at_end(self) -> bool:
        """Whether the parameter is the smallest or the largest candidate, so that a wider grid might do better."""
        return any(value in (min(self.trials), max(self.trials)) for value in self.parameter.values() if self.trials)

    def summary(self) -> dict[str, Any]:
        """One row of the table: means over all images, with half-widths of 95% confidence intervals (Student's t)."""
        status, evaluations = self.status, self.evaluations
        return {
            "method": self.method,
            "parameter": ", ".join(f"{name} = {value:.3g}" for name, value in self.parameter.items()),
            "images": len(self.psnr),
            "psnr": float(self.psnr.mean()),
            "psnr_ci95": _half_width(self.psnr),
            "psnr_paper": float(self.psnr.mean()) - PAPER_OFFSET,
            "ssim": float(self.ssim.mean()),
            "ssim_ci95": _half_width(self.ssim),
            "evaluations_median": None if evaluations is None else float(evaluations.double().quantile(0.5)),
            "evaluations_max": None if evaluations is None else int(evaluations.max()),
            "not_converged": None if status is None else int((status == Status.MAX_ITER).sum()),
            "diverged": None if status is None else int((status == Status.DIVERGED).sum()),
            "seconds": self.seconds,
        }


def _half_width(values: Tensor) -> float:
    count = len(values)
    if count < 2:
        return math.nan
    return float(student_t.ppf(0.975, count - 1) * values.double().std() / math.sqrt(count))


def measurements(
    images: Images, blur: SeparableBlur, noise: float, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images x (b, 3, H, W) and their measurements d = A x + ν ε; neighbours of the same size share a batch.

    With the padding mode "valid", x is returned within the frame of d, in which restorations are compared with it.
    The noise depends only on the seed of the images and on the index of an image, not on the batch size.
    """
    for sample in batches(images, batch_size):
        x = sample.x.to(device)
        d = measure(x, blur, noise, sample.noise.to(device))
        yield cut_to(x, d), d


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    kept = [part.cpu() for part in parts if part is not None]
    return torch.cat(kept) if kept else None


@torch.inference_mode()
def _score(
    method: Method,
    choice: Choice,
    pairs: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] | None = None,
) -> Scores:
    restore = method.restore(choice.value)
    found: list[tuple[Tensor | None, ...]] = []
    seconds = 0.0
    for x, d in pairs:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the scores tell how the solves ended
            restored = restore(d)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds += time.perf_counter() - start
        images = cut_to(restored.images, x)
        found.append((psnr(images, x), ssim(images, x), restored.evaluations, restored.status))
        if progress is not None:
            progress(len(x))
    qualities, similarities, evaluations, status = map(_joined, zip(*found, strict=True))
    assert qualities is not None and similarities is not None
    parameter = {} if method.parameter is None else {method.parameter: choice.value}
    return Scores(method.name, qualities, similarities, seconds, parameter, evaluations, status, choice.trials)


def choose(
    method: Method,
    validation: Images,
    blur: SeparableBlur,
    noise: float,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Choice:
    """Choose a method's parameter by the best mean PSNR on ``validation``; the arguments are those of `evaluate`."""
    if len(method.candidates) == 1:
        return Choice(method.candidates[0])
    if not len(validation):
        raise ValueError(f"validation is empty; it takes images that choose {method.parameter} of {method.name}")
    pairs = list(measurements(validation, blur, noise, batch_size, device))
    trials = {value: float(_score(method, Choice(value), pairs).psnr.mean()) for value in method.candidates}
    return Choice(max(trials, key=lambda value: -math.inf if math.isnan(trials[value]) else trials[value]), trials)


def evaluate(
    method: Method,
    images: Images,
    validation: Images,
    blur: SeparableBlur,
    noise: float,
    *,
    choice: Choice | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score a method on ``images``, with the parameter that is best on ``validation``.

    Args:
        method: the method.
        images: the images to score; none is left out, whatever the method makes of it.
        validation: other images, which choose the parameter.
        blur, noise: of the measurements; the noise as a standard deviation for images in [−1, 1].
        choice: the result of `choose` for the same arguments, if it is known.
        batch_size: images restored together, which changes no score.
        device: where to restore.
        progress: called with the number of images of each batch.

    Raises:
        ValueError: there are no images, or no validation images for a method with a parameter.
    """
    if not len(images):
        raise ValueError("images is empty; it takes at least one to score")
    if choice is None:
        choice = choose(method, validation, blur, noise, batch_size=batch_size, device=device)
    return _score(method, choice, measurements(images, blur, noise, batch_size, device), progress)


def _solved(solution: FixedPointSolution) -> Restoration:
    return Restoration(solution.value, solution.iterations, solution.status)


def network_method(name: str, model: nn.Module) -> Method:
    """A trained network as a method without a parameter."""

    def restore(d: Tensor) -> Restoration:
        images = model(d)
        solution = model.solution if isinstance(model, DEGrad) else None
        return Restoration(images) if solution is None else _solved(solution)._replace(images=images)

    return Method(name, lambda _: restore)


def _logarithmic(low: float, high: float, count: int) -> list[float]:
    return [float(v) for v in np.geomspace(low, high, count)]


def baseline_methods(blur: SeparableBlur, denoiser: nn.Module | None = None) -> dict[str, Method]:
    """The methods that need no training for this blur, by name; "pnp" only if there is a ``denoiser``.

    Example:
        >>> import jfbfast
        >>> from jfbfast.experiments.evaluation import baseline_methods
        >>> list(baseline_methods(jfbfast.GaussianBlur(5, 1.0)))
        ['blurred', 'direct-inverse', 'gradient-descent', 'tikhonov', 'tv']
    """

    def descend(steps: float) -> Restore:
        def restore(d: Tensor) -> Restoration:
            found = gradient_descent(blur, d, max_iter=int(steps))
            return Restoration(found.value, found.iterations)

        return restore

    steps = [1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 450, 640]
    methods = [
        Method("blurred", lambda _: Restoration),
        Method("direct-inverse", lambda _: lambda d: Restoration(direct_inverse(blur, d.double()).to(d.dtype))),
        Method("gradient-descent", descend, "steps", steps),
        Method("tikhonov", lambda v: lambda d: Restoration(tikhonov(blur, d, v)), "damping", _logarithmic(1e-6, 1, 49)),
        Method("tv", lambda v: lambda d: _solved(tv(blur, d, v)), "weight", _logarithmic(1e-4, 0.03, 11)),
    ]
    if denoiser is not None:

        def pnp(weight: float) -> Restore:
            return lambda d: _solved(plug_and_play(blur, d, denoiser, weight))

        methods.append(Method("pnp", pnp, "weight", _logarithmic(3e-3, 3, 13)))
    return {method.name: method for method in methods}


def write_scores(path: Path, scores: Sequence[Scores], about: Mapping[str, Any]) -> None:
    """Write the table as CSV; or if the suffix is .json as JSON, with each image's scores, all trials and ``about``."""
    rows = [s.summary() for s in scores]
    if path.suffix.lower() == ".json":
        for row, found in zip(rows, scores, strict=True):
            columns = {name: getattr(found, name) for name in ("psnr", "ssim", "evaluations", "status")}
            row["tuning"] = [{"value": v, "validation_psnr": quality} for v, quality in found.trials.items()]
            row["per_image"] = {name: values.tolist() for name, values in columns.items() if values is not None}
        text = json.dumps({**about, "methods": rows})
        content = json.loads(text, parse_constant=lambda _: None)  # null for NaN, which JSON does not have
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
