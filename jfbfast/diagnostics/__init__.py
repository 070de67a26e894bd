"""Is an implicit network well conditioned, and does its gradient method suit it? `report` measures."""

from jfbfast.diagnostics.conditioning import (
    Report,
    gradient_agreement,
    jfb_condition,
    lipschitz_bound,
    report,
)
from jfbfast.diagnostics.history import convergence_history

__all__ = [
    "Report",
    "convergence_history",
    "gradient_agreement",
    "jfb_condition",
    "lipschitz_bound",
    "report",
]
