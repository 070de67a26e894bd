"""The denoisers: DnCNN and its spectral normalisation, and the U-Net."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from jfbfast import RED, DEGrad, DnCNN, GaussianBlur, NonexpansiveDenoiser, Picard, UNet, freeze_statistics
from jfbfast.models.denoisers import SpectralNormConv2d


def test_the_defaults_are_the_papers():
    network = DnCNN()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 17
    assert [c.out_channels for c in convolutions] == [64] * 16 + [3]
    assert all(isinstance(c, SpectralNormConv2d) and c.bias is None and c.kernel_size == (3, 3) for c in convolutions)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 15
    assert sum(isinstance(m, nn.ReLU) for m in network.modules()) == 16


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("spectral_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_norm_spectral_norm_and_bias_are_options(norm, spectral_norm, bias):
    network = DnCNN(1, 5, 4, norm, spectral_norm, bias).eval()
    kinds = [type(m) for m in network.modules()]
    assert (nn.BatchNorm2d in kinds) == (norm == "batch")
    assert (SpectralNormConv2d in kinds) == spectral_norm
    x = torch.randn(2, 1, 7, 9)
    residual = DnCNN(1, 5, 4, norm, spectral_norm, bias, residual=True).eval()
    residual.load_state_dict(network.state_dict())
    torch.testing.assert_close(residual(x), x - network(x))


def test_the_normalised_weight_has_norm_one_and_steps_once_per_forward():
    conv = SpectralNormConv2d(4, 6, 3)
    for _ in range(200):
        conv.power_iteration()
    norm = torch.linalg.matrix_norm(conv.normalised_weight().flatten(1), 2)
    torch.testing.assert_close(norm, torch.tensor(1.0))

    with torch.no_grad():
        conv.weight += 0.1 * torch.randn_like(conv.weight)
    twin = copy.deepcopy(conv)
    x = torch.randn(1, 4, 5, 5)
    conv.eval()(x)
    assert torch.equal(conv.u, twin.u)
    conv.train()(x)
    twin.power_iteration()
    assert torch.equal(conv.u, twin.u) and torch.equal(conv.v, twin.v)


def test_spectral_norm_agrees_with_torchs():
    conv = SpectralNormConv2d(3, 5, 3, bias=False).double()
    theirs = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 5, 3, bias=False).double())
    parametrization = theirs.parametrizations.weight
    with torch.no_grad():
        parametrization.original.copy_(conv.weight)
        parametrization[0]._u.copy_(conv.u)
        parametrization[0]._v.copy_(conv.v)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    ours_out, their_out = conv(x), theirs(x)
    torch.testing.assert_close(ours_out, their_out)
    ours_out.square().sum().backward()
    their_out.square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, parametrization.original.grad)


def test_two_training_forwards_can_precede_one_backward():
    network = DnCNN(1, 4, 3)
    x = torch.randn(2, 1, 6, 6)
    twin = copy.deepcopy(network)
    (network(x).square().sum() + network(x).square().sum()).backward()
    for _ in range(2):
        twin(x).square().sum().backward()
    for mine, other in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_deepcopy_and_pickle_keep_the_output():
    network = DnCNN(1, 4, 3).eval()
    x = torch.randn(1, 1, 5, 5)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(twin(x), network(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (1, 3, 13, 7), (2, 3, 1, 1), (0, 3, 8, 8), (1, 3, 0, 5)])
def test_unet_keeps_any_shape(shape):
    x = torch.randn(shape, dtype=torch.float64)
    out = UNet(3, (8, 6, 4), (1, 2, 1)).double()(x)
    assert out.shape == x.shape and out.is_contiguous()


def test_a_unet_blends_its_outputs_without_either_end_of_an_odd_side():
    net = UNet(3, (8, 6, 4), (1, 2, 1), conditions=1, injection=True).double()
    x, z = torch.randn(2, 2, 3, 11, 5, dtype=torch.float64)

    def network(rows, columns):
        return net(x[..., rows, columns], z[..., rows, columns], [0.3]) - x[..., rows, columns]

    out = torch.zeros_like(x)
    for rows, down in ((slice(0, 10), torch.arange(10, 0, -1)), (slice(1, 11), torch.arange(1, 11))):
        for columns, across in ((slice(0, 4), torch.arange(4, 0, -1)), (slice(1, 5), torch.arange(1, 5))):
            out[..., rows, columns] += down.double()[:, None] / 10 * across / 4 * network(rows, columns)
    torch.testing.assert_close(net(x, z, [0.3]), x + out, rtol=1e-12, atol=1e-12)


def test_a_scale_with_an_odd_side_is_padded_with_zeros():
    net = UNet(3, (8, 6), (1, 1)).double()
    seen = []
    net.down[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    net(torch.randn(1, 3, 10, 6, dtype=torch.float64))
    assert seen[0].shape == (1, 8, 6, 4) and not seen[0][..., 5, :].any() and not seen[0][..., 3].any()
    assert seen[0][..., :5, :3].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": (8, 0)}, "features is"),
        ({"features": ()}, "features is"),
        ({"features": 64}, "features is 64"),
        ({"features": (8, 8), "blocks": (1,)}, "blocks is"),
        ({"channels": 0}, "channels is"),
    ],
)
def test_unet_names_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DnCNN(depth="3"), "depth is '3'; it takes an integer of at least 2"),
        (lambda: DnCNN(features=8.0), r"features is 8\.0; it takes an integer"),
        (lambda: DnCNN(channels=True), "channels is True"),
        (lambda: DnCNN(spectral_norm=[1]), r"spectral_norm is \[1\]; it takes True, False or 'conv'"),
        (lambda: RED(nn.Identity(), "a"), "weight is 'a'; it takes a positive number"),
        (lambda: RED(nn.Identity(), filter_damping=True), "filter_damping is True; it takes a positive number"),
        (lambda: DEGrad(GaussianBlur(), nn.Identity(), step_size="a"), "step_size is 'a'; it takes a positive number"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 4, 8, 8), (3, 8, 8)])
def test_images_with_other_channels_are_refused(shape):
    x = torch.zeros(shape)
    for network in (DnCNN(3, 4, 3), NonexpansiveDenoiser(3, 4, 3), UNet(3, (4,), (1,))):
        with pytest.raises(ValueError, match=r"x has shape .*; it takes images \(B, 3, H, W\)"):
            network(x)
    with pytest.raises(
        ValueError, match=r"z has shape \(1, 3, 8, 9\); with x of shape \(1, 3, 8, 8\) it takes \(1, 3, 8, 8\)"
    ):
        UNet(3, (4,), (1,), injection=True)(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))


def test_numbers_of_numpy_and_torch_are_accepted():
    for value in (np.float32(0.5), torch.tensor(0.5), 1):
        assert float(RED(nn.Identity(), value).weight.detach()) == pytest.approx(float(value))
    assert len(DnCNN(1, np.int64(4), np.int32(3)).layers) == 6


@pytest.mark.parametrize(("norm", "spectral_norm"), [("batch", True), (None, False), (None, "conv")])
def test_hidden_convolutions_can_start_near_the_identity(norm, spectral_norm):
    torch.manual_seed(0)
    usual = DnCNN(1, 6, 5, norm, spectral_norm)
    torch.manual_seed(0)
    network = DnCNN(1, 6, 5, norm, spectral_norm, identity_start=True)
    convolutions = [[m for m in each.modules() if isinstance(m, nn.Conv2d)] for each in (usual, network)]
    identity = nn.init.dirac_(torch.empty(6, 6, 3, 3))
    for i, (before, after) in enumerate(zip(*convolutions, strict=True)):
        torch.testing.assert_close(after.weight, before.weight + (identity if 0 < i < 4 else 0))
        if spectral_norm is True:
            norm_of = torch.linalg.matrix_norm(after.normalised_weight().flatten(1), 2)
            torch.testing.assert_close(norm_of, torch.tensor(1.0), rtol=0.02, atol=0)
    scales = [m.weight[0].item() for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert scales == ([1, 1, pytest.approx(0.1)] if norm else [])


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
def test_frozen_statistics_stay_through_training_and_the_affine_part_learns(bad):
    torch.manual_seed(0)
    network = DnCNN(1, 6, 4, identity_start=True)
    network(torch.randn(4, 1, 9, 8))  # pretraining: statistics of the batch
    freeze_statistics(network)
    model = copy.deepcopy(DEGrad(GaussianBlur(), network, step_size=0.5, solver=Picard(max_iter=4)))
    model = pickle.loads(pickle.dumps(model)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    d = torch.rand(3, 1, 9, 8)
    if bad:
        d[1] = torch.nan
    model(d).square().nansum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert not [name for name in changed if name.endswith(("running_mean", "running_var"))]
    assert {"regularizer.layers.3.weight", "regularizer.layers.3.bias"} <= changed


def test_freezing_statistics_takes_a_network_with_batch_norms():
    with pytest.raises(ValueError, match="module is a DnCNN without running statistics; it takes batch norms"):
        freeze_statistics(DnCNN(1, 6, 4, norm=None))
