"""Triton kernels for CUDA devices: functions of `jfbfast.backends.reference`."""

from .launch import FUSED_RADIUS, MAX_RADIUS, add_relu, blur, gradient

__all__ = ["FUSED_RADIUS", "MAX_RADIUS", "add_relu", "blur", "gradient"]
