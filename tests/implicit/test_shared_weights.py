"""Solve and application share folded and normalised weights; what a layer does to its modules still counts."""

import pytest
import torch
from torch import nn

from jfbfast import RED, Anderson, DEGrad, GaussianBlur, Implicit, fixed_point, freeze_statistics
from jfbfast.implicit.frozen import NormalisedConv2d
from jfbfast.models.lipschitz import SpectralNormConv2d

SOLVER = Anderson(tol=1e-10, max_iter=100)


def chain(convolution=nn.Conv2d):
    torch.manual_seed(0)
    net = nn.Sequential(convolution(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()).double()
    nn.init.constant_(net[1].weight, 0.3)
    freeze_statistics(net)
    return net


class Layer(nn.Module):
    """x ↦ ½ net(x) + d; ``call`` may call the net in another way."""

    def __init__(self, net, call=None):
        super().__init__()
        self.net = net
        self.call = call

    def forward(self, x, d):
        return 0.5 * (self.net(x) if self.call is None else self.call(self.net, x)) + d


def expected(layer, d, parameters):
    """T(x*) and JFB's gradients of its squares, by plain evaluations of the layer."""
    x = torch.zeros_like(d)
    with torch.no_grad():
        for _ in range(200):
            x = layer(x, d)
    out = layer(x, d)
    return out.detach(), torch.autograd.grad(out.square().sum(), parameters)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("convolution", [nn.Conv2d, SpectralNormConv2d])
def test_a_layer_may_replace_parameters_while_it_runs(convolution, training):
    net, d = chain(convolution).train(training), torch.randn(2, 2, 6, 5, dtype=torch.float64)
    weight = nn.Parameter(net[0].weight.detach() + 0.05 * torch.randn_like(net[0].weight))
    layer = Layer(net, lambda net, x: torch.func.functional_call(net, {"0.weight": weight}, (x,)))
    out = fixed_point(layer, d, inputs=(d,), parameters=[weight], solver=SOLVER)
    value, (gradient,) = expected(layer.eval(), d, [weight])
    torch.testing.assert_close(out, value, rtol=1e-8, atol=1e-8)
    out.square().sum().backward()
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-6, atol=1e-8)


def test_a_layer_may_replace_the_statistics_of_a_norm_while_it_runs():
    net, d = chain().eval(), torch.randn(2, 2, 6, 5, dtype=torch.float64)

    def call(net, x):
        net[1].running_mean = torch.full((2,), 0.7, dtype=torch.float64)
        return net(x)

    layer = Layer(net, call)
    out = fixed_point(layer, d, inputs=(d,), solver=SOLVER)
    value, gradients = expected(layer, d, list(net.parameters()))
    torch.testing.assert_close(out, value, rtol=1e-8, atol=1e-8)
    out.square().sum().backward()
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-8)


def test_a_layer_may_set_a_weight_as_an_attribute_while_it_runs():
    net, d = chain().eval(), torch.randn(2, 2, 6, 5, dtype=torch.float64)
    base = nn.Parameter(net[0].weight.detach().clone())
    del net[0]._parameters["weight"]

    def call(net, x):
        net[0].weight = 0.9 * base
        return net(x)

    layer = Layer(net, call)
    call(net, d)
    for _ in range(2):
        out = fixed_point(layer, d, inputs=(d,), parameters=[base], solver=SOLVER)
        value, (gradient,) = expected(layer, d, [base])
        torch.testing.assert_close(out, value, rtol=1e-8, atol=1e-8)
        base.grad = None
        out.square().sum().backward()
        torch.testing.assert_close(base.grad, gradient, rtol=1e-6, atol=1e-8)


def test_a_layer_may_replace_a_member_while_it_runs():
    net, d = chain().eval(), torch.randn(2, 2, 6, 5, dtype=torch.float64)

    def call(net, x):
        net[2] = nn.Tanh()
        return net(x)

    layer = Layer(net, call)
    out = fixed_point(layer, d, inputs=(d,), solver=SOLVER)
    torch.testing.assert_close(out, expected(layer, d, list(net.parameters()))[0], rtol=1e-8, atol=1e-8)


def test_a_convolution_in_bfloat16_may_have_a_norm_in_float32():
    net, d = chain().float().eval(), torch.randn(1, 2, 6, 5)
    net[0].bfloat16()
    layer = Layer(net, lambda net, x: net[2](net[1](net[0](x.bfloat16()))))
    whole = Layer(net, lambda net, x: net(x.bfloat16()))
    solver = Anderson(tol=1e-2)
    torch.testing.assert_close(*(fixed_point(each, d, inputs=(d,), solver=solver) for each in (layer, whole)))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # since JFB needs no gradient in x
def test_full_backward_hooks_run_for_every_module():
    net, d = chain().eval(), torch.randn(1, 2, 6, 5, dtype=torch.float64)
    seen = []
    for module in net:
        module.register_full_backward_hook(lambda module, *_: seen.append(module))
    fixed_point(Layer(net), d, inputs=(d,), solver=SOLVER).sum().backward()
    assert seen == list(net)[::-1]


@pytest.mark.parametrize("convolution", [nn.Conv2d, SpectralNormConv2d])
def test_weights_that_the_layer_does_not_use_get_no_gradient(convolution):
    layer, d = Layer(chain(convolution)), torch.randn(1, 2, 6, 5, dtype=torch.float64)
    layer.unused = chain(convolution)
    fixed_point(layer, d, inputs=(d,), solver=SOLVER).sum().backward()
    assert all(p.grad is None for p in layer.unused.parameters())
    assert all(p.grad is not None for p in layer.net.parameters() if p is not layer.net[0].bias)


class Offset(RED):
    def forward(self, x, *rest):
        return super().forward(x, *rest) + 0.1


class Halved(RED):
    def seen(self, x, operator):
        return super().seen(x, operator) / 2


@pytest.mark.parametrize("kind", [Offset, Halved])
def test_a_class_derived_from_red_is_the_regulariser(kind):
    red = kind(nn.Conv2d(2, 2, 3, padding=1), 0.2, filter_damping="weight").double()
    with torch.no_grad():
        red.denoiser.weight *= 0.3
    model = DEGrad(GaussianBlur(), red, preconditioner="exact", solver=SOLVER).double()
    x = model(d := torch.randn(1, 2, 8, 7, dtype=torch.float64)).detach()
    stationary = model.blur.adjoint(model.blur(x) - d) + red(x, model.blur, d)
    assert stationary.norm() <= 1e-7 * d.norm()


class Halved(NormalisedConv2d):
    """A norm that is iterated, with the two methods of one convolution alone."""

    iterated = ("scale",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.tensor(8.0, dtype=torch.float64))

    def normalised_weight(self):
        return self.weight / self.scale

    def power_iteration(self):
        self.scale = self.scale / 2


def test_a_norm_of_ones_own_steps_once_a_forward():
    net, d = chain(Halved).train(), torch.randn(2, 2, 6, 5, dtype=torch.float64)
    layer = Layer(net)
    out = fixed_point(layer, d, inputs=(d,), solver=SOLVER)
    assert net[0].scale == 4
    torch.testing.assert_close(out, expected(layer.eval(), d, list(net.parameters()))[0], rtol=1e-8, atol=1e-8)


def test_parameters_that_require_no_gradient_may_be_named():
    net, d = chain().eval(), torch.randn(2, 2, 6, 5, dtype=torch.float64)
    net[0].bias.requires_grad_(False)
    fixed_point(Layer(net), d, inputs=(d,), parameters=net.parameters(), solver=SOLVER).sum().backward()
    assert net[0].bias.grad is None and net[0].weight.grad is not None


def test_a_layer_without_x_has_the_gradient_of_the_layer_alone():
    """∂T/∂x = 0, also where a gradient needs its products with vectors."""
    weight, d = nn.Parameter(torch.tensor(2.0)), torch.randn(2, 3)
    for gradient in ("jfb", Implicit(), Implicit(solver="gmres")):
        out = fixed_point(lambda x, d: weight * d, d, inputs=(d,), parameters=[weight], gradient=gradient)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), weight)[0], d.sum())
