"""Muon: orthogonal updates of the inner convolutions, and Adam's for the rest."""

import copy

import pytest
import torch
from torch import nn

from jfbfast import DnCNN
from jfbfast.experiments.muon import Muon, orthogonalized
from jfbfast.experiments.tasks import DenoiserTask, Optimization


def test_an_orthogonalized_matrix_has_singular_values_near_one():
    for shape in ((16, 64), (64, 16), (20, 80)):
        matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -0.5, shape[1]))
        found = orthogonalized(matrix)
        values = torch.linalg.svdvals(found)
        assert found.shape == shape
        assert values.min() > 0.6 and values.max() < 1.25
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        assert ((u.T @ found @ vh.T).diagonal() > 0.6).all()  # the singular vectors stay


def test_all_but_inner_convolutions_are_updated_as_by_torchs_adam():
    torch.manual_seed(0)
    ours, theirs = (DnCNN(1, 4, 4, norm=None) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    muon, adam = Muon(ours, learning_rate=0.01), torch.optim.Adam(theirs.parameters(), 1e-3, betas=(0.9, 0.99))
    inner = {id(p) for p in muon.param_groups[0]["params"]}
    assert len(inner) == 2
    for _ in range(3):
        x = torch.randn(2, 1, 8, 8)
        for network, optimizer in ((ours, muon), (theirs, adam)):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            if id(mine) in inner:
                other.data.copy_(mine.data)
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_a_step_has_the_size_of_the_learning_rate():
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
    before = network[1].weight.detach().clone()
    optimizer = Muon(network, learning_rate=0.02)
    network(torch.randn(1, 8, 9, 9)).square().mean().backward()
    optimizer.step()
    values = torch.linalg.svdvals((network[1].weight - before).detach().flatten(1))
    assert values.min() > 0.6 * 0.02 and values.max() < 1.25 * 0.02


def test_a_resumed_optimizer_takes_the_same_steps():
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    data = torch.randn(4, 2, 3, 8, 8)

    def train(optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()

    optimizer = Muon(network)
    train(optimizer, data[:2])
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(network.state_dict())
    train(optimizer, data[2:])
    expected = [p.detach().clone() for p in network.parameters()]
    network.load_state_dict(weights)
    resumed = Muon(network)
    resumed.load_state_dict(state)
    train(resumed, data[2:])
    for mine, other in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.detach(), other)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806]),
        ("onecycle", None),
    ],
)
def test_a_schedule_scales_the_rates_of_both_groups(schedule, shares):
    task = DenoiserTask(DnCNN(1, 4, 4, norm=None), optimization=Optimization(0.01, schedule, 2, 0.99, "muon"))
    task.steps = 8
    configured = task.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    muon, adam = torch.tensor(rates).T
    torch.testing.assert_close(adam, muon / 10)
    assert muon.max() <= 0.01 + 1e-9
    if shares is not None:
        torch.testing.assert_close(muon, 0.01 * torch.tensor(shares), rtol=1e-4, atol=1e-8)
