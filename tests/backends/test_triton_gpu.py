"""The Triton kernels on a real GPU against the reference, eager and replayed from a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from helpers.bands import cast, error, operator
from jfbfast import kernels
from jfbfast.backends import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    exact_bands = [cast(b, torch.float64, "cuda") for b in operator(shape[-2:], (ry, rx), mode)]
    bands, adjoint = (cast(b, dtype, "cuda") for b in exact_bands)
    x, d, r = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
    eta = torch.tensor(0.7, device="cuda")
    floor = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)

    exact = reference.blur(x.double(), exact_bands[0])
    assert error(kernels.blur(x, bands), exact) <= 2 * error(reference.blur(x, bands), exact) + floor

    exact = reference.gradient(x.double(), d.double(), r.double(), *exact_bands, eta.double())
    plain = reference.gradient(x, d, r, bands, adjoint, eta)
    assert error(kernels.gradient(x, d, r, bands, adjoint, eta), exact) <= 2 * error(plain, exact) + floor


@pytest.mark.parametrize("radius", [2, 9])
def test_a_cuda_graph_can_capture_the_kernels(radius):
    """A captured step replays on new values of its inputs, the step size included."""
    bands, adjoint = (cast(b, torch.float32, "cuda") for b in operator((64, 96), (radius, radius), "reflect"))
    x, d, r = (torch.randn(2, 3, 64, 96, device="cuda") for _ in range(3))
    eta = torch.tensor(0.5, device="cuda")
    kernels.gradient(x, d, r, bands, adjoint, eta)  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.gradient(x, d, r, bands, adjoint, eta)
    x.normal_()
    eta.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(out, reference.gradient(x, d, r, bands, adjoint, eta))


@pytest.mark.slow
def test_offsets_may_exceed_32_bits():
    bands, _ = (cast(b, torch.bfloat16, "cuda") for b in operator((3, 64), (1, 1), "zeros"))
    x = torch.zeros(2**31 // 192 + 9, 3, 64, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(3, 64)
    torch.testing.assert_close(kernels.blur(x, bands)[-1], reference.blur(x[-1], bands))
