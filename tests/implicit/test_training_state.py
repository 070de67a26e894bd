"""What one training forward changes in a module: running statistics, spectral norms, and no more."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from helpers.implicit import assert_all_close, gradients_of, problem
from jfbfast import (
    Anderson,
    ConvergenceWarning,
    DEGrad,
    DnCNN,
    GaussianBlur,
    Implicit,
    Phantom,
    Unrolled,
    fixed_point,
)
from jfbfast.implicit.frozen import TrainingState, frozen, step_spectral_norms


def test_parametrised_weights_do_not_leak_into_the_callers_cache():
    cell, d, x0 = problem(dtype=torch.float32)
    torch.nn.utils.parametrizations.weight_norm(cell.inner)
    expected = gradients_of(cell, d, fixed_point(cell, x0, inputs=(d,)))
    with parametrize.cached():
        out = fixed_point(cell, x0, inputs=(d,))
        weight = cell.inner.weight
        assert_all_close(gradients_of(cell, d, out), expected, 1e-6)
        fixed_point(cell, x0, inputs=(d,))
        assert cell.inner.weight is weight
    assert not parametrize._cache


@pytest.mark.parametrize("method", ["jfb", Phantom(steps=3), Unrolled(4), Implicit(max_iter=300)], ids=str)
@pytest.mark.parametrize("bad", [False, True])
def test_a_training_forward_steps_each_buffer_once(method, bad):
    model = DEGrad(GaussianBlur(), DnCNN(3, 5, 4), step_size=0.3, gradient=method).double().train()
    d = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    good = slice(0, 3)
    if bad:
        d[2, 0, 0, 0] = torch.nan
        good = slice(0, 2)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model(d)
    assert all(m.training for m in model.modules())
    step_spectral_norms(twin)
    for mine, other in zip(model.modules(), twin.modules(), strict=True):
        if hasattr(other, "power_iteration"):
            torch.testing.assert_close(mine.u, other.u, rtol=0, atol=0)
    seen = []
    for norm in (norms := [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]):
        norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    twin.eval()
    twin.layer(model.solution.value[good], d[good])
    updated = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm, mine, x in zip(norms, updated, seen, strict=True):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        torch.testing.assert_close(mine.running_mean, 0.9 * norm.running_mean + 0.1 * mean)
        torch.testing.assert_close(mine.running_var, 0.9 * norm.running_var + 0.1 * var)
        assert int(mine.num_batches_tracked) == 1


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("method", ["jfb", "unrolled", Phantom(steps=2), Implicit(max_iter=20)], ids=str)
@pytest.mark.parametrize("state", ["batch norm", "spectral norm", "dropout"])
def test_a_regulariser_may_use_checkpointing_while_it_trains(state, method):
    if state == "dropout":
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.ConvTranspose2d(4, 3, 3))
    else:
        norm = "batch" if state == "batch norm" else None
        net = DnCNN(3, 5, 3, norm=norm, spectral_norm=state == "spectral norm", bias=True)
    solver = Anderson(tol=1e-3, max_iter=30)
    plain = DEGrad(GaussianBlur(), net, step_size=0.3, gradient=method, solver=solver).train()
    nn.init.uniform_(next(net.parameters()), -0.1, 0.1)
    model = copy.deepcopy(plain)
    model.regularizer = Checkpointed(model.regularizer)
    d = 0.3 * torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for m in (plain, model):
            m(d).square().sum().backward()
    assert_all_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], 1e-5)
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    assert all(m.training for m in model.modules())


def test_the_spectral_norms_stay_fixed_through_many_applications():
    model = DEGrad(GaussianBlur(), DnCNN(3, 5, 3), step_size=0.3, gradient=Unrolled(4)).double().train()
    d = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    still = copy.deepcopy(model)
    for m in still.modules():
        if hasattr(m, "power_iteration"):
            m.power_iteration()
    for m in (model, still.eval()):
        m(d).square().sum().backward()
    assert_all_close([p.grad for p in model.parameters()], [p.grad for p in still.parameters()], 1e-10)


def test_a_batch_norm_that_is_called_by_keyword_updates_its_statistics():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return 0.1 * self.norm(input=x)

    model = DEGrad(GaussianBlur(), ByKeyword(), step_size=0.5).train()
    model(torch.randn(2, 3, 8, 8))
    assert model.regularizer.norm.num_batches_tracked == 1 and model.regularizer.norm.running_mean.any()


class Norms(nn.Module):
    """Batch norms of many kinds, the first of which is called twice."""

    def __init__(self):
        super().__init__()
        kinds = [{"momentum": 0.3}, {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0, "affine": False}, {}, {}]
        self.norms = nn.ModuleList(nn.BatchNorm2d(3, **kind) for kind in kinds)
        self.norms[4].eval()
        self.norms[5].num_batches_tracked = None

    def forward(self, x, inputs=None):
        for i, norm in enumerate((*self.norms, self.norms[0])):
            if inputs is not None:
                inputs.append((norm, x + i))
            x = norm(x + i).sin() + x
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_running_statistics_are_updated_as_torch_updates_them(dtype):
    module = Norms().train().to(dtype)
    module.norms[4].eval()
    x = torch.randn(3, 3, 5, 7, dtype=dtype).to(memory_format=torch.channels_last)
    for _ in range(2):
        twin, inputs = copy.deepcopy(module), []
        with frozen(twin):
            expected = twin(x, inputs)
        for norm, seen in inputs:
            norm(seen)
        before = copy.deepcopy(module)
        with TrainingState(module).updated(), frozen(module):
            torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
        tolerances = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {}
        for found, wanted in zip(module.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(found, wanted, **tolerances)
        assert not torch.equal(module.norms[0].running_var, before.norms[0].running_var)
        assert torch.equal(module.norms[4].running_var, before.norms[4].running_var)


def test_low_precision_images_update_the_statistics_in_full_precision():
    norm, x = nn.BatchNorm2d(3), (100 + torch.randn(4, 3, 6, 6)).bfloat16()
    with TrainingState(norm).updated(), frozen(norm):
        norm(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.float().mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.float().var((0, 2, 3)))


def test_a_batch_of_one_value_has_no_statistics():
    norm = nn.BatchNorm2d(3)
    with (
        pytest.raises(ValueError, match="Expected more than 1 value per channel"),
        TrainingState(norm).updated(),
        frozen(norm),
    ):
        norm(torch.ones(1, 3, 1, 1))
