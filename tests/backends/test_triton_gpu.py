"""The Triton twins on a real GPU against the reference, eager and replayed from a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from jfbfast import kernels
from jfbfast.backends import reference
from jfbfast.backends.reference import Bands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def operator(height: int, width: int, ry: int, rx: int, mode: str, dtype: torch.dtype) -> tuple[Bands, Bands, Bands]:
    """Asymmetric tables in the kernels' dtype, their adjoint's, and the first in float64, on the GPU."""
    generator = torch.Generator().manual_seed(ry + 10 * rx)
    taps = [(torch.rand(2 * r + 1, generator=generator, dtype=torch.float64) / (r + 1)).tolist() for r in (ry, rx)]
    tables = (reference.band_table(t, n, mode).cuda() for t, n in zip(taps, (height, width), strict=True))
    exact = Bands(*tables, mode == "circular")

    def cast(bands: Bands) -> Bands:
        return Bands(*(t.to(reference.band_dtype(dtype)).contiguous() for t in bands[:2]), bands.circular)

    return cast(exact), cast(reference.transpose(exact)), exact


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", reference.PADDING_MODES)
@pytest.mark.parametrize(
    ("shape", "ry", "rx"),
    [
        ((2, 3, 128, 128), 2, 2),
        ((3, 33, 65), 1, 3),
        ((70, 131), 0, 4),
        ((2, 512, 516), 7, 5),
        ((1, 3, 200, 300), 31, 9),
    ],
)
def test_against_float64(shape, ry, rx, mode, dtype):
    bands, adjoint, exact_bands = operator(*shape[-2:], ry, rx, mode, dtype)
    x, d, r = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
    eta = torch.tensor(0.7, device="cuda")
    floor = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)

    exact = reference.blur(x.double(), exact_bands)
    assert error(kernels.blur(x, bands), exact) <= 2 * error(reference.blur(x, bands), exact) + floor

    wide = (x.double(), d.double(), r.double(), eta.double(), exact_bands, reference.transpose(exact_bands))
    exact = reference.gradient_step(*wide)
    plain = reference.gradient_step(x, d, r, eta, bands, adjoint)
    assert error(kernels.gradient(x, d, r, bands, adjoint, eta), exact) <= 2 * error(plain, exact) + floor


@pytest.mark.parametrize("radius", [2, 9])
def test_cuda_graph(radius):
    """A captured step replays on new values of its inputs, the step size included."""
    bands, adjoint, _ = operator(64, 96, radius, radius, "reflect", torch.float32)
    x, d, r = (torch.randn(2, 3, 64, 96, device="cuda") for _ in range(3))
    eta = torch.tensor(0.5, device="cuda")
    kernels.gradient(x, d, r, bands, adjoint, eta)  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.gradient(x, d, r, bands, adjoint, eta)
    x.normal_()
    eta.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(out, reference.gradient_step(x, d, r, eta, bands, adjoint))


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    bands, _, _ = operator(3, 64, 1, 1, "zeros", torch.bfloat16)
    x = torch.zeros(2**31 // 192 + 9, 3, 64, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(3, 64)
    torch.testing.assert_close(kernels.blur(x, bands)[-1], reference.blur(x[-1], bands))
