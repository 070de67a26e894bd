"""Restoration methods compared on the same measurements: PSNR, SSIM, evaluations, and how solves ended."""

from __future__ import annotations

import csv
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from jfbfast.solvers import ConvergenceWarning, FixedPointSolution, Status


class Restoration(NamedTuple):
    """Restored images (B, C, H, W), and for each sample its evaluations and `Status`, where there are such."""

    images: Tensor
    evaluations: Tensor | None = None
    status: Tensor | None = None


Restore = Callable[[Tensor], Restoration]


@dataclass(frozen=True)
class Method:
    """A restoration method with at most one parameter, which validation images choose.

    Attributes:
        name: of its row.
        restore: the restoration for one value of the parameter.
        parameter: its name; None for a method without one.
        candidates: its values to choose from.
    """

    name: str
    restore: Callable[[float], Restore]
    parameter: str | None = None
    candidates: Sequence[float] = (math.nan,)


@dataclass(frozen=True)
class Choice:
    """A method's parameter, and how it was chosen.

    Attributes:
        value: of the best mean PSNR on the validation images.
        trials: that PSNR in dB at the true range 2, for every candidate; empty for a method without a parameter.
    """

    value: float
    trials: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """What one method reached on every image, in the order of the images.

    Attributes:
        method: its name.
        parameter: what validation chose, by name.
        psnr: (N,) in dB, at the true range 2 of images in [−1, 1]; NaN for an image that is not finite.
        ssim: (N,).
        evaluations, status: (N,), or None.
        seconds: for all images, on whatever device they were.
        trials: of the `Choice` of the parameter.
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
        """Whether the parameter is the least or the largest candidate, so that a wider grid might do better."""
        return any(value in (min(self.trials), max(self.trials)) for value in self.parameter.values() if self.trials)

    def summary(self) -> dict[str, Any]:
        """One row: means over all images, with half-widths of 95% confidence intervals (Student's t)."""
        status, evaluations = self.status, self.evaluations
        return {
            "method": self.method,
            "parameter": _told(self.parameter),
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


def _told(parameter: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:.3g}" for name, value in parameter.items())


def _half_width(values: Tensor) -> float:
    count = len(values)
    if count < 2:
        return math.nan
    return float(student_t.ppf(0.975, count - 1) * values.double().std() / math.sqrt(count))


def measurements(
    images: Images, blur: SeparableBlur, noise: float, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images x and their measurements d = A x + ν ε, (b, 3, H, W) each; neighbours of one size share a batch.

    ε depends on the images' seed and an image's index alone.
    """
    for sample in batches(images, batch_size):
        x = sample.x.to(device)
        yield x, measure(x, blur, noise, sample.noise.to(device))


@torch.inference_mode()
def _scores(
    method: Method,
    value: float,
    pairs: Iterator[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] | None,
) -> Scores:
    restore = method.restore(value)
    columns: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "evaluations": [], "status": []}
    seconds = 0.0
    for x, d in pairs:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the scores tell
            found = restore(d)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds += time.perf_counter() - start
        columns["psnr"].append(psnr(found.images, x).cpu())
        columns["ssim"].append(ssim(found.images, x).cpu())
        for name, values in (("evaluations", found.evaluations), ("status", found.status)):
            if values is not None:
                columns[name].append(values.cpu())
        if progress is not None:
            progress(len(x))
    joined = {name: torch.cat(values) if values else None for name, values in columns.items()}
    assert joined["psnr"] is not None and joined["ssim"] is not None
    chosen = {} if method.parameter is None else {method.parameter: value}
    return Scores(method.name, joined["psnr"], joined["ssim"], seconds, chosen, joined["evaluations"], joined["status"])


def choose(
    method: Method,
    validation: Images,
    blur: SeparableBlur,
    noise: float,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Choice:
    """A method's parameter, the one of the best mean PSNR on ``validation``.

    Args:
        method, validation, blur, noise, batch_size, device: as in `evaluate`.

    Raises:
        ValueError: a method with a parameter, and no validation images.
    """
    if len(method.candidates) == 1:
        return Choice(method.candidates[0])
    if not len(validation):
        raise ValueError(f"validation is empty; it takes images that choose {method.parameter} of {method.name}")
    pairs = list(measurements(validation, blur, noise, batch_size, device))
    quality = [float(_scores(method, v, iter(pairs), None).psnr.mean()) for v in method.candidates]
    best = int(np.argmax(np.nan_to_num(quality, nan=-np.inf)))
    return Choice(method.candidates[best], dict(zip(method.candidates, quality, strict=True)))


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
    """A method's scores on ``images``, its parameter the one of the best mean PSNR on ``validation``.

    Args:
        method: what to evaluate.
        images: to score; each is scored, whatever became of it.
        validation: other images, which choose the parameter.
        blur, noise: of the measurements.
        choice: what `choose` said of the same; None to choose here.
        batch_size: images restored together, which changes no score.
        device: to restore on.
        progress: called with the number of images of each batch scored.

    Raises:
        ValueError: no images; a method with a parameter, and no validation images.
    """
    if not len(images):
        raise ValueError("images is empty; it takes at least one to score")
    if choice is None:
        choice = choose(method, validation, blur, noise, batch_size=batch_size, device=device)
    found = _scores(method, choice.value, measurements(images, blur, noise, batch_size, device), progress)
    return replace(found, trials=choice.trials)


def _solved(solution: FixedPointSolution) -> Restoration:
    return Restoration(solution.value, solution.iterations, solution.status)


def network_method(name: str, model: nn.Module) -> Method:
    """A trained network."""

    def restore(d: Tensor) -> Restoration:
        images = model(d)
        solution = model.solution if isinstance(model, DEGrad) else None
        if solution is None:
            return Restoration(images)
        return Restoration(images, solution.iterations, solution.status)

    return Method(name, lambda _: restore)


def _logarithmic(low: float, high: float, count: int) -> list[float]:
    return [float(v) for v in np.geomspace(low, high, count)]


def baseline_methods(blur: SeparableBlur, denoiser: nn.Module | None = None) -> dict[str, Method]:
    """The untrained methods, by name; "pnp" with a denoiser alone."""

    def descend(steps: float) -> Restore:
        def restore(d: Tensor) -> Restoration:
            found = gradient_descent(blur, d, max_iter=int(steps))
            return Restoration(found.value, found.iterations)

        return restore

    methods = [
        Method("blurred", lambda _: Restoration),
        Method("direct-inverse", lambda _: lambda d: Restoration(direct_inverse(blur, d.double()).to(d.dtype))),
        Method(
            "gradient-descent",
            descend,
            "steps",
            [1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 450, 640],
        ),
        Method("tikhonov", lambda v: lambda d: Restoration(tikhonov(blur, d, v)), "damping", _logarithmic(1e-6, 1, 49)),
        Method("tv", lambda v: lambda d: _solved(tv(blur, d, v)), "weight", _logarithmic(1e-4, 0.03, 11)),
    ]
    if denoiser is not None:
        network = denoiser
        methods.append(
            Method(
                "pnp",
                lambda v: lambda d: _solved(plug_and_play(blur, d, network, v)),
                "weight",
                _logarithmic(3e-3, 3, 13),
            )
        )
    return {method.name: method for method in methods}


def _without_nan(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: _without_nan(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_scores(path: Path, scores: Sequence[Scores], about: Mapping[str, Any]) -> None:
    """The rows as CSV, or, by the suffix .json, with every image's scores, every trial, and what ``about`` tells."""
    rows = [s.summary() for s in scores]
    if path.suffix.lower() == ".json":
        for row, found in zip(rows, scores, strict=True):
            columns = {name: getattr(found, name) for name in ("psnr", "ssim", "evaluations", "status")}
            row["tuning"] = [{"value": v, "validation_psnr": quality} for v, quality in found.trials.items()]
            row["per_image"] = {name: values.tolist() for name, values in columns.items() if values is not None}
        content = _without_nan({**about, "methods": rows})
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tuning(path: Path, scores: Sequence[Scores]) -> None:
    """Every candidate of every parameter as CSV: its mean PSNR on the validation images, and whether it was chosen.

    ``at_end`` is that of the `Scores`, of the choice.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "parameter", "value", "validation_psnr", "chosen", "at_end"))
        for found in scores:
            for name, chosen in found.parameter.items():
                for value, quality in found.trials.items():
                    taken = value == chosen
                    writer.writerow((found.method, name, value, quality, taken, taken and found.at_end))
