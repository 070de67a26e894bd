"""`python -m jfbfast.benchmarks.convolutions`: Winograd's convolution and its gradients against oneDNN's, on the CPU.

The unit is GFLOP/s of the direct convolution: 2 · 9 · C² · B · H · W operations, by the time of the call. Winograd's
F(4 × 4, 3 × 3) multiplies a quarter as often, so its bound is four times the speed of the best float32 matrix product.
The backward of a convolution is the input gradient and the weight gradient, each with as many operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from jfbfast.backends import native, reference

from . import machine
from .report import markdown_table
from .timing import interleave, timed

CHANNELS, SIZES = (32, 64, 96, 128), (16, 32, 64, 128)
KINDS = ("forward", "input gradient", "weight gradient")
_CPU = torch.device("cpu")


def fastest_product(seconds: float = 0.2) -> float:
    """GFLOP/s of the best float32 matrix product that torch has here."""
    best = 0.0
    for size in (256, 512, 1024):
        a, b = torch.randn(2, size, size)
        products: dict[str, Callable[[], object]] = {"torch": partial(torch.mm, a, b)}
        if torch.backends.mkldnn.is_available():  # on some CPUs far faster than torch's own
            products["oneDNN"] = partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
        sides = {name: partial(timed, call, _CPU) for name, call in products.items()}
        times = interleave(sides, seconds, print).values()
        best = max(best, *(2e-9 * size**3 / time.seconds.q1 for time in times))
    return best


def calls(channels: int, size: int, batch: int, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], object]]]:
    """For each kind, our call and oneDNN's: forward with a ReLU and a weight that has been transformed."""
    shape = batch, channels, size, size
    x, gradient = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight = (torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)
    bias = torch.randn(channels).to(dtype)
    transformed = native.winograd_weights(weight.float())
    theirs = weight.contiguous(memory_format=torch.channels_last)

    def backward(to_x: bool) -> object:
        window = (1, 1), (1, 1), (1, 1), False, (0, 0), 1
        mask = to_x, not to_x, not to_x
        return torch.ops.aten.convolution_backward(gradient, x, theirs, [channels], *window, mask)

    return {
        "forward": {
            "jfbfast": lambda: native.conv3x3(x, weight, bias, True, transformed),
            "oneDNN": lambda: reference.conv3x3(x, theirs, bias, True),
        },
        "input gradient": {
            "jfbfast": lambda: native.conv3x3(gradient, weight, None, False, None, True),
            "oneDNN": lambda: backward(True),
        },
        "weight gradient": {
            "jfbfast": lambda: native.conv3x3_weight_gradient(x, gradient),
            "oneDNN": lambda: backward(False),
        },
    }


def main(seconds: float = 0.15) -> None:
    """Measure all cases, each for about ``seconds``, and print a table in Markdown."""
    bound = 4 * fastest_product()
    print(f"{machine.about(_CPU)}\n\nThe bound is {bound:.0f} GFLOP/s. jfbfast / oneDNN (jfbfast's share of it):\n")
    header = ["channels", "images", *(f"{kind}, {name}" for name in ("float32", "bfloat16") for kind in KINDS)]
    lines = []
    for channels in CHANNELS:
        for size in SIZES:
            batch = 2 if size < 64 else 1
            line = [str(channels), f"{batch}×{size}²"]
            for dtype in (torch.float32, torch.bfloat16):
                for sides in calls(channels, size, batch, dtype).values():
                    times = interleave(
                        {name: partial(timed, call, _CPU) for name, call in sides.items()}, seconds, print
                    )
                    ours, theirs = (18e-9 * channels**2 * batch * size**2 / t.seconds.median for t in times.values())
                    line.append(f"{ours:.0f} / {theirs:.0f} ({ours / bound:.2f})")
            lines.append(line)
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()
