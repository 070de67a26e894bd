"""What users' own layers do: write in place, step buffers, couple samples, capture graphs, differentiate within."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import jfbfast
from helpers.implicit import problem
from jfbfast import (
    RED,
    Anderson,
    ConvergenceWarning,
    DEGrad,
    GaussianBlur,
    Status,
    fixed_point,
    jacobian_penalty,
    solve_fixed_point,
)
from jfbfast.backends import conv3x3 as winograd
from jfbfast.implicit import frozen
from jfbfast.implicit.methods import GRADIENTS
from jfbfast.operators import ops

pytestmark = pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")


def de_grad(*layers, **options):
    return DEGrad(GaussianBlur(), RED(nn.Sequential(*layers)), preconditioner="exact", **options)


def convolution(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class AddInPlace(nn.Module):
    def forward(self, x):
        x += 0.1
        return x.mul_(0.9)


@pytest.mark.parametrize("size", [8, 64])  # results of 64² lie in the pool
@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), AddInPlace()], ids=str)
def test_a_layer_may_write_over_a_convolutions_output(after, size):
    inplace = de_grad(convolution(3, 16), convolution(16, 16), after, convolution(16, 3))
    plain = copy.deepcopy(inplace)
    plain.regularizer.denoiser.insert(2, nn.Identity())
    plain.regularizer.denoiser[1].register_forward_hook(lambda module, args, out: out.clone())
    d = torch.rand(2, 3, size, size)
    gradients = []
    for model in (inplace, plain):
        model(d).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("size", [8, 64])
def test_no_output_of_an_op_is_a_view(backend, size):
    x = torch.rand(2, 16, size, size)
    taps = ([0.5, 0.3, 0.2], [1.0], "zeros")
    identity = ([1.0], [1.0], "zeros")
    with jfbfast.backend(backend):
        outputs = [
            *(ops.blur(x, *filters) for filters in (taps, identity)),
            *(ops.gradient(x, x, None, None, *filters) for filters in (taps, identity)),
            ops.gradient(x, x, x, torch.tensor(0.5), *taps),
            ops.tikhonov(x, torch.tensor(0.5), *taps),
            winograd.conv3x3(x, torch.rand(16, 16, 3, 3)),
            winograd.conv3x3(x, torch.rand(16, 16, 3, 3), None, True),
            *winograd.conv3x3_weight_gradient(x, x),
        ]
    for out in outputs:
        assert not out._is_view() and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_an_output_may_be_written_over_before_backward():
    blur = GaussianBlur()
    operators = [
        blur,
        blur.adjoint,
        blur.normal,
        *(
            f
            for b in (blur, jfbfast.IterativeOperator(blur))
            for f in (lambda x, b=b: b.solve(x, 0.1), lambda x, b=b: b.filter(x, 0.1))
        ),
    ]
    models = [de_grad(convolution(3, 16), nn.ReLU(), convolution(16, 3), gradient=g) for g in GRADIENTS]
    for function in (*operators, *models):
        x = torch.rand(1, 3, 12, 12, requires_grad=True)
        (expected,) = torch.autograd.grad((2 * function(x) + 1).sum(), x)
        out = function(x)
        out *= 2
        out.add_(1).sum().backward()
        torch.testing.assert_close(x.grad, expected)


def test_an_averaging_is_estimated_in_full_precision():
    seen = set()

    class Denoiser(nn.Module):
        def forward(self, x):
            if not torch.is_grad_enabled():
                seen.add(torch.backends.mkldnn.matmul.fp32_precision)
            return 0.5 * x

    model = de_grad(Denoiser(), averaging="auto", solver=Anderson(tol=1e-5))
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        model.update_averaging(torch.rand(1, 3, 8, 8))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert seen == {"ieee"}


class RunningMean(nn.Module):
    """Anyone's norm with running statistics, which it replaces by new tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean((0, 2, 3)).detach()
        return x - self.running_mean[:, None, None]


class Activated(nn.BatchNorm2d):
    """A batch norm with a module of its own inside, as in timm."""

    def __init__(self):
        super().__init__(6)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


NORMS = {
    "old spectral norm": lambda: nn.utils.spectral_norm(convolution(6, 6)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(convolution(6, 6)),
    "ours": lambda: jfbfast.models.lipschitz.SpectralNormConv2d(6, 6, 3, padding=1),
    "batch norm": lambda: nn.BatchNorm2d(6),
    "cumulative batch norm": lambda: nn.BatchNorm2d(6, momentum=None),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "own": RunningMean,
    "batch norm with an activation": Activated,
    "parametrised batch norm": lambda: nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(6), "weight", dim=None),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_later_forward_does_not_change_the_graph_of_an_earlier_one(norm):
    model = de_grad(convolution(3, 6), NORMS[norm](), nn.ReLU(), convolution(6, 3), solver=Anderson(tol=1e-5))
    twin = copy.deepcopy(model)
    batches = torch.rand(2, 2, 3, 12, 12)
    loss = sum(model(d).square().sum() + model(d).sum() for d in batches)
    loss.backward()
    for d in batches:
        twin(d).square().sum().backward()
        twin(d).sum().backward()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_a_penalty_may_come_before_a_forward(norm):
    model = de_grad(convolution(3, 6), NORMS[norm](), nn.ReLU(), convolution(6, 3))
    d = torch.rand(2, 3, 12, 12)
    model(d)
    penalty = jacobian_penalty(model, d)
    (model(d).sum() + penalty).backward()


def test_an_instance_norm_normalises_by_the_sample_and_updates_its_statistics():
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    first = convolution(3, 6)
    model = de_grad(first, norm, nn.ReLU(), convolution(6, 3), solver=Anderson(tol=1e-6, max_iter=300)).double()
    d = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    x = model(d).detach()
    assert (model.solution.status == Status.CONVERGED).all()
    seen = first(model.solution.value)
    torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen.var((2, 3)).mean(0))
    before = norm.running_mean.clone()
    torch.testing.assert_close(model.layer(x, d), x, rtol=0, atol=1e-4)  # as torch has it in train()
    norm.running_mean = before
    model.eval()
    x = model(d).detach()
    torch.testing.assert_close(model.layer(x, d), x, rtol=0, atol=1e-4)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("name", ["batch norm with an activation", "parametrised batch norm"])
def test_a_norm_with_modules_inside_updates_its_statistics_once(name):
    norm = NORMS[name]()
    outer = nn.Sequential(norm)
    outer.register_buffer("running_scale", torch.ones(()))  # of a norm around it
    model = de_grad(convolution(3, 6), outer, nn.ReLU(), convolution(6, 3))
    model(torch.rand(2, 3, 12, 12))
    assert norm.num_batches_tracked == 1 and norm.running_mean.any()


def test_any_norm_updates_its_statistics_once():
    norm = RunningMean()
    model = de_grad(convolution(3, 6), norm, nn.ReLU(), convolution(6, 3))
    model(torch.rand(2, 3, 12, 12))
    seen = model.regularizer.denoiser[0](model.solution.value)
    torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
    stepped = norm.running_mean.clone()
    model.eval()(torch.rand(2, 3, 12, 12))
    assert torch.equal(norm.running_mean, stepped)


def test_synchronised_batch_norms_are_refused_among_processes(monkeypatch):
    model = de_grad(convolution(3, 6), nn.SyncBatchNorm(6), nn.ReLU(), convolution(6, 3))
    d = torch.rand(2, 3, 12, 12)
    model(d)  # of one process it is a batch norm
    monkeypatch.setattr(frozen, "_processes", lambda: 2)
    with pytest.raises(ValueError, match=r"SyncBatchNorm in train.* it takes BatchNorm2d"):
        model(d)
    model.eval()(d)


def coupled(seed=0, size=20):
    torch.manual_seed(seed)
    inner, outer = nn.Linear(size, size), nn.Linear(size, size)
    with torch.no_grad():
        inner.weight *= 0.5
    x = torch.randn(8, size) * torch.logspace(-3, 1, 8)[:, None]
    return (lambda z, x: torch.tanh(inner(z) - 0.8 * inner(z).mean(0) + outer(x))), inner, torch.zeros(8, size), x


def test_a_layer_that_couples_samples_is_not_reported_as_converged():
    layer, inner, z, x = coupled()
    with pytest.warns(ConvergenceWarning, match="8 of 8 samples did not converge.*couples the samples of a batch"):
        out, solution = solve_fixed_point(
            layer, z, inputs=(x,), parameters=inner.parameters(), solver=Anderson(tol=1e-5)
        )
    torch.testing.assert_close(out, layer(solution.value, x))
    true = (out - solution.value).norm(dim=1) / out.norm(dim=1)
    assert (true > 1e-4).all() and (solution.status == Status.MAX_ITER).all()
    torch.testing.assert_close(solution.residual, true.detach())


def test_a_layer_that_changes_between_evaluations_is_not_reported_as_converged():
    steps = iter(range(1000))

    def drifting(z, x):
        return 0.3 * z + x + (next(steps) > 2) * 0.5

    with pytest.warns(ConvergenceWarning, match="changes between evaluations"):
        _, solution = solve_fixed_point(drifting, torch.zeros(2, 5), inputs=(torch.ones(2, 5),))
    assert (solution.status == Status.MAX_ITER).all() and (solution.residual > 0.1).all()


def test_a_captured_graph_is_refused_unless_its_leaves_are_named():
    cell, d, x0 = problem()
    encoder = nn.Linear(12, 12).double()
    encoded = encoder(d)

    def layer(x):
        return cell(x, encoded)

    with pytest.raises(ValueError, match=r"computed before the solve, from one of shape .* pass it in inputs="):
        fixed_point(layer, x0, parameters=cell.parameters())
    with pytest.raises(ValueError, match="would get none"):
        fixed_point(layer, x0)
    fixed_point(layer, x0, parameters=[d, *cell.parameters(), *encoder.parameters()]).sum().backward()
    found = encoder.weight.grad.clone()
    encoder.zero_grad()
    fixed_point(cell, x0, inputs=(encoder(d),)).sum().backward()
    torch.testing.assert_close(found, encoder.weight.grad)
    fixed_point(cell, x0, inputs=(d,), parameters=[cell.inner.weight]).sum().backward()  # others are left out
    first, second = encoder(d[0]).view(2, 6).unbind(0)  # of one node of the graph
    with pytest.raises(ValueError, match="would get none"):
        fixed_point(lambda x: torch.tanh(0.3 * first * x) + second, torch.zeros_like(x0[:, :6]), parameters=[first])


class GradientStep(nn.Module):
    """D(x) = x − ∇½‖x − N(x)‖², its gradient taken at a detached x as in published code."""

    def __init__(self, detached=True):
        super().__init__()
        self.network = nn.Sequential(convolution(3, 6), nn.Softplus(), convolution(6, 3))
        self.detached = detached

    def forward(self, x):
        with torch.enable_grad():
            x = (x.detach() if self.detached else x).requires_grad_()
            energy = 0.5 * (x - self.network(x)).square().sum()
            (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        return x - 0.1 * gradient


def test_a_layer_that_detaches_may_hold_its_batch():
    d, step = torch.rand(4, 3, 8, 8), GradientStep()

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = step

        def forward(self, x):
            return 0.3 * self.step(x) + d

    fixed_point(Holding(), torch.zeros_like(d)).sum().backward()
    assert all(p.grad is not None for p in step.parameters())


@pytest.mark.parametrize("options", [{}, {"preconditioner": "exact"}], ids=str)
def test_a_gradient_step_denoiser_takes_jfb(options):
    d = torch.rand(2, 3, 10, 10, dtype=torch.float64)
    detached = DEGrad(GaussianBlur(), RED(GradientStep(), 0.3), solver=Anderson(tol=1e-10, max_iter=200), **options)
    plain = copy.deepcopy(detached)
    plain.regularizer.denoiser.detached = False
    gradients = []
    for model in (detached.double(), plain.double()):
        model(d).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gradient", ["neumann", "phantom", "implicit", "unrolled"])
def test_a_layer_that_detaches_x_is_refused_by_methods_that_differentiate_in_x(gradient):
    model = DEGrad(GaussianBlur(), RED(GradientStep(), 0.3), preconditioner="exact", gradient=gradient)
    d = torch.rand(2, 3, 10, 10)
    for parameters in (None, list(model.parameters())):
        with pytest.raises(ValueError, match=r"layer detaches x, and gradient is .* needs ∂T/∂x; it takes 'jfb'"):
            fixed_point(model.layer, d, inputs=(d,), parameters=parameters, gradient=gradient)


@pytest.mark.parametrize("gradient", ["neumann", "phantom", "implicit", "unrolled"])
def test_a_layer_that_sets_requires_grad_on_x_only_if_needed_is_not_refused(gradient):
    class Step(GradientStep):
        def forward(self, x):
            self.detached = not x.requires_grad
            return super().forward(x)

    model = DEGrad(GaussianBlur(), RED(Step(), 0.3), preconditioner="exact", gradient=gradient)
    model(torch.rand(2, 3, 10, 10)).sum().backward()


@pytest.mark.parametrize("shape", [(2, 16, 9, 11), (3, 32, 16, 16)], ids=str)
def test_our_convolutions_count_as_many_operations_as_torchs(shape):
    x, weight = torch.rand(shape, requires_grad=True), torch.rand(24, shape[1], 3, 3, requires_grad=True)

    def counted(convolve):
        with FlopCounterMode(display=False) as counter:
            convolve(x, weight).sum().backward()
        return counter.get_total_flops()

    assert counted(winograd.conv3x3) == counted(lambda x, w: F.conv2d(x, w, padding=1)) > 0


def test_a_models_operations_are_counted():
    layers = (convolution(3, 16), nn.ReLU(), convolution(16, 16), nn.ReLU(), convolution(16, 3))
    model = de_grad(*layers, solver=Anderson(tol=0, max_iter=3))
    d = torch.rand(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        model(d)
    convolutions = 4 * 2 * 2 * 16 * 16 * 9 * (3 * 16 + 16 * 16 + 16 * 3)  # three evaluations, and the last application
    solves = (1 + 4) * 4 * d.numel() * (16 + 16)
    blurs = 2 * d.numel() * sum(model.blur.kernel_size)  # Aᵀd
    assert counter.get_total_flops() == convolutions + solves + blurs
