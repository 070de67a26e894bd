"""How many launches and waits a training step takes on a GPU, counted on the CPU (helpers/launches.py)."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import jfbfast
from helpers.launches import Launches, counting
from jfbfast.backends import fused


def step(model: jfbfast.DEGrad, d: torch.Tensor, counter: Launches) -> None:
    loss = (model(d) - d).square().mean()
    with counter.within("backward"):
        loss.backward()


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, model: jfbfast.DEGrad) -> Launches:
    """A second training step: the first one fills the caches."""
    monkeypatch.setattr(fused, "_why_not", {})
    d = model.blur(torch.rand(2, 3, 32, 32) * 2 - 1)
    model.train()
    for _ in range(2):
        with counting(monkeypatch, module) as counter:
            step(model, d, counter)
    assert (model.solution.status == jfbfast.Status.CONVERGED).all()
    assert len(counter.evaluations) == model.solution.iterations.max()
    anderson = counter.launches["Anderson"]
    assert anderson["step"] == 3 * len(counter.evaluations) and anderson["copy_"] == len(counter.evaluations)
    return counter


def test_the_unet(monkeypatch: pytest.MonkeyPatch, emulated_module: ModuleType) -> None:
    """Twenty-six convolutions, of which ten with a ReLU take one launch and the others two."""
    torch.manual_seed(0)
    model = jfbfast.DEGrad.from_pretrained("gaussian5-sigma1")
    counter = counted(monkeypatch, emulated_module, model)
    assert counter.evaluations[-1] <= 80
    assert counter.total("outside") <= 200


def test_the_dncnn(monkeypatch: pytest.MonkeyPatch, emulated_module: ModuleType) -> None:
    torch.manual_seed(0)
    red = jfbfast.RED(jfbfast.DnCNN(3, 8, 17, residual=True, identity_start=True))
    solver = jfbfast.Anderson(tol=1e-2)
    model = jfbfast.DEGrad(jfbfast.GaussianBlur(5, 1.0), red, preconditioner="exact", solver=solver)
    counter = counted(monkeypatch, emulated_module, model)
    assert counter.evaluations[-1] <= 40
    assert counter.total("outside") <= 240
