"""Networks and operators of other libraries, in a DE-GRAD."""

import copy

import deepinv
import pytest
import torch
from timm.layers import SEModule
from timm.models import convnext as timm_convnext
from timm.models import resnet as timm_resnet
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn
from torchvision.models import convnext, mobilenetv2, resnet
from torchvision.models.resnet import BasicBlock

import jfbfast
from jfbfast import RED, Anderson, DEGrad, GaussianBlur, Picard, Status, jacobian_penalty

models, physics = deepinv.models, deepinv.physics


def between(*blocks):
    """Blocks of 16 channels between convolutions from and to images."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks, nn.Conv2d(16, 3, 3, padding=1))


def gradient_step():
    """deepinv's gradient-step denoiser; as it comes, it cannot be differentiated."""
    network = models.GSDRUNet(in_channels=3, out_channels=3, nc=(8, 8, 8, 8), nb=1, pretrained=None)
    network.detach = False
    return network


NETWORKS = {
    "DnCNN": lambda: models.DnCNN(3, 3, depth=4, nf=16, pretrained=None),
    "DRUNet": lambda: models.DRUNet(3, 3, nc=(16, 16, 16, 16), nb=1, pretrained=None),
    "GSDRUNet": gradient_step,
    "UNet": lambda: models.UNet(3, 3, scales=2, batch_norm=False),
    "UNet with batch norms": lambda: models.UNet(3, 3, scales=2, batch_norm=True),
    "SwinIR": lambda: models.SwinIR(
        img_size=16, window_size=8, embed_dim=12, depths=(2,), num_heads=(2,), in_chans=3, pretrained=None, upsampler=""
    ),
    "FFDNet": lambda: models.FFDNet(3, 16, 3, pretrained=None),
    "DScCP": lambda: models.DScCP(depth=3, n_channels_per_layer=8, pretrained=None),
    "Restormer": lambda: models.Restormer(
        3, 3, dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 1, 1), pretrained=None
    ),
    "torchvision BasicBlock": lambda: between(BasicBlock(16, 16)),
    "torchvision Bottleneck": lambda: between(resnet.Bottleneck(16, 4)),
    "torchvision InvertedResidual": lambda: between(mobilenetv2.InvertedResidual(16, 16, 1, 2)),
    "torchvision CNBlock": lambda: between(convnext.CNBlock(16, 0.1, 0.0)),
    "timm ConvNeXtBlock": lambda: between(timm_convnext.ConvNeXtBlock(16, ls_init_value=0.1, drop_path=0.2)),
    "timm Bottleneck": lambda: between(timm_resnet.Bottleneck(16, 4, attn_layer=SEModule)),
    "timm InvertedResidual": lambda: between(InvertedResidual(16, 16, exp_ratio=2.0)),
}
TOLD_NO_NOISE = [name for name in NETWORKS if name.startswith(("torchvision", "timm"))]


def denoising(network, name, learn_noise=True):
    """A RED with a third-party denoiser that has been made to contract."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1)
    noise = None if name in TOLD_NO_NOISE else 0.05
    return RED(network, 0.1, "weight", noise=noise, learn_noise=learn_noise and noise is not None)


def gradients_match_the_reference(name, dtype, tol, close, training):
    start = DEGrad(
        GaussianBlur(),
        denoising(NETWORKS[name](), name),
        preconditioner="exact",
        solver=Anderson(tol=tol, max_iter=300),
    )
    d = torch.rand(2, 3, 16, 16, dtype=dtype) * 2 - 1
    found = []
    for backend in ("auto", "reference"):
        model = copy.deepcopy(start).to(dtype).train(training)
        leaf = d.clone().requires_grad_()
        with jfbfast.backend(backend):
            model(leaf).square().sum().backward()
        assert (model.solution.status == Status.CONVERGED).all()
        found.append(torch.cat([p.grad.flatten() for p in (leaf, *model.parameters()) if p.grad is not None]))
    assert torch.linalg.vector_norm(found[0] - found[1]) <= close * torch.linalg.vector_norm(found[1])


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of SwinIR
@pytest.mark.parametrize("name", NETWORKS)
def test_a_denoiser_of_others_trains_with_the_gradients_of_the_reference(name):
    gradients_match_the_reference(name, torch.float32, 1e-5, 1e-3, training=True)


# GSDRUNet computes in float32. DScCP estimates a norm from a random start in each call, so it is no fixed map to 1e-12.
INEXACT = ("GSDRUNet", "DScCP")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in INEXACT])
def test_a_denoiser_of_others_has_the_gradients_of_the_reference_in_float64(name, training):
    gradients_match_the_reference(name, torch.float64, 1e-12, 1e-10, training)


def contraction():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1))


def per_sample_physics(kind, batch, size):
    """One mask or kernel a sample."""
    if kind == "masks":
        return physics.Inpainting((3, size, size), mask=torch.rand(batch, 3, size, size).round())
    kernels = torch.rand(batch, 1, 3, 3)
    return physics.Blur(filter=kernels / kernels.sum((2, 3), keepdim=True), padding="circular")


def of_one(operator, i):
    """The same physics with the mask or kernel of one sample."""
    operator = copy.deepcopy(operator)
    name = "mask" if hasattr(operator, "mask") else "filter"
    setattr(operator, name, getattr(operator, name)[i : i + 1])
    return operator


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
@pytest.mark.parametrize("preconditioner", [None, "exact"])
@pytest.mark.parametrize("solver", [Anderson(tol=1e-3), Picard(tol=0, max_iter=10)], ids=["tol=1e-3", "tol=0"])
@pytest.mark.parametrize("kind", ["masks", "kernels"])
def test_an_operator_may_hold_data_of_each_sample(kind, solver, preconditioner):
    batch, size = 6, 12
    operator = per_sample_physics(kind, batch, size)
    regularizer = RED(contraction(), 0.5)
    d = operator.A(torch.rand(batch, 3, size, size)) * torch.logspace(-3, 1, batch)[:, None, None, None]
    model = DEGrad(operator, regularizer, preconditioner=preconditioner, solver=solver, step_size=1.0)
    found = model(d)
    if solver.tol:
        assert len(set(model.solution.iterations.tolist())) > 1  # some converge before others
    (found.square().sum() + jacobian_penalty(model, d)).backward()
    for i in range(batch):
        alone = DEGrad(of_one(operator, i), regularizer, preconditioner=preconditioner, solver=solver, step_size=1.0)
        torch.testing.assert_close(alone(d[i : i + 1]), found[i : i + 1], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
def test_a_bad_sample_affects_no_other_sample_of_an_operator_with_masks():
    operator = per_sample_physics("masks", 3, 10)
    model = DEGrad(operator, RED(contraction(), 0.1), preconditioner="exact")
    d = torch.rand(3, 3, 10, 10)
    good = model(d)[[0, 2]]
    expected = torch.autograd.grad(good.square().sum(), list(model.parameters()))
    d[1] = torch.nan
    d.requires_grad_()
    out = model(d)
    torch.testing.assert_close(out[[0, 2]], good)
    assert model.solution.status[1] == Status.DIVERGED and out[1].isnan().all()
    (out[[0, 2]].square().sum() + 0 * jacobian_penalty(model, d)).backward()
    assert (d.grad[1] == 0).all()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
@pytest.mark.parametrize("gradient", ["jfb", "implicit"])
@pytest.mark.parametrize("filter_damping", [None, "weight"])
def test_a_mask_may_change_before_backward(filter_damping, gradient):
    operator, x = per_sample_physics("masks", 2, 8), torch.rand(2, 3, 8, 8)
    regularizer = RED(contraction(), 0.3, filter_damping)
    model = DEGrad(operator, regularizer, preconditioner="exact", gradient=gradient, solver=Anderson(tol=1e-6))
    masks = torch.rand(2, 2, 3, 8, 8).round()

    def losses():
        for mask in masks:
            operator.update_parameters(mask=mask)
            yield (model(mask * x) - x).square().sum()

    together = torch.autograd.grad(sum(losses()), list(model.parameters()))
    for loss in losses():
        loss.backward()
    for parameter, found in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)


def test_operators_in_a_list_are_found():
    class Masked:
        def __init__(self, mask):
            self.mask = mask

        def __call__(self, x):
            return self.mask * x

        adjoint = __call__

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.operators = [Masked(torch.rand(6, 5))]
            self.inner = nn.Linear(5, 5)

        def forward(self, x, d):
            return torch.tanh(0.3 * self.inner(x)) + self.operators[0](d)

    d = torch.rand(6, 5) * torch.logspace(-3, 1, 6)[:, None]
    jfbfast.fixed_point(Layer(), torch.zeros(6, 5), inputs=(d,)).sum().backward()


def masked(mask):
    network = jfbfast.DnCNN(3, 6, 3, norm="batch", residual=True)
    return DEGrad(physics.Inpainting((3, 8, 8), mask=mask), RED(network), preconditioner="exact")


def test_a_state_dict_holds_the_weights_and_names_the_operator(tmp_path):
    first, second = masked(torch.rand(4, 3, 8, 8).round()), masked(torch.rand(1, 1, 8, 8).round())
    mask = second.blur.operator.physics.mask.clone()
    state = first.state_dict()
    assert not [name for name in state if name.startswith("blur")]
    with pytest.warns(UserWarning, match="from a model for Inpainting with buffers .*; this model is for Inpainting"):
        second.load_state_dict(state)
    assert torch.equal(second.blur.operator.physics.mask, mask)
    torch.testing.assert_close(second.state_dict(), state, rtol=0, atol=0)
    copy.deepcopy(first).load_state_dict(state)  # without a warning

    old = {**state, "blur.operator.physics.mask": torch.zeros(4, 3, 8, 8)}  # as saved by an earlier version
    second.load_state_dict(old)
    assert torch.equal(second.blur.operator.physics.mask, mask)

    def blurred(sigma):
        return DEGrad(GaussianBlur(5, sigma), RED(jfbfast.DnCNN(3, 6, 3, residual=True)), preconditioner="exact")

    torch.save({"model": nn.ModuleList([blurred(1.0)]).state_dict()}, tmp_path / "state.pt")
    with pytest.warns(UserWarning, match=r"for GaussianBlur\(.*sigma=\(1.0, 1.0\).* is for .*sigma=\(2.0, 2.0\)"):
        nn.ModuleList([blurred(2.0)]).load_state_dict(torch.load(tmp_path / "state.pt")["model"])


def test_a_learnt_operator_keeps_its_weights_in_the_state_dict():
    class Learnt(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.rand(()))
            self.register_buffer("mask", torch.rand(8, 8).round())
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.gain * self.mask * x

        adjoint = forward

    first, second = (DEGrad(Learnt(), RED(jfbfast.DnCNN(3, 6, 3, residual=True))) for _ in range(2))
    first.blur.norm.running_mean += 1
    mask = second.blur.mask.clone()
    with pytest.warns(UserWarning, match="Learnt"):
        second.load_state_dict(first.state_dict())
    assert second.blur.gain == first.blur.gain and (second.blur.norm.running_mean == 1).all()
    assert torch.equal(second.blur.mask, mask)


@pytest.mark.parametrize("x0", [physics.Denoising(), (torch.zeros(1),), "start"], ids=["physics", "tuple", "text"])
def test_a_start_that_is_not_a_tensor_is_refused(x0):
    model = DEGrad(GaussianBlur(), RED(jfbfast.DnCNN(3, 6, 3, residual=True)))
    with pytest.raises(TypeError, match=f"x0 is a {type(x0).__name__}; it takes a tensor to start from, or None"):
        model(torch.rand(1, 3, 8, 8), x0=x0)


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
def test_a_model_with_masks_has_a_report():
    operator = per_sample_physics("masks", 3, 8)
    model = DEGrad(operator, RED(contraction(), 0.5), preconditioner="exact").double()
    d = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    found = jfbfast.diagnostics.report(model, d, iterations=20, steps=4)
    alone = DEGrad(of_one(operator, 1), model.regularizer, preconditioner="exact")
    expected = jfbfast.diagnostics.report(alone, d[1:2], iterations=20, steps=4)
    torch.testing.assert_close(found.contraction_factor[1:2], expected.contraction_factor)
    assert (found.cosine["implicit"] > 0.999).all() and found.cosine.keys() == expected.cosine.keys()
