"""What the page says about a restoration, as HTML in which every text of the user's is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from jfbfast.app.restoring import Outcome, Work
from jfbfast.imaging.networks import SOLVE_TOL

# Sizes of the plot, in units of its own; gradio's LinePlot has no logarithmic axis.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 240, 54, 10, 12, 44


def paragraph(text: str, kind: str = "") -> str:
    """A sentence; kind "error" or "warning" marks it."""
    name = f"{kind.capitalize()}: " if kind else ""
    return f'<p class="{kind or "plain"}">{escape(name + text)}</p>'


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def progress(work: Work, seconds: float) -> str:
    """How far a restoration is."""
    parts = [f"Restoring, {seconds:.0f} s"]
    if work.tiles is not None and work.tiles[1] > 1:
        parts.append(f"tile {work.tiles[0]} of {work.tiles[1]} done")
    if work.evaluations:
        parts.append(_count(work.evaluations, "evaluation"))
    if work.residuals:
        parts.append(f"residual {work.residuals[-1][-1]:.1e}")
    return paragraph("; ".join(parts) + ".")


def findings(outcome: Outcome) -> str:
    """How a photograph was restored: warnings first, and then what was estimated and what the solves did."""
    report = outcome.report
    rows = [("Restored by", report["method"]), ("Blur", report["blur"])]
    if (found := report["estimated"]) is not None:
        for name, value, (low, high) in (
            ("Estimated σ", found["sigma"], found["sigma_range"]),
            ("Estimated noise", found["noise"], found["noise_range"]),
        ):
            rows.append((name, f"{value:.3g} (80% range {low:.3g} to {high:.3g})"))
    rows += [
        ("Noise restored for", f"{report['noise']:.3g} on [−1, 1]"),
        ("Clipped values", f"{report['clipped']:.1%}"),
        ("Misfit to the photograph", f"{report['residual']:.2g} on [−1, 1], root mean square"),
    ]
    solves = report["solves"]
    if solves:
        told = [each["status"].lower().replace("_", " ") or "fixed number of steps" for each in solves]
        counts = ", ".join(f"{told.count(status)} {status}" for status in dict.fromkeys(told))
        rows += [("Solves", counts), ("Evaluations", str(sum(each["evaluations"] for each in solves)))]
    if report["tiles"] > 1:
        rows.append(("Tiles", str(report["tiles"])))
    rows.append(("Time", f"{report['seconds']:.1f} s"))
    warned = "".join(paragraph(text, "warning") for text in outcome.warnings)
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    command = escape(outcome.command)
    return (
        f"{warned}<dl>{listed}</dl><p>The same on the command line:</p>"
        f'<pre tabindex="0" aria-label="The same on the command line"><code>{command}</code></pre>'
    )


def residuals(solves: Sequence[Sequence[float]]) -> str:
    """A plot of the relative residuals of each solve, one after the other, on a logarithmic scale; "" for none."""
    solves = [[max(each, 1e-12) for each in solve if math.isfinite(each)] for solve in solves]
    solves = [solve for solve in solves if solve]
    if not solves:
        return ""
    count = sum(map(len, solves))
    values = [each for solve in solves for each in solve]
    low, high = math.floor(math.log10(min(*values, SOLVE_TOL))), math.ceil(math.log10(max(*values, SOLVE_TOL)))

    def across(evaluation: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (evaluation - 0.5) / count

    def down(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - math.log10(value)) / (high - low)

    drawn = []
    for power in range(low, high + 1):
        y = down(10.0**power)
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    step = max(1, round(count / 6))
    for evaluation in range(step, count + 1, step):
        x = across(evaluation)
        drawn.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{evaluation}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    drawn.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">evaluation of the network</text>')
    y = down(SOLVE_TOL)
    drawn.append(f'<line class="tolerance" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    drawn.append(f'<text x="{_WIDTH - _RIGHT}" y="{y - 5:.1f}" text-anchor="end">tolerance</text>')
    first = 1
    for solve in solves:
        points = [(across(first + k), down(value)) for k, value in enumerate(solve)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(f'<polyline points="{line}"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points if count <= 100]
        first += len(solve)
    told = f"Residuals of {_count(len(solves), 'solve')}, from {values[0]:.2g} to {values[-1]:.2g}"
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}">{"".join(drawn)}</svg>'
        f"<figcaption>Residuals ‖T(x) − x‖ / ‖T(x)‖ of the solves, one line each; the last point is that of the "
        f"result.</figcaption></figure>"
    )


def table(solves: Sequence[dict[str, Any]], most: int = 12) -> str:
    """The solves in numbers: the first ``most`` of them."""
    if not solves:
        return ""
    rows = []
    for number, solve in enumerate(solves[:most], 1):
        numbers = ", ".join(f"{value:.1e}" for value in solve["residuals"]) or "–"
        status = solve["status"].lower().replace("_", " ") or "fixed steps"
        rows.append(f"<tr><td>{number}</td><td>{status}</td><td>{solve['evaluations']}</td><td>{numbers}</td></tr>")
    left = f"<p>{len(solves) - most} more solves are not listed.</p>" if len(solves) > most else ""
    head = "<tr><th>Solve</th><th>Status</th><th>Evaluations</th><th>Residuals</th></tr>"
    return (
        f"<details><summary>The solves in numbers</summary>"
        f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>{left}</details>"
    )
