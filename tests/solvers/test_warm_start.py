"""The cache of fixed points: what it keeps, what it leaves out, and what it saves."""

import copy
import io
import pickle
import warnings

import pytest
import torch

from helpers.models import networks
from jfbfast import Anderson, ConvergenceWarning, FixedPointSolution, Status, WarmStart


def solution(value, status=None):
    zeros = torch.zeros(len(value))
    status = torch.full((len(value),), Status.CONVERGED) if status is None else torch.tensor(status)
    return FixedPointSolution(value, zeros, zeros.long(), status)


def test_the_next_epoch_starts_where_the_last_one_ended():
    model = networks()["filtered"].eval()
    d = torch.randn(4, 3, 12, 12)
    cache = WarmStart(dtype=None)
    assert torch.equal(cache.get([0, 1, 2, 3], model.start(d)), model.start(d))
    cold = model(d)
    cache.put([0, 1, 2, 3], model.solution)
    first = model.solution
    order = torch.tensor([2, 9, 0])  # another order, and a sample that is new
    fresh = torch.randn(1, 3, 12, 12)
    batch = torch.cat([d[2:3], fresh, d[:1]])
    x0 = cache.get(order, model.start(batch))
    torch.testing.assert_close(x0, torch.cat([first.value[2:3], model.start(fresh), first.value[:1]]))
    warm = model(batch, x0=x0)
    assert model.solution.iterations[0] == model.solution.iterations[2] == 1 < model.solution.iterations[1]
    torch.testing.assert_close(warm[[0, 2]], cold[[2, 0]], rtol=0, atol=1e-4)  # both within the solve's tol


def test_half_precision_storage_still_saves_evaluations():
    model = networks()["filtered"].double().eval()
    model.solver = Anderson(tol=1e-4)
    d = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    cache = WarmStart()
    model(d)
    cold = model.solution.iterations
    cache.put(torch.tensor([5, 6]), model.solution)
    x0 = cache.get(torch.tensor([5, 6]), model.start(d))
    assert x0.dtype == torch.float64
    model(d, x0=x0)
    assert (model.solution.iterations < cold).all()


def test_samples_that_diverged_or_are_not_finite_are_not_stored():
    value = torch.ones(4, 3)
    value[1, 0] = torch.nan
    value[2, 1] = 1e6  # beyond float16
    cache = WarmStart()
    cache.put([3], solution(torch.full((1, 3), 7.0)))
    cache.put([0, 1, 2, 3], solution(value, [Status.MAX_ITER, Status.CONVERGED, Status.CONVERGED, Status.DIVERGED]))
    found = cache.get([0, 1, 2, 3], torch.full((4, 3), -1.0))
    assert found[:, 0].tolist() == [1, -1, -1, 7]

    model = networks()["filtered"].eval()
    d = torch.randn(2, 3, 8, 8)
    d[1, 0, 0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model(d)
    cache.clear()
    cache.put([0, 1], model.solution)
    assert len(cache) == 1


def test_the_cache_is_bounded_and_owns_its_memory():
    cache = WarmStart(max_entries=2)
    value = torch.arange(3.0)[:, None].expand(3, 4).clone()
    cache.put([10, 11, 12], solution(value))
    assert len(cache) == 2
    cache.put([12, 11], solution(value[:2] + 5))  # 11 is renewed, 12 stays out
    default = torch.full((3, 4), -1.0)
    assert cache.get([10, 11, 12], default)[:, 0].tolist() == [0, 6, -1]
    assert (default == -1).all()
    stored = cache.state_dict()["values"]
    assert all(v.dtype == torch.float16 and v.untyped_storage().nbytes() == 8 for v in stored.values())
    value.zero_()
    assert cache.get([11], default[:1])[0, 0] == 6


def test_a_cache_is_saved_and_loaded_with_the_training():
    cache = WarmStart(max_entries=8)
    cache.put([1, 2], solution(torch.randn(2, 3)))
    default = torch.zeros(2, 3)
    buffer = io.BytesIO()
    torch.save(cache.state_dict(), buffer)
    buffer.seek(0)
    resumed = WarmStart(max_entries=8)
    resumed.load_state_dict(torch.load(buffer))
    for twin in (resumed, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(twin.get([1, 2], default), cache.get([1, 2], default))
    smaller = WarmStart(max_entries=1, dtype=torch.float32)
    smaller.load_state_dict(cache.state_dict())
    assert len(smaller) == 1


def test_an_empty_batch_changes_nothing():
    cache = WarmStart()
    cache.put([], solution(torch.zeros(0, 3, 4, 4)))
    assert len(cache) == 0
    assert cache.get([], torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WarmStart(max_entries=-1), "max_entries is -1"),
        (lambda: WarmStart(dtype=torch.int8), "dtype is torch.int8"),
        (lambda: WarmStart().get([1], torch.zeros(2, 3)), "indices has 1 entries"),
        (lambda: WarmStart().get(torch.ones(2, 1).long(), torch.zeros(2, 3)), r"torch.int64 of shape \(2, 1\)"),
        (lambda: WarmStart().put([[1], [2]], solution(torch.zeros(2, 3))), r"indices is \[\[1\], \[2\]\]; it takes"),
        (lambda: WarmStart().put(torch.ones(2), solution(torch.zeros(2, 3))), "indices is torch.float32"),
        (
            lambda: WarmStart().put([1.5, 2], solution(torch.zeros(2, 3))),
            r"indices is \[1\.5, 2\]; it takes one",
        ),
        (lambda: WarmStart().put([1, 2, 3], solution(torch.zeros(2, 3))), "indices has 3 entries"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_stored_sample_of_another_shape_is_named():
    cache = WarmStart()
    cache.put([4], solution(torch.zeros(1, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"default has samples of shape \(3, 9, 8\); the one stored for index 4"):
        cache.get([4], torch.zeros(1, 3, 9, 8))
