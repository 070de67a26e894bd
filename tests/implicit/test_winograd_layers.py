"""Where a layer's convolutions are Winograd's: in a prepared layer, and in the one that carries the gradient."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from jfbfast import Anderson, ConvergenceWarning, DnCNN, GradientMethod, Implicit, fixed_point
from jfbfast.backends import native
from jfbfast.implicit.prepared import Convolutions, prepared

pytestmark = pytest.mark.compiled


class Mixed(nn.Module):
    """Convolutions that Winograd's can replace, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding="same", bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(32, 32, 3, padding=1, groups=2),
            nn.Conv2d(32, 32, 3, padding=2, dilation=2),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.Conv2d(32, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


# The first convolution's input gets no gradient.
WITHIN_MIXED = ["conv3x3"] * 3 + ["conv3x3_weight_gradient", "conv3x3"] * 2 + ["conv3x3_weight_gradient"]


def winograd_calls(monkeypatch: pytest.MonkeyPatch, net: nn.Module, tol: float) -> int:
    with monkeypatch.context() as patch:
        calls = counted_calls(patch)
        prepared(net, tol=tol)(torch.randn(2, 3, 12, 10, dtype=next(net.parameters()).dtype))
    return len(calls)


@torch.no_grad()
def test_a_prepared_layer_uses_winograd_if_the_tolerance_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Mixed().eval()
    net.layers[3].running_mean.normal_()
    assert winograd_calls(monkeypatch, net, 1e-3) == 3
    assert winograd_calls(monkeypatch, net, 1e-5) == 0
    assert winograd_calls(monkeypatch, Mixed().double().eval(), 1e-3) == 0
    x = torch.randn(2, 3, 12, 10)
    exact = net.double()(x.double())
    net.float()
    got = prepared(net, tol=1e-3)(x)
    assert not torch.equal(got, prepared(net)(x))
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.testing.assert_close(prepared(net, tol=1e-3)(x), net(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_deep_denoiser_keeps_its_accuracy() -> None:
    net = DnCNN(3, 32, 17, norm=None, spectral_norm=False, bias=True).eval()
    x = torch.randn(2, 3, 24, 24)
    exact = net.double()(x.double())
    net.float()
    errors = [(prepared(net, tol=tol)(x) - exact).norm() / exact.norm() for tol in (1e-3, 0.0)]
    assert errors[0] < 1e-5 and errors[1] < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_layer_uses_winograd() -> None:
    net, x = Mixed().eval(), torch.randn(2, 3, 12, 10)
    torch.compiler.reset()
    torch.testing.assert_close(prepared(net, tol=1e-3, compiled=True)(x), net(x), rtol=1e-4, atol=1e-5)


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for name in ("conv3x3", "conv3x3_weight_gradient"):
        kernel = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, kernel=kernel: (calls.append(name), kernel(*a))[1])
    return calls


def test_within_the_context_winograd_computes_torchs_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, net = counted_calls(monkeypatch), Mixed().eval()
    x = torch.randn(2, 3, 12, 10)
    with Convolutions(1e-3):
        net(x).sum().backward()
        assert calls == WITHIN_MIXED
        calls.clear()
        net.double()(x.double())
        net.float()
    net(x)
    assert calls == []


def test_winograd_under_autocast_gives_gradients_in_the_dtypes_of_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, net = counted_calls(monkeypatch), Mixed().eval()
    x = torch.randn(2, 3, 12, 10)

    def outputs(context: AbstractContextManager[object]) -> list[Tensor]:
        net.zero_grad()
        with context, torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        out.float().square().sum().backward()
        return [out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]

    expected, found = outputs(nullcontext()), outputs(Convolutions(1e-3))
    assert calls == WITHIN_MIXED
    for got, e in zip(found, expected, strict=True):
        assert got.dtype == e.dtype and (got - e).float().norm() <= 0.05 * e.float().norm()


def blurred_layer(depth: int) -> tuple[nn.Module, Tensor]:
    """x ↦ d/2 + N(x)/4 with a network whose ReLU is smooth, so that gradients do not depend on a sign."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convolutions = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(depth)]
            self.layers = nn.Sequential(*itertools.chain(*((c, nn.Softplus()) for c in convolutions)))

        def forward(self, x: Tensor, d: Tensor) -> Tensor:
            out: Tensor = d / 2 + self.layers(x) / 4
            return out

    return Layer(), torch.randn(3, 16, 10, 9)


@pytest.mark.parametrize(
    "gradient, tol, used",
    (
        ("jfb", 1e-4, True),
        ("jfb", 1e-6, False),
        (Implicit(tol=1e-4), 1e-4, True),
        (Implicit("cg", tol=1e-4), 1e-4, True),
        (Implicit(tol=1e-6), 1e-4, False),
        ("neumann", 1e-4, True),
        ("unrolled", 1e-4, True),
    ),
)
def test_an_implicit_gradient_uses_winograd_if_both_tolerances_allow(
    monkeypatch: pytest.MonkeyPatch, gradient: str | GradientMethod, tol: float, used: bool
) -> None:
    layer, d = blurred_layer(3)
    calls = counted_calls(monkeypatch)

    def gradients() -> list[Tensor]:
        layer.zero_grad()
        given = d.to(next(layer.parameters()).dtype)
        solver = Anderson(tol=tol, max_iter=50)
        fixed_point(layer, given, inputs=(given,), solver=solver, gradient=gradient).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    found = gradients()
    assert ("conv3x3_weight_gradient" in calls) == used
    layer.double()
    for g, e in zip(found, gradients(), strict=True):
        assert (g - e).norm() <= 2e-3 * e.norm()


def test_nan_in_one_sample_spoils_neither_the_others_nor_the_gradient() -> None:
    layer, d = blurred_layer(2)
    spoilt = torch.cat((d, torch.full_like(d[:1], torch.nan)))

    def gradients(given: Tensor) -> tuple[Tensor, list[Tensor]]:
        layer.zero_grad()
        out = fixed_point(layer, torch.zeros_like(given), inputs=(given,), solver=Anderson(tol=1e-4))
        out[: len(d)].square().sum().backward()
        return out[: len(d)].detach(), [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    clean = gradients(d)
    with pytest.warns(ConvergenceWarning):
        found = gradients(spoilt)
    torch.testing.assert_close(found, clean)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_torch_computes_the_convolutions_within_transforms_of_torch_func() -> None:
    x, w = torch.randn(2, 16, 8, 8), torch.randn(16, 16, 3, 3)

    def convolved(t: Tensor) -> Tensor:
        return torch.conv2d(t, w, padding=1)

    with Convolutions(1e-3):
        tangent = torch.func.jvp(convolved, (x,), (x,))[1]
        cotangent = torch.func.grad(lambda t: convolved(t).square().sum())(x)
    torch.testing.assert_close(tangent, convolved(x))
    torch.testing.assert_close(cotangent, torch.func.grad(lambda t: convolved(t).square().sum())(x))


def test_winograd_within_the_context_can_be_differentiated_twice() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Softplus(), nn.Conv2d(16, 3, 3, padding=1)).eval()

    def penalty(context: AbstractContextManager[object]) -> list[Tensor]:
        x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8).requires_grad_()
        net.zero_grad()
        with context:
            (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return [gradient.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    expected, found = penalty(nullcontext()), penalty(Convolutions(1e-3))
    assert len(found) == 5
    for got, e in zip(found, expected, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))
