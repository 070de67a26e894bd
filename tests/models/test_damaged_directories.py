"""Directories of `save_pretrained` that are damaged, foreign or hostile, and models that cannot be saved."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import jfbfast
from jfbfast import RED, Anderson, Blur, DEGrad, GaussianBlur, UNet
from jfbfast.models.checkpoint import CheckpointError

PSF = jfbfast.point_spread.motion(length=3, angle=30)


def unet(**options):
    return UNet(1, features=(4, 8), blocks=(1, 1), **options)


def filtered(blur, network=None, **options):
    return DEGrad(blur, RED(network or unet(), filter_damping="weight"), preconditioner="exact", **options)


DAMAGES = {
    "no JSON": (lambda text: text[:50], "not a whole model of jfbfast"),
    "a list": (lambda text: "[1]", "format is None"),
    "foreign": (
        lambda text: '{"architectures": ["Bert"]}',
        "format is None; this version of jfbfast reads 'jfbfast-model/1'",
    ),
    "newer": (lambda text: text.replace("model/1", "model/2"), "format is 'jfbfast-model/2'"),
    "no model": (lambda text: '{"format": "jfbfast-model/1", "model": 1}', "not a model of jfbfast"),
    "another kind": (lambda text: text.replace('"UNet"', '"Net"'), "denoiser is of kind 'Net'"),
    "a kind of Python": (lambda text: text.replace('"UNet"', '"os.system"'), r"denoiser is of kind 'os\.system'"),
    "another argument": (lambda text: text.replace('"conditions"', '"condition"'), "which UNet does not take"),
    "a wrong value": (lambda text: text.replace('"exact"', '"exactly"'), "preconditioner is 'exactly'"),
    "a huge network": (lambda text: text.replace("8\n", "4096\n"), "has .* weights, and the file has"),
    "an endless network": (
        lambda text: text.replace("8\n", "1000000000000\n"),
        "features of denoiser is 1000000000000",
    ),
    "an endless blur": (lambda text: text.replace("5,", "100000000001,"), "kernel_size of blur is 100000000001"),
    "another network": (
        lambda text: text.replace('"conditions": 0', '"conditions": 1'),
        "has 2360 weights, and the file has 2325",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_config_is_one_clear_error(tmp_path, damage):
    filtered(GaussianBlur(5)).save_pretrained(tmp_path)
    change, told = DAMAGES[damage]
    text = (tmp_path / "config.json").read_text()
    assert change(text) != text
    (tmp_path / "config.json").write_text(change(text))
    with pytest.raises(CheckpointError, match=told) as caught:
        DEGrad.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_that_would_take_all_memory_are_refused_before_use(tmp_path):
    blur, solver = {"kind": "GaussianBlur", "padding_mode": "zeros"}, {"kind": "Anderson"}
    wrong = {
        "sigma of blur is 10000000": {"blur": {**blur, "kernel_size": None, "sigma": 10**7}},
        "sigma of blur is 200": {"blur": {**blur, "sigma": [1.0, 200]}},
        "kernel_size of blur is 99999; it takes an integer from 1 to 1023": {
            "blur": {**blur, "sigma": 1.0, "kernel_size": [5, 99999]}
        },
        "memory of solver is 10+; it takes an integer from 1 to 100": {"solver": {**solver, "memory": 10**12}},
        "max_iter of solver is 10+; it takes": {"solver": {**solver, "max_iter": 10**18}},
        "steps of gradient is 10+; it takes": {"gradient": {"kind": "Unrolled", "steps": 10**9}},
    }
    filtered(GaussianBlur(5)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for told, change in wrong.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, "model": {**config["model"], **change}}))
        with pytest.raises(CheckpointError, match=told):
            DEGrad.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_iter of solver is 20000"):
        filtered(GaussianBlur(), solver=Anderson(max_iter=20000)).save_pretrained(tmp_path)


def test_damaged_weights_are_one_clear_error(tmp_path):
    filtered(Blur(PSF)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"pickle"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a whole model of jfbfast"):
            DEGrad.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="not a whole model of jfbfast"):
        DEGrad.from_pretrained(tmp_path)
    file.write_bytes(whole)
    tensors = load_file(file)
    assert torch.equal(tensors["argument/blur.psf"], PSF.double())
    save_file(tensors, file)  # by another program, without our header
    assert torch.equal(DEGrad.from_pretrained(tmp_path).blur.psf, PSF.double())
    tensors["log_weight"] = tensors.pop("regularizer.log_weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="its network has no tensor log_weight"):
        DEGrad.from_pretrained(tmp_path)


def test_what_cannot_be_saved_is_refused_before_a_file_is_written(tmp_path):
    class Starred(jfbfast.ImplicitNetwork):
        def __init__(self, *parts):
            super().__init__(parts[0])

    with pytest.raises(ValueError, match=r"Starred got 1 arguments by \*parts; it takes named ones"):
        Starred(GaussianBlur()).save_pretrained(tmp_path)
    model = filtered(GaussianBlur())
    with pytest.raises(ValueError, match=r"metrics is .* with datasets=None; it takes the data they are of"):
        model.save_pretrained(tmp_path, metrics={"psnr": 30.0})
    model.regularizer.log_weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"model has a tensor regularizer\.log_weight with values that are not finite"):
        model.save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)
