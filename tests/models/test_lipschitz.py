"""Bounds on Lipschitz constants: of convolutions at every size, and of the nonexpansive denoiser."""

import copy
import pickle
from threading import Event, Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from jfbfast import RED, Anderson, DEGrad, DnCNN, GaussianBlur, NonexpansiveDenoiser, Status, fixed_point
from jfbfast.implicit.frozen import fixed_weights, materialised_weights, normalised_weights, step_spectral_norms
from jfbfast.models.lipschitz import MaxMin, NonexpansiveConv2d, SpectralNormConv2d, convolution_norm_bound

SIZES = [(1, 1), (3, 5), (8, 8), (13, 12)]


def dense_norm(function, shape):
    n = torch.Size(shape).numel()
    return torch.linalg.matrix_norm(function(torch.eye(n, dtype=torch.float64).view(n, *shape)).reshape(n, -1), 2)


def weights():
    low_pass = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])).expand(2, 3, 3, 3)
    identity = torch.zeros(4, 4, 3, 3)
    identity[range(4), range(4), 1, 1] = 1
    return {
        "random": torch.randn(4, 3, 3, 3),
        "wide": torch.randn(2, 6, 3, 3),
        "positive": torch.rand(3, 3, 5, 3),
        "even": torch.randn(3, 2, 2, 4),
        "pointwise": torch.randn(3, 4, 1, 1),
        "low-pass": low_pass,
        "identity": identity,  # every singular value at every frequency alike: the worst case
    }


@pytest.mark.parametrize("name", weights())
def test_the_bound_holds_at_every_size_and_is_close(name):
    weight = weights()[name].double()
    bound = convolution_norm_bound(weight) * (1 + 1e-12)
    padding = [k // 2 for k in weight.shape[-2:]]
    for size in SIZES:
        shape = (weight.shape[1], *size)
        assert dense_norm(lambda x: F.conv2d(x, weight, padding=padding), shape) <= bound
        assert dense_norm(lambda x: F.conv2d(x, weight, padding=[2 * p for p in padding], stride=2), shape) <= bound
    transfer = torch.fft.fft2(weight, s=(101, 101)).flatten(2).permute(2, 0, 1)
    supremum = torch.linalg.matrix_norm(transfer, 2).max()
    assert supremum <= bound <= 1.05 * supremum
    for size in ((8, 8), (9, 6)):
        periodic = torch.fft.fft2(weight, s=size).flatten(2).permute(2, 0, 1)
        assert torch.linalg.matrix_norm(periodic, 2).max() <= bound


def test_the_reshaped_norm_does_not_bound_the_convolution():
    network = DnCNN(3, 3, 2)  # the paper's normalisation of a filter that averages
    conv = network.layers[0]
    with torch.no_grad():
        conv.weight.fill_(1.0)
    for _ in range(20):
        conv.power_iteration()
    norm = dense_norm(conv.double().eval().requires_grad_(False), (3, 12, 12))
    assert norm > 2.5
    twin = NonexpansiveConv2d(3, 3, 3, padding=1, bias=False).double().requires_grad_(False)
    twin.weight.fill_(1.0)
    assert 0.9 < dense_norm(twin, (3, 12, 12)) <= 1


def test_the_bound_is_differentiable():
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(convolution_norm_bound, (weight,))
    conv = NonexpansiveConv2d(2, 3, 3)
    with torch.no_grad():
        conv.weight.zero_()
    conv(torch.randn(1, 2, 4, 4)).sum().backward()
    assert conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bound_scales_with_the_weight_in_every_dtype(dtype):
    weight = torch.randn(4, 4, 3, 3)
    bound = convolution_norm_bound(weight.to(dtype))
    assert bound.dtype == torch.float32
    for scale in (1e-15, 1e15):
        torch.testing.assert_close(convolution_norm_bound(scale * weight.to(dtype)), scale * bound, rtol=2e-2, atol=0)
    conv = NonexpansiveConv2d(4, 4, 3, device="cpu", dtype=dtype)
    assert conv(torch.randn(1, 4, 5, 5, dtype=dtype)).dtype == dtype


def test_the_weight_is_materialised_for_a_solve():
    network = DnCNN(1, 4, 3, norm=None, spectral_norm="conv").eval()
    x = torch.randn(1, 1, 6, 6)
    expected = network(x)
    with materialised_weights(network):
        first = network.layers[0]
        with torch.no_grad():
            first.weight += 1
        fixed = network(x)
        torch.testing.assert_close(fixed, expected)
        assert not fixed.requires_grad
    assert not torch.allclose(network(x), expected, rtol=1e-2)


def test_convolutions_computed_together_agree_with_each_alone():
    shapes = [(3, 4, 3), (4, 4, 3), (4, 3, 1), (4, 4, 3), (4, 4, 3)]
    together = nn.ModuleList(SpectralNormConv2d(*shape) for shape in shapes).double().train()
    together[3].to(memory_format=torch.channels_last)
    alone, cotangents = copy.deepcopy(together), [torch.randn_like(conv.weight) for conv in together]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            step_spectral_norms(together)
            for conv in alone:
                conv.power_iteration()
    weights = normalised_weights(together)
    for conv, twin, cotangent in zip(together, alone, cotangents, strict=True):
        expected = twin.normalised_weight()
        tensors = [(conv.u, twin.u), (conv.v, twin.v), (weights[conv], expected)]
        gradients = [
            torch.autograd.grad(w, c.weight, cotangent, True) for w, c in ((weights[conv], conv), (expected, twin))
        ]
        for found, wanted in (*tensors, *zip(*gradients, strict=True)):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    with fixed_weights(weights):
        assert all(conv.current_weight() is weights[conv] for conv in together)
    assert not any(conv.current_weight() is weights[conv] for conv in together)


def test_the_gradients_of_weights_computed_together_are_those_of_the_formula():
    convolutions = [SpectralNormConv2d(2, 3, 3).double() for _ in range(3)]

    def weights(*given):
        for conv, weight in zip(convolutions, given, strict=True):
            del conv.weight
            conv.weight = weight
        return tuple(SpectralNormConv2d.normalised_weights(convolutions))

    given = [conv.weight.detach().clone().requires_grad_() for conv in convolutions]
    assert gradcheck(weights, given)


def largest_singular_value(function, x, steps=25):
    """σ of ∂f/∂x by power iteration on the Jacobian's products."""
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    cotangent = torch.zeros_like(out, requires_grad=True)
    transposed = torch.autograd.grad(out, leaf, cotangent, create_graph=True)[0]
    v = torch.randn_like(x)
    for _ in range(steps):
        u = torch.autograd.grad(transposed, cotangent, v / v.norm(), retain_graph=True)[0]
        v = torch.autograd.grad(out, leaf, u, retain_graph=True)[0]
    return v.norm().sqrt()


def trained(averaging):
    """A nonexpansive denoiser that is trained for the largest gain."""
    denoiser = NonexpansiveDenoiser(2, 4, 3, averaging=averaging).double()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=4e-2)
    for _ in range(30):
        x, y = torch.randn(2, 8, 2, 6, 6, dtype=torch.float64)
        loss = -((denoiser(x) - denoiser(y)).square().sum() / (x - y).square().sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return denoiser.requires_grad_(False)


@pytest.mark.parametrize("averaging", [0.5, 1.0])
def test_the_denoiser_is_nonexpansive_at_every_size(averaging):
    denoiser = trained(averaging)
    norms = []
    for size in ((1, 4), (5, 7), (12, 12), (20, 17)):
        x, y = torch.randn(2, 16, 2, *size, dtype=torch.float64)
        for step in (1.0, 1e-4):
            z = x + step * y
            gain = (denoiser(x) - denoiser(z)).flatten(1).norm(dim=1) / (x - z).flatten(1).norm(dim=1)
            assert (gain <= 1 + 1e-9).all()
        if averaging == 0.5:  # firmly nonexpansive: ‖Dx − Dz‖² ≤ ⟨Dx − Dz, x − z⟩
            moved = (denoiser(x) - denoiser(z)).flatten(1)
            assert (moved.square().sum(1) <= (moved * (x - z).flatten(1)).sum(1) + 1e-9).all()
        norms.append(float(largest_singular_value(denoiser, x[:1])))
    assert max(norms) <= 1 + 1e-9
    assert max(norms) > 0.6  # the bound is not an empty one


def test_a_residual_dncnn_with_bounded_convolutions_is_two_lipschitz():
    network = DnCNN(2, 6, 4, norm=None, spectral_norm="conv", bias=True, residual=True).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1  # aligned, for a large gain
    for size in ((4, 5), (12, 12)):
        x = torch.rand(1, 2, *size, dtype=torch.float64)
        norm = float(largest_singular_value(lambda x: x - network(x), x))
        assert 0.3 < norm <= 1 + 1e-9
        assert largest_singular_value(network, x) <= 2 + 1e-9


def test_maxmin_sorts_pairs_and_keeps_norms():
    x = torch.randn(2, 6, 3, 3)
    out = MaxMin()(x)
    torch.testing.assert_close(out.norm(), x.norm())
    assert (out[:, :3] >= out[:, 3:]).all()
    torch.testing.assert_close(out[:, :3] + out[:, 3:], x[:, :3] + x[:, 3:])


def test_the_filtered_network_contracts_by_construction():
    model = DEGrad(GaussianBlur(), RED(NonexpansiveDenoiser(1, 6, 4), 0.05, "weight"), preconditioner="exact").double()
    with torch.no_grad():
        for parameter in model.regularizer.denoiser.parameters():
            parameter *= 30  # whatever training may do to the weights
    model.solver = Anderson(tol=1e-10, max_iter=40)
    d = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    model(d).square().sum().backward()
    assert (model.solution.status == Status.CONVERGED).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(d), model(d), rtol=0, atol=0)
    twin.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NonexpansiveConv2d(4, 4, 3, groups=2), "groups is 2"),
        (lambda: NonexpansiveConv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
        (lambda: NonexpansiveDenoiser(features=5), "features is 5"),
        (lambda: NonexpansiveDenoiser(depth=1), "depth is 1"),
        (lambda: NonexpansiveDenoiser(averaging=0), "averaging is 0"),
        (lambda: DnCNN(spectral_norm="fft"), "spectral_norm is 'fft'"),
        (lambda: nn.Sequential(DnCNN(features=0)), "features is 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_solve_in_another_thread_takes_no_gradient_away():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = SpectralNormConv2d(1, 1, 3, padding=1)

        def forward(self, x):
            if torch.is_grad_enabled():
                applying.set()
                assert solved.wait(60)
            return 0.5 * self.conv(x) + 1

    applying, solved, trained = Event(), Event(), Event()
    layer, x = Layer().eval(), torch.zeros(1, 1, 4, 4)

    def solve():
        assert applying.wait(60)
        with torch.no_grad(), materialised_weights(layer):  # as in a solve, whose weights have no gradient
            solved.set()
            assert trained.wait(60)

    other = Thread(target=solve)
    other.start()
    try:
        fixed_point(layer, x).sum().backward()
    finally:
        trained.set()
        other.join()
    found, layer.conv.weight.grad = layer.conv.weight.grad, None
    fixed_point(layer, x).sum().backward()
    torch.testing.assert_close(found, layer.conv.weight.grad)
    assert found.abs().max() > 0
