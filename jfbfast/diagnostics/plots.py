"""Matplotlib figures of a report and of a solve's history; they need no display, and pyplot keeps none of them."""

from __future__ import annotations

from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from jfbfast.diagnostics.history import History
from jfbfast.diagnostics.measurements import Measurements


def diagnosis(m: Measurements) -> Figure:
    """A figure of four parts: residuals, quality, eigenvalues, gradients."""
    figure = Figure(figsize=(11, 8.6), layout="constrained")
    (residuals, quality), (eigenvalues, gradients) = figure.subplots(2, 2)
    samples = len(m.contraction_factor)
    colours, stops = _colours(samples), m.solution.iterations.tolist()
    _residuals(residuals, m.history, m.tol, colours, stops)
    _quality(quality, m.history, colours, stops)
    _eigenvalues(eigenvalues, m, colours)
    _gradients(gradients, m)
    figure.suptitle(f"Diagnosis of {samples} samples at their fixed points", fontsize=13)
    return figure


def history(found: History, tol: float = 0.0) -> Figure:
    """A figure of a `convergence_history`: each sample's residual over the evaluations, and its quality if known.

    Args:
        found: the history.
        tol: a tolerance to mark; 0 for none. A dot shows where each sample's residual first reaches it.

    Example:
        >>> import torch, jfbfast
        >>> from jfbfast.diagnostics import convergence_history, plots
        >>> found = convergence_history(lambda x: x / 2 + 1, x0=torch.zeros(1, 2), iterations=5)
        >>> figure = plots.history(found, tol=1e-3)
        >>> figure.axes[0].get_ylabel()
        '‖T(x) − x‖ / ‖T(x)‖'
    """
    parts = 1 if found.psnr is None else 2
    figure = Figure(figsize=(5.5 * parts, 4.3), layout="constrained")
    axes = figure.subplots(1, parts, squeeze=False)[0]
    reached = found.residual <= tol
    first = torch.where(reached.any(0), reached.int().argmax(0) + 1, 0) if len(reached) else reached.new_zeros(0)
    stops, colours = first.tolist(), _colours(found.residual.shape[-1])
    _residuals(axes[0], found, tol, colours, stops)
    if found.psnr is not None:
        _quality(axes[1], found, colours, stops)
    return figure


def _colours(samples: int) -> list[Any]:
    return list(matplotlib.colormaps["viridis"](torch.linspace(0.05, 0.85, max(samples, 1)).tolist()))


def _residuals(axis: Axes, found: History, tol: float, colours: list[Any], stops: list[int]) -> None:
    _curves(axis, found.residual, colours, stops)
    axis.set_yscale("log")
    if tol > 0 and found.residual.numel():
        axis.axhline(tol, color="grey", linestyle="--", linewidth=1)
        beside = axis.get_yaxis_transform()  # x in shares of the axis' width
        axis.text(1, tol, f"tol = {tol:g} ", ha="right", va="bottom", color="dimgrey", transform=beside)
    _label(axis, "Residual of each sample, and where its solve stops", "evaluations of T", "‖T(x) − x‖ / ‖T(x)‖")


def _quality(axis: Axes, found: History, colours: list[Any], stops: list[int]) -> None:
    title, psnr = "Quality of each sample", found.psnr
    if psnr is None:
        title = "Quality"
        _note(axis, "no truth was given")
    else:
        _curves(axis, psnr, colours, stops)
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


def _curves(axis: Axes, values: Tensor, colours: list[Any], stops: list[int]) -> None:
    """Values (E, B) against evaluations, with a dot where each sample's solve stops; 0 if it does not."""
    for curve, colour, stop in zip(values.T, colours, stops, strict=False):
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
