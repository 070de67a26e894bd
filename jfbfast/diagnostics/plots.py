"""The picture of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor

from jfbfast.diagnostics.measurements import Measurements


def diagnosis(m: Measurements, path: str | Path) -> None:
    """Save a picture of four parts: residuals, quality, eigenvalues, gradients."""
    figure, ((residuals, quality), (eigenvalues, gradients)) = plt.subplots(
        2, 2, figsize=(11, 8.6), layout="constrained"
    )
    samples = len(m.contraction_factor)
    colours = list(plt.colormaps["viridis"](torch.linspace(0.05, 0.85, max(samples, 1)).tolist()))
    _residuals(residuals, m, colours)
    _quality(quality, m, colours)
    _eigenvalues(eigenvalues, m, colours)
    _gradients(gradients, m)
    figure.suptitle(f"Diagnosis of {samples} samples at their fixed points", fontsize=13)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _residuals(axis: Axes, m: Measurements, colours: list[Any]) -> None:
    _curves(axis, m.history.residual, m, colours)
    axis.set_yscale("log")
    if m.tol > 0 and m.history.residual.numel():
        axis.axhline(m.tol, color="grey", linestyle="--", linewidth=1)
        beside = axis.get_yaxis_transform()  # x in shares of the axis' width
        axis.text(1, m.tol, f"tol = {m.tol:g} ", ha="right", va="bottom", color="dimgrey", transform=beside)
    _label(axis, "Residual of each sample, and where its solve stops", "evaluations of T", "‖T(x) − x‖ / ‖T(x)‖")


def _quality(axis: Axes, m: Measurements, colours: list[Any]) -> None:
    title, psnr = "Quality of each sample", m.history.psnr
    if psnr is None:
        title = "Quality"
        _note(axis, "no truth was given")
    else:
        _curves(axis, psnr, m, colours)
        if psnr.numel():
            title += f": at most {_largest(psnr.amax(0) - psnr[-1]):.2f} dB below its best in the end"
    _label(axis, title, "evaluations of T", "PSNR of T(x), dB at range 2")


def _eigenvalues(axis: Axes, m: Measurements, colours: list[Any]) -> None:
    """Ritz values in the complex plane, with the unit circle."""
    axis.add_patch(Circle((0, 0), 1, fill=False, edgecolor="black", linewidth=1))
    for values, colour in zip(m.ritz_values, colours, strict=False):
        axis.scatter(values.real, values.imag, s=14, color=colour, alpha=0.8, linewidths=0)
    axis.set_aspect("equal", adjustable="datalim")
    axis.autoscale_view()
    largest = _largest(m.contraction_factor)
    _label(axis, f"Eigenvalues of ∂T/∂x: the largest is {largest:.2f}", "real part", "imaginary part")


def _gradients(axis: Axes, m: Measurements) -> None:
    """Cosine of each method's gradient to the exact one: a bar for the median, a dot for each sample."""
    if not m.cosine:
        _note(axis, "the layer has no parameters")
        return _label(axis, "Gradients", "", "")
    beside = axis.get_yaxis_transform()  # x in shares of the axis' width
    for row, (name, cosine) in enumerate(m.cosine.items()):
        median, ratio = float(cosine.nanmedian()), float(m.norm_ratio[name].nanmedian())
        axis.barh(row, median, height=0.6, color="#a8c8dc")
        axis.scatter(cosine, torch.full_like(cosine, row), s=12, color="black", zorder=3)
        axis.text(1.03, row, f"{median:.4f}     {ratio:.2f}", va="center", transform=beside)
    axis.text(1.03, -0.75, "cosine   norm ratio", fontsize=9, color="dimgrey", transform=beside)
    axis.set_yticks(range(len(m.cosine)), list(m.cosine))
    axis.set_ylim(len(m.cosine) - 0.5, -0.5)
    _label(axis, "Gradients against the exact one", "cosine (bar: median, dots: samples)", "")


def _curves(axis: Axes, values: Tensor, m: Measurements, colours: list[Any]) -> None:
    """Values (E, B) against evaluations, with a dot where the model's own solve stopped."""
    for curve, colour, stop in zip(values.T, colours, m.solution.iterations.tolist(), strict=False):
        axis.semilogx(range(1, len(curve) + 1), curve, color=colour, linewidth=1.4)
        if 1 <= stop <= len(curve):
            axis.plot(stop, float(curve[stop - 1]), "o", color=colour, markersize=5)


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11, loc="left")
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _note(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes, color="dimgrey")


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.max()) if finite.numel() else float("nan")
