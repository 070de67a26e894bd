"""The measurement operator A, its adjoint, and functions of AᵀA."""

from jfbfast.operators.blur import GaussianBlur, SeparableBlur
from jfbfast.operators.convolution import Blur
from jfbfast.operators.iterative import IterativeOperator

__all__ = ["Blur", "GaussianBlur", "IterativeOperator", "SeparableBlur"]
