"""Photographs and networks for the tests of the paper's tables and figures."""

from dataclasses import replace

import pytest

from helpers.paper import CONFIGS
from helpers.small_runs import write_photographs
from jfbfast.benchmarks.paper.plan import QUICK
from jfbfast.models.checkpoint import save_checkpoint


@pytest.fixture
def folder(tmp_path):
    """Six small smooth photographs: 2 are left out, 2 choose parameters, 2 are scored."""
    return write_photographs(tmp_path / "photographs", 6, (4, 4), (20, 20))


@pytest.fixture
def checkpoints(tmp_path):
    found = {}
    for role, config in CONFIGS.items():
        model = config.model()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(0.3)
        found[role] = str(tmp_path / f"{role}.safetensors")
        save_checkpoint(found[role], model, config)
    return found


@pytest.fixture
def plan(folder, checkpoints):
    return replace(QUICK, data=folder, checkpoints=checkpoints, train=2, validation=2, limit=None, resize=16)
