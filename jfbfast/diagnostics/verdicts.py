"""What the figures of a `Report` mean: a verdict beside each, and what to do where it is poor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from jfbfast.solvers import Status

if TYPE_CHECKING:
    from jfbfast.diagnostics.conditioning import Report

PENALTY = "--jacobian-penalty 1e-3"
CONTRACT = f"train with {PENALTY}"
NEAR_ONE = 0.9  # above it x ← T(x) takes more than 22 evaluations for a digit
SETTLED = 0.1  # of the tolerance: with tol = 0 a sound solve goes far below it
DRIFT = (0.1, 0.5)  # dB below the best of a solve: what nobody sees, and what everybody does
ALIGNED = (0.9, 0.5)  # cosines: within 26° of the exact gradient, and 60°, where half of a step is wasted


class Row(NamedTuple):
    """A line of the report: a figure of each sample, (B,), which is the worst, how to print it, and its verdict."""

    name: str
    values: Tensor
    worst: Callable[[Tensor], Tensor]
    form: str
    verdict: str


def _row(
    name: str,
    values: Tensor,
    worst: Callable[[Tensor], Tensor],
    form: str,
    *grades: tuple[Callable[[float], bool], str],
) -> Row:
    """The first of the ``grades`` that the worst sample passes is the verdict; none where no sample is a number."""
    finite = values[~values.isnan()].double()
    if not finite.numel():
        return Row(name, values, worst, form, "no figure: every sample diverged")
    worst_value = float(worst(finite))
    return Row(name, values, worst, form, next((told for passes, told in grades if passes(worst_value)), ""))


def _otherwise(value: float) -> bool:
    return True


def rows(r: Report) -> Iterator[Row]:
    """Every figure of a report with its verdict, by the worst sample: good, fair or poor."""
    yield _row(
        "contraction factor γ",
        r.contraction_factor,
        torch.max,
        "{:.3f}",
        (lambda v: v < NEAR_ONE, "good: x ← T(x) converges"),
        (lambda v: v < 1, f"fair: it converges slowly; {CONTRACT}"),
        (_otherwise, f"poor: no contraction, a solve may diverge; {CONTRACT}"),
    )
    yield _row(
        "operator norm ‖∂T/∂x‖",
        r.operator_norm,
        torch.max,
        "{:.3f}",
        (lambda v: v < 1, "good: every step contracts"),
        (_otherwise, "fair: a step may lead away at first; γ decides"),
    )
    if r.lipschitz_bound is not None:
        yield _row(
            "bound on γ",
            r.lipschitz_bound,
            torch.max,
            "{:.3f}",
            (lambda v: v < 1, "good: λ/(√λ+√δ)² · Lip(D) proves γ < 1"),
            (_otherwise, "fair: λ/(√λ+√δ)² · Lip(D) proves nothing; γ decides"),
        )
    lowest = r.ritz_values.real.amin(1)
    averaging = 2 / (1 - float(lowest.nan_to_num(0).min())) if len(lowest) else 1.0
    yield _row(
        "lowest Re μ",
        lowest,
        torch.min,
        "{:.3f}",
        (lambda v: v > -1, "good: needs no averaging"),
        (_otherwise, f"poor: x ← T(x) swings out; train with --averaging below {averaging:.2f}, or {PENALTY}"),
    )
    yield _row(
        "highest Re μ",
        r.ritz_values.real.amax(1),
        torch.max,
        "{:.3f}",
        (lambda v: v < NEAR_ONE, "good: I − ∂T/∂x is far from singular"),
        (lambda v: v < 1, f"fair: I − ∂T/∂x is close to singular; {CONTRACT}"),
        (_otherwise, f"poor: x* repels, and no averaging helps; {CONTRACT}"),
    )
    if r.jfb_condition is not None:
        holds = bool((r.jfb_condition * r.contraction_factor < 1)[~r.jfb_condition.isnan()].all())
        theorem = "open: this lower bound allows JFB's theorem, κ < 1/γ"
        fails = "fair: JFB's theorem, κ < 1/γ, says nothing here; its cosine decides"
        yield _row("κ(MᵀM), at least", r.jfb_condition, torch.max, "{:.3g}", (_otherwise, theorem if holds else fails))
        yield _row("1/γ", 1 / r.contraction_factor, torch.min, "{:.3g}", (_otherwise, "see κ and γ"))
    yield _evaluations(r)
    marks = [k for k in (10, 30, 100, 300) if k <= len(r.history.residual)]
    for k in marks[-1:]:
        yield _row(
            f"residual at {k}",
            r.history.residual[k - 1],
            torch.max,
            "{:.1e}",
            (lambda v: v <= SETTLED * r.tol or v < 1e-6, "good: with tol = 0 it settles far below tol"),
            (lambda v: v <= r.tol, "fair: its floor is near tol; ask for no smaller --tol"),
            (_otherwise, f"poor: it stays above tol = {r.tol:g}; {CONTRACT}"),
        )
    if r.history.psnr is not None:
        for k in marks:
            yield _quality(k, r.history.psnr)
    for name, cosine in r.cosine.items():
        yield _gradient(name, cosine, float(r.norm_ratio[name].nanmedian()))


def _evaluations(r: Report) -> Row:
    diverged, late = (int((r.solution.status == status).sum()) for status in (Status.DIVERGED, Status.MAX_ITER))
    told = f"good: all converge to tol = {r.tol:g}"
    if diverged or (late and r.tol > 0):
        told = f"poor: {diverged} diverged, {late} stopped above tol = {r.tol:g}; a larger --max-iter, or {CONTRACT}"
    elif late:
        told = "good: all that tol = 0 asks for"
    return Row("evaluations", r.solution.iterations, torch.max, "{:.0f}", told)


def _quality(k: int, psnr: Tensor) -> Row:
    """PSNR after k evaluations, and how far it has come down from the best that a sample had until then."""
    least, most = DRIFT
    drift = (psnr[:k].nan_to_num(-torch.inf).amax(0) - psnr[k - 1]).nan_to_num(0)
    lost = float(drift.max()) if drift.numel() else 0.0
    told = f"good: within {least:g} dB of the best before"
    if lost > most:
        told = f"poor: {lost:.1f} dB below the best before; train with --form filtered, whose fixed points stay"
    elif lost > least:
        told = f"fair: {lost:.1f} dB below the best before; stop at a larger --tol"
    return _row(f"PSNR at {k}", psnr[k - 1], torch.min, "{:.2f}", (_otherwise, told))


def _gradient(name: str, cosine: Tensor, ratio: float) -> Row:
    aligned, half = ALIGNED
    size = f"; norm ratio {ratio:.3f}"
    closer = "a larger max_iter of its solve" if name == "implicit" else "train with --gradient implicit"
    return _row(
        f"cosine of {name}",
        cosine,
        torch.min,
        "{:.4f}",
        (lambda v: v > aligned, f"good: points as the exact gradient{size}"),
        (lambda v: v > half, f"fair: descends, on a detour{size}"),
        (_otherwise, f"poor: {closer}, or {PENALTY}{size}"),
    )
