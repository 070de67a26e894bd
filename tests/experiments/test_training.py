"""Training itself: the loss and its penalty, the moving average, and processes that share a batch."""

import pytest
import torch

import jfbfast
from helpers import processes
from helpers.operations import operations
from jfbfast.experiments.tasks import DeblurTask, JacobianPenalty, Optimization
from jfbfast.experiments.trainer import MovingAverage, fit, shared_batches
from jfbfast.imaging.datasets import RandomCrops, Sample
from jfbfast.models.feed_forward import FeedForward

pytestmark = pytest.mark.usefixtures("one_thread")


def task(contraction=None):
    torch.manual_seed(0)
    regularizer = jfbfast.RED(jfbfast.DnCNN(3, 6, 4, norm=None, residual=True), 0.1, "weight")
    model = jfbfast.DEGrad(jfbfast.GaussianBlur(), regularizer, preconditioner="exact")
    return DeblurTask(model, jfbfast.GaussianBlur(), 0.01, Optimization(1e-3), contraction=contraction)


def test_the_moving_average_is_the_recurrence():
    crops = RandomCrops([torch.rand(3, 20, 20)], 8, length=12)
    seen = []

    class Watch(MovingAverage):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            seen.append(pl_module.model.regularizer.log_weight.detach().cpu().clone())
            super().on_train_batch_end(trainer, pl_module, *rest)

    mine = task()
    fit(mine, crops, steps=6, batch_size=2, callbacks=[Watch(0.5)], progress=False)
    mean = seen[0]
    for count, value in enumerate(seen[1:], 1):
        mean = mean.lerp(value, 1 - min(0.5, (1 + count) / (10 + count)))
    torch.testing.assert_close(mine.model.regularizer.log_weight.detach(), mean)
    assert not torch.equal(mean, seen[-1])


def test_the_moving_average_lies_on_the_models_device_and_takes_few_operations():
    mine, average = task(), MovingAverage(0.5)
    average.setup(None, mine, "fit")
    update = average._average_model.update_parameters
    update(mine)
    for _ in range(2):
        few = operations(lambda: update(mine))
    assert few <= 6 < len([*mine.parameters()]) + len([*mine.buffers()])
    average.on_fit_start(None, mine.to("meta"))
    assert {t.device.type for t in average._average_model.module.state_dict().values()} == {"meta"}
    assert average._average_model.n_averaged == 3


def test_the_penalty_is_part_of_the_loss():
    crops = RandomCrops([torch.rand(3, 20, 20)], 8, length=2)
    moved = []
    for penalty in (0.0, 10.0):
        mine = task(JacobianPenalty(penalty) if penalty else None)
        mine.model.regularizer.denoiser = torch.nn.Conv2d(3, 3, 3, padding=1)
        torch.nn.init.dirac_(mine.model.regularizer.denoiser.weight).data.mul_(5)  # ∂T about 5/4
        runner = fit(mine, crops, steps=1, batch_size=2, progress=False)
        assert not penalty or runner.callback_metrics["jacobian_penalty"] > 0.01
        moved.append([p.detach().clone() for p in mine.parameters()])
    assert any(not torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_the_penalty_is_taken_at_an_interval_on_some_samples(monkeypatch):
    taken = []

    def counted(model, d, *, x, bound):
        taken.append((mine.global_step, len(d), len(x), bound))
        return jfbfast.jacobian_penalty(model, d, x=x, bound=bound)

    monkeypatch.setattr("jfbfast.experiments.tasks.jacobian_penalty", counted)
    mine = task(JacobianPenalty(1e-4, bound=0.5, interval=2, samples=3))
    fit(mine, RandomCrops([torch.rand(3, 20, 20)], 8, length=20), steps=5, batch_size=4, progress=False)
    assert taken == [(step, 3, 3, 0.5) for step in (0, 2, 4)]


def test_unknown_surroundings_are_compared_within_the_frame():
    model = FeedForward(jfbfast.GaussianBlur(5, 1.0, "valid"), torch.nn.Identity(), 0.01)
    mine = DeblurTask(model, model.blur, 0.0)
    x, white = torch.rand(2, 3, 16, 14), torch.randn(2, 3, 16, 14)
    sample = Sample(x, white, torch.zeros(2))
    restored = mine.restore(sample)
    assert restored.shape == (2, 3, 12, 10) == mine.measure(sample).shape
    whole = model(model.blur(x))
    torch.testing.assert_close(restored, whole[..., 2:-2, 2:-2])
    seen = {}
    mine.report = lambda batch_size=None, **values: seen.update(values)
    error = mine.training_step(sample, 0)
    torch.testing.assert_close(error, (whole - x)[..., 2:-2, 2:-2].square().mean())
    mine.validation_step(sample, 0)
    torch.testing.assert_close(seen["val_loss"], error)


def test_a_network_is_trained_with_unknown_surroundings():
    torch.manual_seed(0)
    blur = jfbfast.GaussianBlur(5, 1.0, "valid")
    regularizer = jfbfast.RED(jfbfast.DnCNN(3, 6, 4, norm=None, residual=True), 0.1, "weight")
    model = jfbfast.DEGrad(blur, regularizer, preconditioner="exact")
    before = [p.detach().clone() for p in model.parameters()]
    mine = DeblurTask(model, blur, 0.01, Optimization(1e-2), contraction=JacobianPenalty(1e-3))
    runner = fit(mine, RandomCrops([torch.rand(3, 20, 20)], 12, length=6), steps=3, batch_size=2, progress=False)
    assert runner.callback_metrics["loss"].isfinite() and model.solution.value.shape == (2, 3, 12, 12)
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


SHARED = """
import json, sys, torch, jfbfast
from lightning.pytorch.callbacks import Callback
from jfbfast.experiments.tasks import DeblurTask, Measurements, Optimization, UniversalTask
from jfbfast.experiments.trainer import fit
from jfbfast.imaging.datasets import RandomCrops
torch.manual_seed(0)
solver = jfbfast.Anderson(tol=1e-10)
if sys.argv[2] == "one setting":
    regularizer = jfbfast.RED(jfbfast.DnCNN(3, 6, 4, norm=None, residual=True), 0.1, "weight")
    model = jfbfast.DEGrad(jfbfast.GaussianBlur(), regularizer, preconditioner="exact", solver=solver)
    task = DeblurTask(model, jfbfast.GaussianBlur(), 0.01, Optimization(1e-3)).double()
else:
    model = jfbfast.UniversalDEGrad(jfbfast.UNet(3, (4,), (1,), conditions=3, injection=13), solver=solver)
    task = UniversalTask(model, Measurements((0.5, 0.7)), Optimization(1e-3), parts=2).double()

class Double(torch.utils.data.Dataset):
    crops = RandomCrops([torch.rand(3, 20, 24), torch.rand(3, 16, 16)], 8, length=12)
    def __len__(self):
        return 12
    def __getitem__(self, i):
        return type(self.crops[i])(*(v.double() for v in self.crops[i]))

class Gradients(Callback):
    def on_before_optimizer_step(self, trainer, task, optimizer):
        if trainer.global_step == 0 and trainer.is_global_zero:
            torch.save([p.grad.clone() for p in task.parameters()], sys.argv[1])

fit(task, Double(), steps=3, batch_size=4, accelerator="cpu", callbacks=[Gradients()], progress=False, clip=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one setting", "universal"])
def test_processes_share_a_batch(tmp_path, kind):
    """The gradient of a step on two gloo processes is that of one process with the whole batch."""
    alone, shared = ([str(tmp_path / name), kind] for name in ("one", "two"))
    processes.run(SHARED, alone, shared, shared, environments=[{}, *processes.environments()])
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert len(one) == (5 if kind == "one setting" else 12)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_a_batch_that_cannot_be_shared_is_named():
    assert [list(batch) for batch in shared_batches(3, 2, 4, rank=1, world=2)] == [[13, 15], [17, 19]]
    with pytest.raises(ValueError, match="batch_size is 3; it takes a multiple of the 2 processes"):
        shared_batches(0, 1, 3, 0, 2)
    with pytest.raises(ValueError, match="train has 2 samples"):
        fit(task(), RandomCrops([torch.rand(3, 8, 8)], 8, length=2), steps=2, batch_size=2)
