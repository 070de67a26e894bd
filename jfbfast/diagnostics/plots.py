"""A model's diagnosis as a picture: residuals, quality, eigenvalues and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor

if TYPE_CHECKING:
    from jfbfast.diagnostics.conditioning import Report


def diagnosis(report: Report, path: str | Path) -> None:
    """Save a `Report` as a picture of four parts: residuals, quality, eigenvalues, gradients."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.6), layout="constrained")
    samples = len(report.contraction_factor)
    colours = list(plt.colormaps["viridis"](torch.linspace(0.05, 0.85, max(samples, 1)).tolist()))
    residual, quality = report.history.residual, report.history.psnr

    _curves(axes[0, 0], residual, report, colours)
    axes[0, 0].set_yscale("log")
    if report.tol > 0 and residual.numel():
        axes[0, 0].axhline(report.tol, color="grey", linestyle="--", linewidth=1)
        told = {"ha": "right", "va": "bottom", "color": "dimgrey", **_along(axes[0, 0])}
        axes[0, 0].text(1, report.tol, f"tol = {report.tol:g} ", **told)
    _label(axes[0, 0], "Residual of each sample, and where its solve stops", "evaluations of T", "‖T(x) − x‖ / ‖T(x)‖")

    if quality is None:
        axes[0, 1].text(0.5, 0.5, "no truth was given", ha="center", transform=axes[0, 1].transAxes, color="dimgrey")
        title = "Quality"
    else:
        _curves(axes[0, 1], quality, report, colours)
        title = "Quality of each sample"
        if quality.numel():
            title += f": at most {_largest(quality.amax(0) - quality[-1]):.2f} dB below its best in the end"
    _label(axes[0, 1], title, "evaluations of T", "PSNR of T(x), dB at range 2")

    _eigenvalues(axes[1, 0], report, colours)
    _gradients(axes[1, 1], report)
    figure.suptitle(f"Diagnosis of {samples} samples at their fixed points", fontsize=13)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _along(axis: Axes) -> dict[str, Any]:
    """Places text by a share of the axis' width and a value of its y."""
    return {"transform": axis.get_yaxis_transform()}


def _curves(axis: Axes, values: Tensor, report: Report, colours: list[Any]) -> None:
    """Values (E, B) against evaluations, with a dot where the model's own solve stopped."""
    for curve, colour, stop in zip(values.T, colours, report.solution.iterations.tolist(), strict=False):
        axis.semilogx(range(1, len(curve) + 1), curve, color=colour, linewidth=1.4)
        if 1 <= stop <= len(curve):
            axis.plot(stop, float(curve[stop - 1]), "o", color=colour, markersize=5)


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _eigenvalues(axis: Axes, report: Report, colours: list[Any]) -> None:
    """Ritz values in the complex plane, with the unit circle."""
    axis.add_patch(Circle((0, 0), 1, fill=False, edgecolor="black", linewidth=1))
    for values, colour in zip(report.ritz_values, colours, strict=False):
        axis.scatter(values.real, values.imag, s=14, color=colour, alpha=0.8, linewidths=0)
    axis.set_aspect("equal", adjustable="datalim")
    axis.autoscale_view()
    largest = _largest(report.contraction_factor)
    _label(axis, f"Eigenvalues of ∂T/∂x: the largest is {largest:.2f}", "real part", "imaginary part")


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.max()) if finite.numel() else float("nan")


def _gradients(axis: Axes, report: Report) -> None:
    """Cosine of each method to the exact gradient: a bar to the median, a dot a sample."""
    names = list(report.cosine)
    if not names:
        axis.text(0.5, 0.5, "the layer has no parameters", ha="center", transform=axis.transAxes, color="dimgrey")
        _label(axis, "Gradients", "", "")
        return
    for row, name in enumerate(names):
        cosine, ratio = report.cosine[name], float(report.norm_ratio[name].nanmedian())
        median = float(cosine.nanmedian())
        axis.barh(row, median, height=0.6, color="#a8c8dc")
        axis.scatter(cosine, torch.full_like(cosine, row), s=12, color="black", zorder=3)
        axis.text(1.03, row, f"{median:.4f}     {ratio:.2f}", va="center", **_along(axis))
    axis.text(1.03, -0.75, "cosine   norm ratio", fontsize=9, color="dimgrey", **_along(axis))
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    _label(axis, "Gradients against the exact one", "cosine (bar: median, dots: samples)", "")
