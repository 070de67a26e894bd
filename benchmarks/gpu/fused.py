"""Whether the convolutions of a solve, fused by cuDNN and Triton, are right on a device (jfbfast/backends/fused.py)."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from jfbfast.backends import fused


@torch.no_grad()
def fused_convolutions(device: torch.device) -> dict[str, Any]:
    """Compare convolution, bias, and ReLU or addend with float64, in memory that was full of NaN.

    Returns:
        ok; the largest error relative to the largest number; and for how many kinds of convolutions cuDNN's fused call
        is used, and why it is not for others.
    """
    if device.type != "cuda":
        return {"left_out": "the device is no GPU"}
    worst = 0.0
    for dtype, (inputs, outputs), size, relu in product(
        (torch.float32, torch.bfloat16, torch.float16), ((3, 64), (24, 64), (64, 64), (96, 96)), (16, 33), (True, False)
    ):
        x = torch.randn(2, inputs, size, size + 4, device=device, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        weight = torch.randn(outputs, inputs, 3, 3, device=device, dtype=dtype) / (9 * inputs) ** 0.5
        bias = torch.randn(outputs, device=device, dtype=dtype)
        expected = torch.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        addend = None if relu else torch.randn(expected.shape, device=device, dtype=dtype)
        expected = expected.relu() if addend is None else expected + addend.double()
        for _ in range(2):
            torch.full(expected.shape, torch.nan, device=device, dtype=dtype)  # what uninitialised memory will hold
            found = fused.convolution(x, weight, bias, fused.Geometry(padding=1), relu, addend).double()
            error = float((found - expected).abs().max() / expected.abs().max())
            worst = error if not error <= worst else worst
    return {"ok": worst <= 2e-2, "error": worst, "cudnn": fused.describe()}
