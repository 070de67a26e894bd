"""Triton kernels for CUDA devices: functions of `jfbfast.backends.reference`."""

from .launch import FUSED_RADIUS, MAX_RADIUS, blur, gradient

__all__ = ["FUSED_RADIUS", "MAX_RADIUS", "blur", "gradient"]
