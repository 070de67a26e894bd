"""Full float32 precision, and the settings of torch that it changes and restores."""

import threading

import pytest
import torch

from jfbfast.backends.precision import full_precision, ieee

_BACKENDS = torch.backends
_PARENTS = [_BACKENDS, _BACKENDS.mkldnn, _BACKENDS.cudnn]
_CHILDREN = [_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn]
_CHILDREN += [_BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn, _BACKENDS.cuda.matmul]


@pytest.fixture(autouse=True)
def settings():
    """The settings of torch, which are restored after each test; a parent's setting is written over its children's."""
    found = [*_PARENTS, *_CHILDREN]
    precision, values = torch.get_float32_matmul_precision(), [setting.fp32_precision for setting in found]
    yield found
    torch.set_float32_matmul_precision(precision)
    for setting, value in zip(found, values, strict=True):
        setting.fp32_precision = value


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_precision_settings_continue_to_inherit_from_their_parents(device):
    backends = torch.backends
    parent, child = (backends.mkldnn, backends.mkldnn.matmul) if device == "cpu" else (backends, backends.cuda.matmul)
    precision = "bf16" if device == "cpu" else "tf32"
    parent.fp32_precision = child.fp32_precision = "none"  # an earlier test may have set it
    for own in (False, True):
        parent.fp32_precision = precision
        if own:
            parent.fp32_precision, child.fp32_precision = "none", precision
        with full_precision(torch.device(device)):
            assert child.fp32_precision == "ieee"
        assert child.fp32_precision == precision
        parent.fp32_precision = "ieee"
        assert child.fp32_precision == (precision if own else "ieee")
        parent.fp32_precision = child.fp32_precision = "none"


def test_the_last_of_two_threads_restores_the_precision():
    products = torch.backends.mkldnn.matmul
    products.fp32_precision = "bf16"
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with full_precision(torch.device("cpu")):
            inside.set()
            assert leave.wait(60)

    first = threading.Thread(target=hold)
    first.start()
    assert inside.wait(60)
    with full_precision(torch.device("cpu")):
        leave.set()
        first.join()
        assert products.fp32_precision == "ieee"
    assert products.fp32_precision == "bf16"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torchs_older_settings_can_be_read_in_full_precision(device, precision, settings):
    backends = torch.backends
    older = (
        lambda: backends.cudnn.allow_tf32,
        lambda: backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    )
    torch.set_float32_matmul_precision(precision)
    before = [read() for read in older], [s.fp32_precision for s in settings]
    with ieee(torch.device(device)):
        assert [read() for read in older][:2] == [False, False] or device == "cpu"
        with backends.cudnn.flags(enabled=True):
            pass
    assert ([read() for read in older], [s.fp32_precision for s in settings]) == before
