"""Differentiating a fixed point x* = T(x*; inputs, Θ): one autograd function, one class a method."""

from jfbfast.gradients.function import fixed_point, solve_fixed_point
from jfbfast.gradients.methods import (
    JFB,
    GradientMethod,
    Implicit,
    Jacobian,
    Neumann,
    Phantom,
    Shine,
    Unrolled,
    gradient_method,
)

__all__ = [
    "JFB",
    "GradientMethod",
    "Implicit",
    "Jacobian",
    "Neumann",
    "Phantom",
    "Shine",
    "Unrolled",
    "fixed_point",
    "gradient_method",
    "solve_fixed_point",
]
