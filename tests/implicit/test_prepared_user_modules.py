"""The prepared form of modules and methods as users write them is the same function."""

import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jfbfast
from helpers.models import networks
from jfbfast import solve_fixed_point
from jfbfast.implicit.prepared import prepared
from jfbfast.models.denoisers import SpectralNormConv2d


class Unusual(nn.Module):
    """A forward that looks into its members, as users write them."""

    def __init__(self, way):
        super().__init__()
        self.way, self.calls = way, 0
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
        self.normed = SpectralNormConv2d(3, 3, 3, padding=1)

    def forward(self, x):
        self.calls += 1
        if self.way == "index":
            h = self.body[0](x)
            return h + self.body[2](self.body[1](h))
        if self.way == "slice":
            return self.body[:1](x) - self.body(x)
        if self.way == "enumerate":
            for i, layer in enumerate(self.body):
                x = layer(x)
                if i == 0:
                    skip = x
            return x + skip
        if self.way == "isinstance":
            for layer in (*self.body, self.normed):
                x = layer(x)
                if isinstance(layer, nn.Conv2d):
                    x = torch.tanh(x)
            return x
        return F.conv_transpose2d(self.normed(x), self.normed.weight, padding=1)


@pytest.mark.parametrize("way", ["index", "slice", "enumerate", "isinstance", "weight"])
@torch.no_grad()
def test_a_forward_that_looks_into_its_members_is_the_same_function(way):
    net, x = Unusual(way).double().eval(), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(prepared(net)(x), net(x), rtol=1e-10, atol=1e-12)


class Idioms(nn.Module):
    """What users' forwards ask of their own modules."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.body = Inner(nn.Conv2d(3, 3, 1), nn.ReLU())

    def forward(self, x):
        self.seen = x.dtype
        x = x.to(next(self.conv.parameters()).dtype) * self.conv.state_dict()["bias"].mean()
        del self.seen
        return self.body(self.conv(input=x)) + torch.stack([self.conv(image) for image in x])


class Inner(nn.Sequential):
    def __init_subclass__(cls, *, required=None, **rest):
        super().__init_subclass__(**rest)

    def forward(self, x):
        return super(self.__class__, self).forward(x)


@torch.no_grad()
def test_common_idioms_in_modules_work():
    net, x = Idioms().double().eval(), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(prepared(net)(x), net(x), rtol=1e-10, atol=1e-12)
    net.body[1].forward = lambda x: x - 1
    torch.testing.assert_close(prepared(net)(x), net(x), rtol=1e-10, atol=1e-12)
    conv = nn.Conv2d(3, 3, 1).double()
    chain = nn.Sequential(conv, nn.ReLU())
    prepared(chain)(x)
    chain.append(conv)
    torch.testing.assert_close(prepared(chain)(x), chain(x), rtol=1e-10, atol=1e-12)


def test_a_layer_may_differentiate_inside_its_forward():
    class GradientStep(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return x.detach() - torch.autograd.grad(self.net(x).square().sum(), x)[0]

    net, x = GradientStep(), torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(prepared(net)(x), net(x))


def test_an_attribute_that_forward_sets_is_set_on_the_module():
    net, d = Unusual("index"), torch.rand(2, 3, 6, 7)
    with torch.no_grad():
        for p in net.parameters():
            p *= 0.2
    _, solution = solve_fixed_point(net, d, solver=jfbfast.Picard(tol=0, max_iter=5))
    assert net.calls == 6 and (solution.iterations == 5).all()


@pytest.mark.parametrize("name", networks())
@torch.no_grad()
def test_a_method_of_a_model_can_be_prepared(name):
    model = networks()[name].double().eval()
    x, d = torch.randn(2, 2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(prepared(model.layer)(x, d), model.layer(x, d), rtol=1e-10, atol=1e-12)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def step(self, x):
        return self.conv(x)


def unwrapped(function):
    return lambda *args: function(*args)


class Child(Parent):
    @unwrapped
    def decorated(self, x):
        return 2 * self.conv(x)

    def __private(self, x):
        return 3 * self.conv(x)

    def step(self, x):
        return 4 * self.conv(x)

    def layers(self):
        added = MethodType(lambda self, x: 5 * self.conv(x), self)
        return super().step, self.decorated, self.__private, self.step, added


@torch.no_grad()
def test_a_method_is_the_function_that_was_given_whatever_its_name():
    net, x = Child().double(), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    for factor, layer in enumerate(net.layers(), 1):
        torch.testing.assert_close(prepared(layer)(x), factor * net.conv(x))
    chain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).double()
    torch.testing.assert_close(prepared(chain.forward)(x), chain(x))


@torch.no_grad()
def test_a_module_that_cannot_be_prepared_is_used_as_it_is():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    class OwnNormalised(SpectralNormConv2d):
        def forward(self, x):
            return super().forward(x) + 1

    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / weight.norm(), bias)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    for convolution in (Own(3, 3, 1), OwnNormalised(3, 3, 1), Standardised(3, 3, 1), traced):
        for net in (convolution, nn.Sequential(convolution, nn.BatchNorm2d(3), nn.ReLU())):
            net = net.eval() if net is not traced else net
            torch.testing.assert_close(prepared(net)(x), net(x))
    torch.testing.assert_close(prepared(torch.tanh)(x), x.tanh())
