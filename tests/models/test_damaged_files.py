"""Checkpoints that are damaged, foreign or hostile: one sentence, and no traceback."""

import json
import struct
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save

from jfbfast.models.checkpoint import _FORMAT, CheckpointError, digest, load_checkpoint, save_checkpoint
from jfbfast.models.config import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")
DENOISER = {"kind": "DnCNN", "features": 2, "depth": 2, "norm": None, "spectral_norm": False, "residual": True}
SMALL = ModelConfig(denoiser=DENOISER)


def one_sentence(error):
    return "\n" not in str(error) and len(str(error)) < 500


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_change_of_any_character_of_the_header_is_noticed(tmp_path, stride):
    path = tmp_path / "model"
    save_checkpoint(path, SMALL.model(), SMALL)
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in {*range(8), *range(0, end, stride)}:
        for new in (b"3", b'"', b"x"):
            path.write_bytes(whole[:place] + new + whole[place + 1 :])
            if path.read_bytes() != whole:
                with pytest.raises(CheckpointError) as error:
                    load_checkpoint(path)
                assert one_sentence(error.value)


def written(path, config, tensors=None, **header):
    """Write a checkpoint with a valid digest, whatever it holds."""
    text = config if isinstance(config, str) else json.dumps(config)
    tensors = SMALL.model().state_dict() if tensors is None else tensors
    path.write_bytes(save(tensors, {"format": _FORMAT, "config": text, "digest": digest(text, tensors), **header}))
    return path


WRONG = (True, -1, 1e12, 10**400, float("nan"), float("inf"), "x", "1", [], [1e8, 1], {}, {"kind": None}, {"kind": []})


@pytest.mark.parametrize("field", asdict(SMALL))
def test_a_hostile_value_is_refused(tmp_path, field):
    kinds = [
        ("denoiser", {"kind": "UNet", "features": [4, 4], "blocks": [10**8, 1]}),
        ("denoiser", {"kind": "UNet", "features": [4096] * 8, "blocks": [100] * 8}),
        ("denoiser", {"kind": "UNet", "features": [4] * 10**4, "blocks": [1] * 10**4}),
        ("denoiser", {**DENOISER, "depth": 10**9}),
        ("denoiser", {**DENOISER, "features": 10**9}),
        ("denoiser", {**DENOISER, "bias": "no"}),
        ("denoiser", {**DENOISER, "more": 1}),
        ("solver", {"kind": "Picard", "tol": 0, "max_iter": 10**12}),
        ("solver", {"kind": "Picard", "tol": 0, "max_iter": 1e12}),
        ("solver", {"kind": "Picard", "tol": "1"}),
        ("solver", {"kind": "Anderson", "memory": 10**9}),
        ("solver", {"kind": "Anderson", "history_dtype": "bfloat16"}),
        ("gradient", {"kind": "unrolled", "steps": 10**9}),
        ("gradient", {"kind": "neumann", "terms": 10**9}),
        ("gradient", {"kind": "shine", "fallback": "no"}),
        ("gradient", {"kind": "implicit", "solver": []}),
        ("sigma", 1e-300),
        ("kernel_size", 4),
        ("kernel_size", 10**9 + 1),
        ("kernel_size", 5.0),
        ("averaging", "some"),
    ]
    for value in [*WRONG, *(value for name, value in kinds if name == field)]:
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(written(tmp_path / "model", {**asdict(SMALL), field: value}))
        assert one_sentence(error.value)


def test_a_foreign_or_wrong_header_is_refused(tmp_path):
    path, good = tmp_path / "model", asdict(SMALL)
    for text in ("", "[]", "null", '"x"', "9" * 5000, "[" * 10**5, json.dumps({**good, "more": 1})):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(written(path, text))
        assert one_sentence(error.value)
    with pytest.raises(CheckpointError, match="its settings or its tensors are not those that were written"):
        load_checkpoint(written(path, good, digest="0" * 64))
    with pytest.raises(CheckpointError, match=r"its format is jfbfast/2, and not jfbfast/3"):
        load_checkpoint(written(path, good, format="jfbfast/2"))
    with pytest.raises(CheckpointError, match="it is no file"):
        load_checkpoint(tmp_path)


def test_tensors_of_another_network_are_refused(tmp_path):
    own, name = SMALL.model().state_dict(), "regularizer.log_weight"
    for tensors, message in (
        ({}, "its network has a tensor"),
        ({**own, "more": torch.zeros(2)}, "its network has no tensor more"),
        ({**own, name: torch.zeros(1)}, r"its tensor .*log_weight is not of shape \(\)"),
        ({**own, name: torch.tensor(1)}, r"log_weight is torch\.int64; its network's is torch\.float32"),
        ({**own, name: torch.tensor(torch.nan)}, "not finite"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(written(tmp_path / "model", asdict(SMALL), tensors))
