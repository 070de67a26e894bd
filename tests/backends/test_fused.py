"""jfbfast.backends.fused with stand-ins for cuDNN, on the CPU: what it computes, and when it leaves the fused call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jfbfast
from jfbfast.backends import conv3x3, fused
from jfbfast.backends.fused import Geometry

PADDED = Geometry(padding=1)


class CuDNN:
    """A stand-in for cuDNN's fused call; ``answer`` makes its result from the right one."""

    def __init__(self, answer: Callable[[Tensor], Tensor] = lambda right: right) -> None:
        self.answer, self.calls, self.arguments = answer, 0, []

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls += 1
        self.arguments.append(arguments)
        return self.answer(torch.conv2d(*arguments).relu())


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> CuDNN:
    """torch.ops.aten.cudnn_convolution_relu, where the CPU takes itself for a GPU."""
    stand_in = CuDNN()
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", stand_in)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fused, "_why_not", {})
    return stand_in


def made(dtype: torch.dtype = torch.float32, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 7, 9), (6, 4 // groups, 3, 3), (6,))
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x.contiguous(memory_format=torch.channels_last), weight, bias


CASES = [(1, 1, 1, 1), ((2, 1), (1, 0), (1, 2), 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), CASES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_convolution_and_what_follows(
    cudnn: CuDNN, dtype: torch.dtype, stride: Any, padding: Any, dilation: Any, groups: int, with_bias: bool
) -> None:
    x, weight, bias = made(dtype, groups)
    given = bias if with_bias else None
    geometry = Geometry(stride, padding, dilation, groups)
    plain = torch.conv2d(x, weight, given, *geometry)
    tolerance = 4 * torch.finfo(dtype).eps
    for relu, addend in ((True, None), (False, plain.cos()), (False, None)):
        expected = plain if addend is None else plain + addend
        expected = expected.relu() if relu else expected
        for _ in range(2):
            found = fused.convolution(x, weight, given, geometry, relu, addend)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 8)
    assert cudnn.calls == (3 if with_bias else 0)  # the comparison, and two results


def test_cudnn_gets_pairs(cudnn: CuDNN) -> None:
    x, weight, bias = made()
    fused.convolution(x, weight, bias, Geometry(1, [1, 1]), True)
    assert cudnn.arguments[-1][3:] == ((1, 1), (1, 1), (1, 1), 1)


def refuses(right: Tensor) -> Tensor:
    raise RuntimeError("FIND was unable to find an engine\nand more")


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "FIND was unable to find an engine": refuses,
    "its error is nan": lambda right: right * torch.nan,
    "its error is": lambda right: right + 0.05 * right.max(),
    "it gives the shape": lambda right: right[:1],
}


@pytest.mark.parametrize("reason", FAULTS)
def test_what_fails_is_computed_separately_and_told(cudnn: CuDNN, reason: str) -> None:
    cudnn.answer = FAULTS[reason]
    x, weight, bias = made()
    expected = torch.conv2d(x, weight, bias, padding=1).relu()
    for _ in range(3):
        found = fused.convolution(x, weight, bias, PADDED, True)
        torch.testing.assert_close(found, expected)
    assert cudnn.calls == 1
    assert f"used for 0 kinds of convolutions so far; not for others: {reason}" in fused.describe()


def test_each_kind_is_compared_once_and_none_during_a_capture(cudnn: CuDNN, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = made()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        fused.convolution(x, weight, bias, PADDED, True)
    assert cudnn.calls == 0
    for image in (x, x[:1], x.contiguous(), x):
        fused.convolution(image, weight, bias, PADDED, True)
    assert cudnn.calls == 7
    assert "used for 3 kinds" in fused.describe()


def test_it_serves_no_gradients_and_no_mixed_dtypes(cudnn: CuDNN) -> None:
    x, weight, bias = made()
    assert fused.serves(x, weight, bias, PADDED)
    assert not fused.serves(x, weight.bfloat16(), bias, PADDED)
    assert not fused.serves(x, weight, bias, PADDED, x.double())
    assert not fused.serves(x, weight, bias, Geometry(padding="same"))
    assert not fused.serves(x[:0], weight, bias, PADDED)
    weight.requires_grad_()
    assert not fused.serves(x, weight, bias, PADDED)
    with torch.no_grad():
        assert fused.serves(x, weight, bias, PADDED)


def test_an_addend_of_another_shape_is_refused(cudnn: CuDNN) -> None:
    x, weight, bias = made()
    with pytest.raises(ValueError, match=r"addend has shape \(1, 6, 1, 1\)"):
        fused.convolution(x, weight, bias, PADDED, False, torch.zeros(1, 6, 1, 1))


def test_a_solve_uses_it_for_relus_and_residual_blocks(cudnn: CuDNN, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding, the result is that of the separate operations."""
    torch.manual_seed(0)
    blur = jfbfast.GaussianBlur(5, 1.0)
    denoiser = jfbfast.UNet(channels=1, features=(4, 8), blocks=(1, 1))
    solver = jfbfast.Anderson(tol=0, max_iter=3)
    net = jfbfast.DEGrad(blur, jfbfast.RED(denoiser), preconditioner="exact", solver=solver)
    d = blur(torch.rand(2, 1, 16, 16))
    with monkeypatch.context() as patch:
        patch.setattr(fused, "serves", lambda *_: False)
        expected = net(d)
    addends = []
    plain = fused.convolution
    monkeypatch.setattr(
        conv3x3.fused, "convolution", lambda *given: (addends.append(given[-1] is not None), plain(*given))[1]
    )
    torch.testing.assert_close(net(d), expected, rtol=1e-5, atol=1e-5)
    assert addends == [False, True] * 9  # three blocks at each of three evaluations
    assert cudnn.calls == 11  # two kinds compared; each block's first convolution


def test_the_reference_backend_fuses_nothing(cudnn: CuDNN) -> None:
    x, weight, bias = made()
    expected = torch.conv2d(x, weight, bias, padding=1).relu()
    with jfbfast.backend("reference"):
        assert not conv3x3._onednn_fuses_relu(x, weight, bias, PADDED)
        torch.testing.assert_close(conv3x3.convolution(x, weight, bias, PADDED, relu=True), expected)
    assert cudnn.calls == 0
    assert fused.serves(x, weight, bias, PADDED) and conv3x3._onednn_fuses_relu(x, weight, bias, PADDED)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [(64, 64), (24, 64), (3, 8)])
def test_on_a_gpu_what_is_used_is_right(
    channels: tuple[int, int], dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether cuDNN's fused call is used or left; memory full of NaN must not enter the result."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", precision)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    x = torch.randn(2, channels[0], 33, 20, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels[1], channels[0], 3, 3, device="cuda", dtype=dtype) / (9 * channels[0]) ** 0.5
    bias, addend = torch.randn(channels[1], device="cuda", dtype=dtype), None
    exact = torch.conv2d(x.double().cpu(), weight.double().cpu(), bias.double().cpu(), padding=1)
    tolerance = 1e-4 if precision == "ieee" and dtype == torch.float32 else 3e-2
    for relu in (True, False):
        addend = None if relu else torch.randn(exact.shape, device="cuda", dtype=dtype)
        expected = exact.relu() if addend is None else exact + addend.double().cpu()
        for _ in range(3):
            torch.full(exact.shape, torch.nan, device="cuda", dtype=dtype)
            found = fused.convolution(x, weight, bias, PADDED, relu, addend)
            torch.testing.assert_close(found.double().cpu(), expected, rtol=tolerance, atol=tolerance)
