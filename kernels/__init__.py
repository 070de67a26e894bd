"""Triton kernels: the twins of `jfbfast.backends.reference` on a CUDA device."""

from .launch import FUSED_RADIUS, MAX_RADIUS, blur, gradient

__all__ = ["FUSED_RADIUS", "MAX_RADIUS", "blur", "gradient"]
