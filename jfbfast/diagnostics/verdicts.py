"""A verdict on every figure of a report, and what to do where it is poor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast.diagnostics.measurements import Measurements
from jfbfast.solvers import Status

PENALTY = "--jacobian-penalty 1e-3"
CONTRACT = f"train with {PENALTY}"
NEAR_ONE = 0.9  # above it x ← T(x) takes more than 22 evaluations for a digit
SETTLED = 0.1  # times the tolerance: with tol = 0 a sound solve goes far below it
DRIFT = (0.1, 0.5)  # dB below the best of a solve: nobody sees the first, and everybody sees the second
ALIGNED = (0.9, 0.5)  # cosines: within 26° of the exact gradient, and within 60°, where half of a step is wasted


class Row(NamedTuple):
    """One figure: its median and its worst sample, as printed, and the verdict on the worst."""

    name: str
    median: str
    worst: str
    verdict: str


def _row(
    name: str, values: Tensor, otherwise: str, *limits: tuple[float, str], form: str = "{:.3f}", lowest: bool = False
) -> Row:
    """Grade the largest of the values (B,), or the lowest.

    The verdict is the first one with a limit above the worst value (below it, if the lowest is graded), or
    ``otherwise`` if there is none.
    """
    numbers = values[~values.isnan()].double()
    if not numbers.numel():
        return Row(name, "–", "–", "no figure: every sample diverged")
    worst = float(numbers.min() if lowest else numbers.max())
    verdict = next((told for limit, told in limits if (worst > limit if lowest else worst < limit)), otherwise)
    return Row(name, form.format(float(numbers.median())), form.format(worst), verdict)


def rows(m: Measurements) -> Iterator[Row]:
    """Every figure with its verdict on the worst sample: good, fair or poor."""
    yield _row(
        "contraction factor γ",
        m.contraction_factor,
        f"poor: no contraction, a solve may diverge; {CONTRACT}",
        (NEAR_ONE, "good: x ← T(x) converges"),
        (1, f"fair: it converges slowly; {CONTRACT}"),
    )
    told = "fair: a step may lead away at first; γ decides"
    yield _row("operator norm ‖∂T/∂x‖", m.operator_norm, told, (1, "good: every step contracts"))
    if m.lipschitz_bound is not None:
        bound = "λ/(√λ+√δ)² · Lip(D) proves"
        told = f"fair: {bound} nothing; γ decides"
        yield _row("bound on γ", m.lipschitz_bound, told, (1, f"good: {bound} γ < 1"))
    yield from _eigenvalues(m.ritz_values.real)
    if m.jfb_condition is not None:
        holds = bool((m.jfb_condition * m.contraction_factor < 1)[~m.jfb_condition.isnan()].all())
        theorem = "open: this lower bound allows JFB's theorem, κ < 1/γ"
        fails = "fair: JFB's theorem, κ < 1/γ, says nothing here; its cosine decides"
        yield _row("κ(MᵀM), at least", m.jfb_condition, theorem if holds else fails, form="{:.3g}")
        yield _row("1/γ", 1 / m.contraction_factor, "see κ and γ", form="{:.3g}", lowest=True)
    yield _evaluations(m)
    marks = [k for k in (10, 30, 100, 300) if k <= len(m.history.residual)]
    for k in marks[-1:]:
        yield _row(
            f"residual at {k}",
            m.history.residual[k - 1],
            f"poor: it stays above tol = {m.tol:g}; {CONTRACT}",
            (max(SETTLED * m.tol, 1e-6), "good: with tol = 0 it settles far below tol"),
            (m.tol, "fair: its floor is near tol; ask for no smaller --tol"),
            form="{:.1e}",
        )
    if m.history.psnr is not None:
        for k in marks:
            yield _quality(k, m.history.psnr)
    for name, cosine in m.cosine.items():
        yield _gradient(name, cosine, float(m.norm_ratio[name].nanmedian()))


def _eigenvalues(real: Tensor) -> Iterator[Row]:
    """The real parts, (B, k): the lowest decides whether x ← T(x) oscillates, the highest whether x* repels."""
    lowest = real.amin(1)
    averaging = 2 / (1 - float(lowest.nan_to_num(0).min())) if len(lowest) else 1.0
    told = f"poor: x ← T(x) swings out; train with --averaging below {averaging:.2f}, or {PENALTY}"
    yield _row("lowest Re μ", lowest, told, (-1, "good: needs no averaging"), lowest=True)
    yield _row(
        "highest Re μ",
        real.amax(1),
        f"poor: x* repels, and no averaging helps; {CONTRACT}",
        (NEAR_ONE, "good: I − ∂T/∂x is far from singular"),
        (1, f"fair: I − ∂T/∂x is close to singular; {CONTRACT}"),
    )


def _evaluations(m: Measurements) -> Row:
    diverged, late = (int((m.solution.status == status).sum()) for status in (Status.DIVERGED, Status.MAX_ITER))
    told = f"good: all converge to tol = {m.tol:g}"
    if diverged or (late and m.tol > 0):
        told = f"poor: {diverged} diverged, {late} stopped above tol = {m.tol:g}; a larger --max-iter, or {CONTRACT}"
    elif late:
        told = "good: tol = 0 takes all evaluations"
    return _row("evaluations", m.solution.iterations, told, form="{:.0f}")


def _quality(k: int, psnr: Tensor) -> Row:
    """PSNR after k evaluations, graded by its loss since the best of the evaluations before."""
    least, most = DRIFT
    drift = (psnr[:k].nan_to_num(-torch.inf).amax(0) - psnr[k - 1]).nan_to_num(0)
    lost = float(drift.max()) if drift.numel() else 0.0
    told = f"good: within {least:g} dB of the best before"
    if lost > most:
        told = f"poor: {lost:.1f} dB below the best before; train with --form filtered, whose fixed points stay"
    elif lost > least:
        told = f"fair: {lost:.1f} dB below the best before; stop at a larger --tol"
    return _row(f"PSNR at {k}", psnr[k - 1], told, form="{:.2f}", lowest=True)


def _gradient(name: str, cosine: Tensor, ratio: float) -> Row:
    size = f"; norm ratio {ratio:.3f}"
    closer = "a larger max_iter of its solve" if name == "implicit" else "train with --gradient implicit"
    limits = zip(
        ALIGNED, (f"good: points as the exact gradient{size}", f"fair: descends, on a detour{size}"), strict=True
    )
    return _row(f"cosine of {name}", cosine, f"poor: {closer}, or {PENALTY}{size}", *limits, form="{:.4f}", lowest=True)
