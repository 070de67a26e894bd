"""A solve evaluates a prepared form of the layer, which must stay the same function, whatever happens to the module."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import jfbfast
from helpers.models import networks
from jfbfast import DnCNN, UNet
from jfbfast.backends.conv3x3 import _onednn_fuses_relu
from jfbfast.backends.fused import Geometry
from jfbfast.implicit.prepared import _solve_convolutions, prepared
from jfbfast.models.denoisers import SpectralNormConv2d


class Branches(nn.Module):
    """Convolutions in and out of a Sequential, of several kinds, with what cannot be folded between them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), nn.BatchNorm2d(4))
        self.normed = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.pair = nn.Sequential(SpectralNormConv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.GroupNorm(2, 4))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.head = nn.Sequential(nn.Conv2d(4, 3, 2, stride=2, bias=False), nn.BatchNorm2d(3, affine=False), nn.ReLU())
        self.gain = 1.0

    def forward(self, x):
        h = self.first(x)
        h = h + torch.relu(self.normed(h)) / self.first[0].in_channels
        return self.gain * self.head(self.up(self.pair(h)))


def module(name):
    torch.manual_seed(0)
    net = {
        "DnCNN": lambda: DnCNN(3, 6, 4),
        "DnCNN with bias": lambda: DnCNN(3, 6, 4, norm=None, spectral_norm=False, bias=True, residual=True),
        "UNet": lambda: UNet(3, (6, 4), (1, 1)),
        "branches": Branches,
        "convolution": lambda: nn.Conv2d(3, 3, 3, padding=1),
    }[name]()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return net.double().eval()


NAMES = ["DnCNN", "DnCNN with bias", "UNet", "branches", "convolution"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_is_the_same_function_after_every_change_of_the_module(name):
    net, x = module(name), torch.randn(2, 3, 8, 12, dtype=torch.float64)

    def check():
        torch.testing.assert_close(prepared(net)(x), net(x), rtol=1e-10, atol=1e-12)

    check()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # which torch's version counters do not see
    check()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean += 1
        if isinstance(m, SpectralNormConv2d):
            m.power_iteration()
    check()
    if hasattr(net, "gain"):
        net.gain = 3.0
        net.first[0] = nn.Conv2d(3, 4, 1).double()
        check()
        net.pair[1].register_forward_hook(lambda m, args, out: out + 1)
        check()


@torch.no_grad()
def test_batch_norms_behind_convolutions_are_folded(monkeypatch):
    net, x = module("DnCNN"), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    expected = net(x)

    def refuse(*_):
        raise AssertionError("a batch norm was evaluated")

    monkeypatch.setattr(nn.BatchNorm2d, "forward", refuse)
    torch.testing.assert_close(prepared(net)(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_a_fused_relu_agrees_with_float64(dtype, channels_last):
    net = module("DnCNN with bias")
    x = torch.randn(3, 3, 9, 7, dtype=torch.float64)
    exact = net(x)
    image = x.float().contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    net.float()
    out = prepared(net, None if dtype == torch.float32 else dtype)(image)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        theirs = net(image)
    assert out.dtype == torch.float32
    assert (out - exact).norm() <= max(2 * (theirs - exact).norm(), 1e-5 * exact.norm())


def test_no_relu_is_fused_in_bfloat16_where_onednn_has_none(monkeypatch):
    monkeypatch.setattr("jfbfast.backends.conv3x3.ONEDNN_HAS_BFLOAT16", False)
    x = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        low = x.bfloat16()
        assert _onednn_fuses_relu(x, x, None, Geometry()) and not _onednn_fuses_relu(low, low, None, Geometry())


def test_low_precision_keeps_the_first_and_the_last_convolution_in_float32():
    net = module("UNet").float()
    known = _solve_convolutions(net, 0.0, torch.bfloat16).weights
    weights = [known[id(m.weight)].value for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert weights[0].dtype == weights[-1].dtype == torch.float32
    assert {w.dtype for w in weights[1:-1]} == {torch.bfloat16}
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


class Blur(nn.Module):
    """An operator made of convolutions."""

    def __init__(self):
        super().__init__()
        self.columns = nn.Conv2d(3, 3, (3, 1), padding=(1, 0), groups=3, bias=False)
        self.rows = nn.Conv2d(3, 3, (1, 3), padding=(0, 1), groups=3, bias=False)
        for conv in (self.columns, self.rows):
            conv.weight.data = torch.tensor([0.25, 0.5, 0.25]).view(1, 1, *conv.kernel_size).repeat(3, 1, 1, 1)
        self.requires_grad_(False)

    def forward(self, x):
        return self.rows(self.columns(x))

    def adjoint(self, y):
        return self.columns(self.rows(y))


def test_low_precision_keeps_the_operators_convolutions_in_float32():
    model = jfbfast.DEGrad(Blur(), jfbfast.RED(UNet(3, (6, 4), (1, 1)), 0.1, "weight"), preconditioner="exact")
    known = _solve_convolutions(model, 0.0, torch.bfloat16).weights
    dtypes = [known[id(m.weight)].value.dtype for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert dtypes[:3] == [torch.float32] * 3 and dtypes[-1] == torch.float32
    assert set(dtypes[3:-1]) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_solve_in_inference_mode_leaves_a_model_that_trains(dtype):
    model, d = networks()["filtered"], torch.rand(1, 3, 8, 8)
    model.solve_dtype = dtype
    with torch.inference_mode():
        expected = model.eval()(d)
    with torch.no_grad():
        torch.testing.assert_close(model(d), expected)
    model.train()(d).sum().backward()
    with torch.inference_mode():
        model(d)


def test_threads_share_a_model():
    model, d = networks()["filtered"].eval(), torch.rand(4, 1, 3, 8, 8)
    with torch.no_grad():
        expected = [model(each) for each in d]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(torch.no_grad()(lambda i: model(d[i % 4])), range(80)))
    for i, each in enumerate(found):
        torch.testing.assert_close(each, expected[i % 4])


@torch.no_grad()
def test_one_thread_does_not_use_what_another_has_prepared():
    """The other thread evaluates the same module within a prepared evaluation of the first."""
    net, x, found = module("DnCNN"), torch.randn(1, 3, 8, 8, dtype=torch.float64), []
    expected = net(x)

    class Asking(nn.Module):
        def forward(self, x):
            with ThreadPoolExecutor(1) as thread:
                found.append(thread.submit(torch.no_grad()(lambda: net(x))).result())
            return net(x)

    asking = Asking()
    asking.net = net
    prepared(asking)(x)
    assert torch.equal(found[0], expected)


def test_the_callers_autocast_does_not_change_its_precision():
    net, x = module("UNet").float(), torch.randn(1, 3, 8, 8)
    expected = prepared(net)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared(net)(x), expected)


@pytest.mark.slow
def test_a_compiled_layer_follows_changes_of_the_weights():
    model = networks()["filtered"].eval()
    x, d = torch.randn(2, 2, 3, 9, 8)
    torch.compiler.reset()
    graphs = []
    with torch.no_grad():
        for _ in range(2):
            expected = model.layer(x, d)
            torch.testing.assert_close(prepared(model.layer, compiled=True)(x, d), expected, rtol=1e-4, atol=1e-5)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            for parameter in model.parameters():
                parameter += 0.05
    assert graphs[0] == graphs[1]  # new weights compile nothing anew


@torch.no_grad()
def test_an_evaluation_leaves_nothing_on_the_module():
    net, x = module("DnCNN"), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    before = [set(vars(m)) for m in net.modules()]
    prepared(net)(x)
    assert [set(vars(m)) for m in net.modules()] == before
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.nn.init.ones_(next(other.parameters()))
        torch.testing.assert_close(prepared(other)(x), other(x))
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
