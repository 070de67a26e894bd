"""The registry: what a file can name, and that a new kind needs no change of the file format."""

import pytest
import torch
from torch import nn

from jfbfast import DEGrad, DnCNN, NonexpansiveDenoiser, UNet
from jfbfast.models import registry
from jfbfast.models.checkpoint import load_checkpoint, save_checkpoint
from jfbfast.models.config import FORMS, ModelConfig
from jfbfast.models.plug_and_play import GaussianDenoiser


def test_every_form_and_every_network_of_the_package_is_registered():
    own = (DnCNN, GaussianDenoiser, NonexpansiveDenoiser, UNet)
    assert {kind.__name__: kind for kind in own} == registry.NETWORKS
    assert {*registry.MODELS} == {*FORMS} - {"denoiser"}


def test_a_file_can_name_a_network_that_another_module_registers(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "NETWORKS", {**registry.NETWORKS})

    @registry.network
    class Scaling(nn.Module):
        is_denoiser = True

        def __init__(self, start=1.0):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(start))

        def forward(self, x):
            return self.scale * x

    config = ModelConfig(denoiser={"kind": "Scaling", "start": 0.5})
    save_checkpoint(tmp_path / "model", config.model(), config)
    model, found = load_checkpoint(tmp_path / "model")
    assert isinstance(model, DEGrad) and found == config
    assert isinstance(model.regularizer.denoiser, Scaling) and model.regularizer.denoiser.scale.item() == 0.5
    with pytest.raises(ValueError, match=r"regularizer is a denoiser, a Scaling; it takes R"):
        DEGrad(model.blur, Scaling())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"denoiser": {"kind": "ResNet"}}, "denoiser is of kind 'ResNet'; it takes one of 'DnCNN', "),
        ({"denoiser": {"kind": "UNet", "depth": 3}}, "denoiser is .*, which UNet does not take"),
        ({"solver": {"kind": "Anderson", "memory": 101}}, "memory of solver is 101; it takes an integer from 1 to 100"),
        ({"denoiser": {"kind": "UNet", "features": [4] * 9}}, "features of denoiser is .*; it takes 1 to 8 values"),
        ({"sigma_range": [1.0]}, r"sigma_range is \[1.0\]; it takes 2 values"),
        ({"kernel_size": 4}, "kernel_size is 4; it takes an odd integer from 1 to 1023, or None"),
    ],
)
def test_a_description_that_no_network_fits_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values).model()
