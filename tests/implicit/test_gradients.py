"""JFB through any layer: the gradient of one application at x*, and what a training forward may change."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jfbfast
from helpers import processes
from helpers.models import Cell, networks
from jfbfast import Anderson, ConvergenceWarning, DEGrad, GaussianBlur, Status, fixed_point
from jfbfast.implicit.frozen import frozen


def reference_gradient(model, d, loss):
    """Autograd through one layer at the x* that the model found, in eval(), as the solve sees it."""
    twin = copy.deepcopy(model).eval()
    x = model.solution.value
    leaf = d.detach().clone().requires_grad_()
    loss(twin.layer(x, leaf)).backward()
    return {name: p.grad for name, p in twin.named_parameters()}, leaf.grad


def test_a_compiled_module_is_a_layer():
    cell, d = Cell(), torch.randn(2, 12)
    plain = fixed_point(cell, torch.zeros(2, 12), inputs=(d,))
    compiled = fixed_point(torch.compile(cell, backend="eager"), torch.zeros(2, 12), inputs=(d,))
    assert compiled.requires_grad
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_that_of_one_layer(name, training):
    torch.manual_seed(1)
    model = networks()[name].double().train(training)
    d = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 3, 9, 8, dtype=torch.float64)

    def loss(x):
        return F.mse_loss(x, target)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        before = copy.deepcopy(model)
        restored = model(d)
    if training:  # the spectral norms have stepped once; normalisation used the statistics from before
        for module, old in zip(model.modules(), before.modules(), strict=True):
            if hasattr(module, "u"):
                old.u.copy_(module.u)
                old.v.copy_(module.v)
    before.solution = model.solution
    expected, expected_d = reference_gradient(before, d, loss)
    loss(restored).backward()
    for parameter_name, parameter in model.named_parameters():
        assert expected[parameter_name] is not None
        torch.testing.assert_close(parameter.grad, expected[parameter_name], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(d.grad, expected_d, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(restored, before.eval().layer(model.solution.value, d), rtol=1e-12, atol=1e-12)


def test_the_gradient_under_autocast_is_as_good_as_that_of_the_plain_layer():
    model = networks()["filtered"].eval()
    d = torch.randn(2, 3, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        restored = model(d)
        plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
        expected = plain.layer(model.solution.value, d)
    assert restored.dtype == torch.float32
    for out in (restored, expected, exact.layer(model.solution.value.double(), d.double())):
        out.square().sum().backward()
    ours, plains, exacts = (
        torch.cat([p.grad.flatten().double() for p in each.parameters()]) for each in (model, plain, exact)
    )
    assert (ours - exacts).norm() <= 1.2 * (plains - exacts).norm()
    assert (ours - exacts).norm() <= 0.02 * exacts.norm()


def test_any_implicit_network_can_be_differentiated():
    cell = Cell().double()
    d = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(5, 12, dtype=torch.float64)
    out = fixed_point(cell, x0, inputs=(d,), solver=Anderson(tol=1e-12))
    torch.testing.assert_close(out, cell(out, d), rtol=0, atol=1e-10)
    out.square().sum().backward()
    grads = [p.grad.clone() for p in cell.parameters()]
    cell.zero_grad()
    cell(out.detach(), d).square().sum().backward()
    for grad, p in zip(grads, cell.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-8, atol=1e-8)


def test_parameters_of_a_plain_callable_must_be_named():
    weight = torch.full((3,), 0.5, requires_grad=True)
    scaled = weight * 1.0

    def layer(x):
        return scaled * torch.tanh(x) + 1

    x0 = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="parameters="):
        fixed_point(layer, x0)
    fixed_point(layer, x0, parameters=[scaled]).sum().backward()
    assert weight.grad is not None and (weight.grad != 0).all()


def test_a_module_that_uses_a_foreign_tensor_raises():
    cell, foreign = Cell(), torch.ones(12, requires_grad=True)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x, d):
            return self.cell(x, d) * foreign * 0.5

    with pytest.raises(ValueError, match=r"tensor of shape \(12,\)"):
        fixed_point(Wrapped(), torch.zeros(2, 12), inputs=(torch.zeros(2, 12),))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", ["filtered", "injection"])
def test_a_bad_sample_affects_no_other_sample(name, backend):
    torch.manual_seed(2)
    model = networks()[name].double()
    d = torch.randn(3, 3, 9, 8, dtype=torch.float64)
    bad = d.clone()
    bad[1, 0, 4, 4] = torch.nan
    good_model, bad_model = model, copy.deepcopy(model)
    with jfbfast.backend(backend):
        good = good_model(d)
        with pytest.warns(ConvergenceWarning, match=r"1 of 3 samples .*\(1 diverged"):
            found = bad_model(bad.requires_grad_())
    assert bad_model.solution.status[1] == Status.DIVERGED
    assert found[1].isnan().all()
    assert torch.equal(good[[0, 2]], found[[0, 2]])
    good[[0, 2]].square().sum().backward()
    found.square().sum().backward()
    for a, c in zip(good_model.parameters(), bad_model.parameters(), strict=True):
        assert c.grad.isfinite().all()
        torch.testing.assert_close(a.grad, c.grad, rtol=1e-12, atol=1e-14)
    assert (bad.grad[1] == 0).all() and (bad.grad[0] != 0).any()


def test_captured_data_of_a_bad_sample_is_refused():
    weight = torch.full((3,), 0.5, requires_grad=True)
    x0, d = torch.zeros(4, 3), torch.randn(4, 3)
    d[1, 0] = torch.nan
    with pytest.raises(ValueError, match="inputs is empty"):
        fixed_point(lambda x: d + weight * x, x0, parameters=[weight])
    with pytest.warns(ConvergenceWarning):
        out = fixed_point(lambda x, d: d + weight * x, x0, inputs=(d,), parameters=[weight])
    out[[0, 2, 3]].sum().backward()
    assert weight.grad.isfinite().all()
    with pytest.raises(TypeError, match="parameters is a tensor"):
        fixed_point(lambda x, d: d + weight * x, x0, inputs=(torch.zeros(4, 3),), parameters=weight)


def test_torchs_hook_of_spectral_norm_steps_once():
    conv = torch.nn.utils.spectral_norm(nn.Conv2d(3, 3, 3, padding=1, bias=False))
    model = DEGrad(GaussianBlur(), conv, step_size=0.3)
    with torch.no_grad():
        conv.weight_orig += torch.randn_like(conv.weight_orig)
    matrix, u = conv.weight_orig.detach().flatten(1), conv.weight_u.clone()
    v = F.normalize(matrix.T @ u, dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model(torch.randn(1, 3, 8, 8)).sum().backward()
    torch.testing.assert_close(conv.weight_u, F.normalize(matrix @ v, dim=0))


def test_a_forward_in_eval_changes_no_buffer():
    model = networks()["paper"].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model(torch.randn(4, 3, 10, 10))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_torchs_own_spectral_norm_and_dropout_stay_fixed_during_a_solve():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
            self.dropout = nn.Dropout(0.5)
            self.weights = []

        def forward(self, x, d):
            self.weights.append(self.linear.weight.detach().clone())
            return 0.5 * self.dropout(self.linear(x)) + d

    layer = Layer()
    twin = copy.deepcopy(layer)
    twin.linear.weight  # noqa: B018  # one power iteration
    out = fixed_point(layer, torch.zeros(2, 8), inputs=(torch.randn(2, 8),))
    out.sum().backward()
    assert len(layer.weights) > 3
    for weight in layer.weights[1:]:
        torch.testing.assert_close(weight, layer.weights[0])
    original, expected = (m.linear.parametrizations.weight[0]._u for m in (layer, twin))
    torch.testing.assert_close(original, expected)


def test_hooks_that_a_layer_puts_on_its_inputs_run():
    def layer(x, d):
        if d.requires_grad:
            d.register_hook(lambda g: 10 * g)
        return 0.5 * x + d

    d = torch.randn(2, 3, requires_grad=True)
    fixed_point(layer, torch.zeros(2, 3), inputs=(d,)).sum().backward()
    torch.testing.assert_close(d.grad, torch.full_like(d, 10.0))


def test_a_module_that_refuses_its_mode_does_not_change_that_of_the_others():
    class Rigid(nn.Identity):
        def __setattr__(self, name, value):
            if name == "training" and not value:
                raise RuntimeError("rigid")
            super().__setattr__(name, value)

    module = nn.Sequential(nn.Linear(3, 3), Rigid())
    with pytest.raises(RuntimeError, match="rigid"), frozen(module):
        pass
    assert module.training and module[0].training
    module[1] = nn.Identity()
    with frozen(module):
        assert not module[0].training
    assert module[0].training


DDP = """
import torch, torch.distributed as dist, jfbfast
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
regularizer = jfbfast.RED(jfbfast.DnCNN(3, 6, 4, norm=None, residual=True), 0.1, "weight")
model = jfbfast.DEGrad(jfbfast.GaussianBlur(), regularizer, preconditioner="exact").double().eval()
d = torch.randn(4, 3, 8, 8, dtype=torch.float64)
parallel = torch.nn.parallel.DistributedDataParallel(model)
for gradient in (jfbfast.JFB(), jfbfast.Implicit("cg", tol=1e-12), jfbfast.Phantom(3)):
    model.gradient = gradient
    model(d).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parallel(d[2 * rank : 2 * rank + 2]).square().mean().backward()
    for p, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, grad, rtol=1e-8, atol=1e-10)
    model.zero_grad()
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradient_of_one():
    processes.run(DDP, [], [], environments=processes.environments())


def test_memory_does_not_depend_on_the_iterations():
    """Peak resident memory of one training step with 5 and with 200 evaluations, each in its own process."""
    script = """
import resource, sys, torch, jfbfast
torch.manual_seed(0)
regularizer = jfbfast.RED(jfbfast.DnCNN(3, 16, 6, residual=True), 0.1, "weight")
solver = jfbfast.Anderson(tol=0, max_iter=int(sys.argv[1]))
model = jfbfast.DEGrad(jfbfast.GaussianBlur(), regularizer, preconditioner="exact", solver=solver)
d = torch.randn(8, 3, 48, 48)
model(d).square().sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    few, many = (
        int(subprocess.run([sys.executable, "-c", script, str(k)], capture_output=True, text=True, check=True).stdout)
        for k in (5, 200)
    )
    assert many <= 1.02 * few


def test_parameters_with_their_names_are_refused():
    cell, d = Cell(), torch.randn(2, 12)
    with pytest.raises(TypeError, match="parameters has a tuple; it takes an iterable of tensors"):
        fixed_point(cell, torch.zeros(2, 12), inputs=(d,), parameters=cell.named_parameters())


def test_parameters_that_are_computed_get_a_gradient():
    cell, d = Cell(), torch.randn(2, 12)
    scale = torch.tensor(0.9, requires_grad=True)
    computed = {name: p.detach() * scale for name, p in cell.named_parameters()}

    class Solved(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, d):
            return fixed_point(self.cell, torch.zeros(2, 12), inputs=(d,), solver=Anderson(tol=1e-6))

    out = torch.func.functional_call(Solved(), {f"cell.{name}": p for name, p in computed.items()}, (d,))
    out.sum().backward()
    assert scale.grad.isfinite() and scale.grad != 0
