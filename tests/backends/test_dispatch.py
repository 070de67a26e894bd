"""The rule that chooses the module for each computation, also for devices that this machine does not have."""

from __future__ import annotations

import pytest
import torch

import jfbfast
from jfbfast import kernels as triton
from jfbfast.backends import cuda, native, reference
from jfbfast.backends.dispatch import kernels

pytestmark = pytest.mark.compiled

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")


@pytest.fixture(autouse=True)
def usable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable_because", lambda device: "")


def test_each_device_has_its_kernels() -> None:
    assert [kernels(device, "blur") for device in (CPU, GPU, OTHER)] == [native, triton, reference]
    assert [kernels(device, "anderson") for device in (CPU, GPU, OTHER)] == [native, reference, reference]
    assert [kernels(device, "anderson_solve") for device in (CPU, GPU, OTHER)] == [native, cuda, reference]
    assert kernels(CPU, "conv3x3", channels=(16, 16)) is native
    assert kernels(GPU, "conv3x3", channels=(16, 16)) is reference


def test_the_reference_computes_what_a_kernel_does_not_support() -> None:
    assert kernels(GPU, "blur", radius=triton.MAX_RADIUS) is triton
    assert kernels(GPU, "blur", radius=triton.MAX_RADIUS + 1) is reference
    assert kernels(GPU, "anderson_solve", memory=cuda.MAX_MEMORY + 1) is reference
    assert kernels(GPU, "anderson_solve", dtype=torch.bfloat16) is reference
    assert kernels(GPU, "anderson_solve", estimate=True) is reference
    assert kernels(CPU, "conv3x3", channels=(3, 15)) is reference
    assert kernels(CPU, "conv3x3", channels=(16, 16), dtype=torch.float64) is reference


def test_the_users_choice_is_followed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with jfbfast.backend("reference"):
        assert {kernels(device, op) for device in (CPU, GPU) for op in ("blur", "anderson_solve")} == {reference}  # type: ignore[arg-type]
    with jfbfast.backend("native"):
        assert kernels(GPU, "anderson_solve") is cuda
        with pytest.raises(RuntimeError, match="'native' does not serve tensors on cuda:0"):
            kernels(GPU, "blur")
        monkeypatch.setattr(native, "AVAILABLE", False)
        with pytest.raises(RuntimeError, match="'native' is not available"):
            kernels(CPU, "anderson")
        assert kernels(CPU, "conv3x3", channels=(16, 16)) is reference
    assert kernels(CPU, "blur") is reference
