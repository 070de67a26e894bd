"""Is an implicit network well conditioned, and does its gradient method suit it? `report` measures."""

from jfbfast.diagnostics.conditioning import gradient_agreement, jfb_condition, lipschitz_bound
from jfbfast.diagnostics.history import convergence_history
from jfbfast.diagnostics.reports import Report, report

__all__ = [
    "Report",
    "convergence_history",
    "gradient_agreement",
    "jfb_condition",
    "lipschitz_bound",
    "report",
]
