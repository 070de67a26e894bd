"""Layers that a solve prepares: they may solve, copy themselves, be compiled, or compute their convolutions."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jfbfast
from helpers.models import networks
from jfbfast.implicit.frozen import frozen
from jfbfast.implicit.prepared import prepared


class Equilibrium(nn.Module):
    """A layer that solves a fixed point of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.last = nn.Conv2d(16, 16, 3, padding=1)

    def inner(self, z, x):
        return x + self.net(z) / 4

    def forward(self, x):
        return self.last(jfbfast.fixed_point(self.inner, torch.zeros_like(x), inputs=(x,)))


@torch.no_grad()
def test_a_solve_within_a_solve_is_the_same_function():
    torch.manual_seed(0)
    net, x = Equilibrium().eval(), torch.randn(2, 16, 16, 16)
    torch.testing.assert_close(prepared(net, tol=1e-3)(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("raises", [False, True])
@torch.no_grad()
def test_a_relu_is_applied_where_the_layer_computes_its_convolutions_itself(raises):
    class Unfolding(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is not torch.conv2d:
                return func(*args, **(kwargs or {}))
            if raises:
                raise NotImplementedError
            x, weight, bias = args[:3]
            return (weight.flatten(1) @ F.unfold(x, 3, padding=1) + bias[:, None]).view(len(x), -1, *x.shape[2:])

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
            self.last = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            try:
                with Unfolding():
                    x = self.net(x)
            except NotImplementedError:
                pass
            return self.last(x)

    net, x = Layer().double(), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(prepared(net)(x), net(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight", ["none", "missing", "lazy"])
@torch.no_grad()
def test_convolutions_without_a_weight_of_their_own(weight):
    class Hyper(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 3, 3, padding=1)
            self.base = nn.Parameter(self.weight.detach())
            del self.weight
            if weight == "none":
                self.register_parameter("weight", None)

        def forward(self, x):
            return F.conv2d(x, self.base / 2, self.bias, padding=1)

    conv = nn.LazyConv2d(3, 3, padding=1) if weight == "lazy" else Hyper()
    net, x = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(3, 3, 3)), torch.randn(2, 3, 6, 7)
    out = prepared(net)(x)
    torch.testing.assert_close(out, net(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@torch.no_grad()
def test_a_copy_that_a_layer_makes_of_itself_is_a_module_of_its_own(copied):
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            copies.append(copied(self.net))
            return self.net(x)

    copies, layer, x = [], Copying().eval(), torch.randn(2, 3, 6, 7)
    prepared(layer)(x)
    net = copies[0]
    nn.init.ones_(net[0].weight)
    torch.testing.assert_close(net(x), net[2](net[1](net[0](x))))
    torch.testing.assert_close(prepared(net)(x), net(x))
    net.train()(x)
    assert net[1].running_mean.any()


def test_a_solve_leaves_nothing_to_the_garbage_collector():
    def tensors():
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    net, x = networks()["filtered"].eval(), torch.rand(1, 3, 8, 8)
    net(x)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(5):
            net(x)
        assert tensors() <= before
    finally:
        gc.enable()


@pytest.mark.filterwarnings("default")  # torch.compile expects to hide some by itself
@pytest.mark.parametrize("way", ["function", "method", "forward"])
def test_what_a_user_has_compiled_is_compiled_once_for_all_solves(way):
    def backend(graph, _):
        graphs.append(graph)
        return graph

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
            if way == "function":
                self.net = torch.compile(self.net, backend=backend)
            elif way == "method":
                self.net.compile(backend=backend)

        def apply_net(self, x):
            return self.net(x) / 4

        def forward(self, x, d):
            return d + (self.apply_net(x) if way != "forward" else compiled(self, x))

    graphs, counts, d = [], [], torch.rand(2, 3, 8, 8)
    whole = way != "method" or torch.__version__ >= (2, 12)
    compiled = torch.compile(Layer.apply_net, backend=backend)
    torch.compiler.reset()
    layer = Layer().eval()
    for _ in range(4):
        out = jfbfast.fixed_point(layer, torch.zeros_like(d), inputs=(d,), solver=jfbfast.Picard())
        counts.append(len(graphs))
    assert set(counts) == {2 if whole else 3}  # without gradients (up to torch 2.11 in two pieces) and with them
    torch.testing.assert_close(out, layer(out, d), rtol=1e-2, atol=1e-2)


def test_a_class_that_sets_its_mode_itself_is_asked_to():
    class Telling(nn.Module):
        def __setattr__(self, name, value):
            if name == "training":
                modes.append(value)
            super().__setattr__(name, value)

    class Derived(Telling):
        pass

    modes, module = [], Derived()
    modes.clear()
    with frozen(module):
        assert modes == [False]
    assert modes == [False, True]
