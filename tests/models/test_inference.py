"""Inference in plain PyTorch: as the solver's, exported by torch.export, and in onnxruntime."""

import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

from jfbfast import (
    DEADMM,
    RED,
    Anderson,
    Blur,
    DEGrad,
    DnCNN,
    GaussianBlur,
    SeparableBlur,
    UNet,
    UniversalDEGrad,
    data_fidelity,
    inference_module,
    point_spread,
    pretrained_names,
)
from jfbfast.models.inference import PlainBlur

DEGRADS = [name for name in pretrained_names() if name != "plug-and-play"]
MODES = ("zeros", "reflect", "replicate", "circular", "valid")
MOTION = point_spread.motion(length=5, angle=30)
SIZE = (14, 18)


def unet(**options):
    return UNet(1, features=(4, 8), blocks=(1, 1), **options)


def paper(mode="reflect"):
    return DEGrad(SeparableBlur([0.2, 0.5, 0.3], [0.1, 0.2, 0.4, 0.2, 0.1], mode), DnCNN(1, 4, 4), step_size=0.5)


def preconditioned():
    red = RED(DnCNN(1, 4, 3, spectral_norm="conv", residual=True))
    return DEGrad(Blur(MOTION, "circular"), red, preconditioner="exact", averaging=0.8)


def filtered():
    red = RED(unet(injection=True), filter_damping="weight")
    return DEGrad(GaussianBlur(5, 1.0, "reflect"), red, preconditioner="exact", averaging="auto")


def universal():
    model = UniversalDEGrad(unet(conditions=3, injection=5))
    model.set_measurement(GaussianBlur(sigma=1.2), 0.03)
    return model


def admm():
    return DEADMM(GaussianBlur(5, 1.0, "reflect"), unet())


SLOW = {
    "paper": [],
    "filtered": [],
    "preconditioned": [pytest.mark.slow],
    "universal": [pytest.mark.slow],
    "admm": [pytest.mark.slow],
}
MODELS = {each.__name__: each for each in (paper, preconditioned, filtered, universal, admm)}


def trained(name):
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    size = None if name == "paper" else SIZE
    return model, inference_module(model, 4, size=size)


def exported(module, batch=2):
    """The program of a module, for batches of any size."""
    shapes = {"d": {0: torch.export.Dim("batch")}}
    return torch.export.export(module, (torch.rand(batch, 1, *SIZE),), dynamic_shapes=shapes)


def in_onnxruntime(module, d, path):
    """What onnxruntime makes of a module that was exported with a batch of two."""
    shapes = {"d": {0: torch.export.Dim("batch")}}
    example = torch.rand(2, *d.shape[1:])
    torch.onnx.export(module, (example,), path, dynamic_shapes=shapes, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"d": d.numpy()})[0])


def assert_equal(found, expected):
    """Equal to 1e-5 of the norm of each image; float32 itself rounds a solve by about half of that."""
    error, norm = ((each.flatten(1)).norm(dim=1) for each in (found - expected, expected))
    assert (error <= 1e-5 * norm).all(), error / norm


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["separable", "Blur"])
def test_the_plain_blur_is_the_blur(mode, kind):
    blur = (
        SeparableBlur([0.3, 0.6, -0.1], [0.2, 0.3, 0.1, 0.3, 0.4], mode) if kind == "separable" else Blur(MOTION, mode)
    )
    x = torch.rand(2, 3, 9, 12, dtype=torch.float64)
    solves = kind == "separable" or mode == "circular"
    plain = PlainBlur(blur, (9, 12) if solves else None).double()
    y = blur(x)
    torch.testing.assert_close(plain(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain.adjoint(y), blur.adjoint(y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain.normal(x), blur.normal(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        plain.gradient_step(x, y, x, 0.3), blur.gradient_step(x, y, x, 0.3), rtol=1e-12, atol=1e-12
    )
    if solves:
        torch.testing.assert_close(plain.solve(x, 0.1), blur.solve(x, 0.1), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(plain.filter(x, 0.1), blur.filter(x, 0.1), rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
@pytest.mark.parametrize("name", MODELS)
def test_k_evaluations_are_those_of_the_solver_and_the_last(name):
    model, module = trained(name)
    model.solver = Anderson(tol=0, max_iter=3)  # and the layer with the gradient is the fourth
    d = torch.rand(2, 1, *SIZE)
    if name == "filtered":  # the estimate of the averaging, which the module has to have
        model(d)
        module = inference_module(model, 4, size=SIZE)
    torch.testing.assert_close(module(d), model(d).detach(), rtol=1e-4, atol=1e-4)


def test_more_evaluations_converge_to_the_fixed_point_and_stay_there():
    model = filtered().double().eval()
    model.solver = Anderson(tol=1e-12, max_iter=100)
    d = model.blur(torch.rand(2, 1, *SIZE, dtype=torch.float64))
    fixed_point = model(d).detach()
    for evaluations in (20, 40):
        module = inference_module(model, evaluations, size=SIZE)
        torch.testing.assert_close(module(d), fixed_point, rtol=1e-9, atol=1e-9)


def test_the_shipped_models_reach_their_tolerance_in_the_default_evaluations():
    for name in DEGRADS:
        model = DEGrad.from_pretrained(name)
        x = nn.functional.interpolate(torch.rand(1, 3, 8, 8), (48, 48), mode="bicubic")
        d = model.blur(x)
        model.solver = Anderson(tol=1e-5, max_iter=100)
        found, expected = inference_module(model, size=(d.shape[2], d.shape[3]))(d), model(d).detach()
        assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW[name]) for name in MODELS])
def test_the_exported_program_equals_eager_and_has_no_custom_ops(name):
    _, module = trained(name)
    program = exported(module)
    assert not [node for node in program.graph.nodes if "jfbfast" in str(node.target)]
    for batch in (2, 5):
        d = torch.rand(batch, 1, *SIZE)
        torch.testing.assert_close(program.module()(d), module(d), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_papers_layer_is_exported_for_images_of_any_size():
    _, module = trained("paper")
    sizes = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    program = torch.export.export(module, (torch.rand(1, 1, *SIZE),), dynamic_shapes={"d": sizes})
    d = torch.rand(1, 1, 23, 11)
    torch.testing.assert_close(program.module()(d), module(d), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_computes_the_same(tmp_path, name):
    _, module = trained(name)
    d = torch.rand(3, 1, *SIZE)
    assert_equal(in_onnxruntime(module, d, tmp_path / "model.onnx"), module(d))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_computes_the_shipped_models(tmp_path):
    for name in DEGRADS:
        model = DEGrad.from_pretrained(name)
        d = model.blur(torch.rand(3, 3, 40, 36))
        module = inference_module(model, 5, size=(d.shape[2], d.shape[3]))
        assert_equal(in_onnxruntime(module, d, tmp_path / f"{name}.onnx"), module(d))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_the_docs_runs():
    text = (Path(__file__).parents[2] / "docs" / "deploying.md").read_text()
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    expected = names["module"](names["d"])
    assert_equal(torch.from_numpy(names["restored"]), expected)
    torch.testing.assert_close(torch.export.load("model.pt2").module()(names["d"]), expected, rtol=0, atol=1e-5)


def test_the_module_is_a_copy_without_gradients():
    model = filtered()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = inference_module(model, 2, size=SIZE)
    assert model.training and isinstance(model.blur, GaussianBlur) and not module.training
    assert not any(p.requires_grad for p in module.parameters()) and all(p.requires_grad for p in model.parameters())
    for p in module.parameters():
        p.data.zero_()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


class Shrink(nn.Module):
    def forward(self, x, noise):
        return x / (1 + noise.view(-1, 1, 1, 1))


def test_a_denoiser_that_is_told_a_learnt_noise_is_exported_for_any_batch():
    red = RED(Shrink(), noise=0.1, learn_noise=True)
    module = inference_module(DEGrad(GaussianBlur(), red, step_size=0.5), 3)
    d = torch.rand(5, 1, *SIZE)
    torch.testing.assert_close(exported(module).module()(d), module(d), rtol=0, atol=1e-5)


class Mask(nn.Module):
    def forward(self, x):
        return x

    adjoint = forward


def test_what_has_no_plain_form_is_refused_in_one_sentence():
    with pytest.raises(TypeError, match="model is a UNet; it takes an ImplicitNetwork"):
        inference_module(unet())
    with pytest.raises(TypeError, match="operator is a IterativeOperator; it takes a SeparableBlur or a Blur"):
        inference_module(DEGrad(Mask(), RED(unet(), filter_damping="weight"), preconditioner="exact"))
    model = DEGrad(Blur(MOTION, "valid"), RED(unet(), filter_damping="weight"), preconditioner="exact")
    with pytest.raises(ValueError, match="padding_mode is 'valid' and the blur is not separable"):
        inference_module(model, size=SIZE)
    poisson = DEGrad(GaussianBlur(), RED(unet()), data_fidelity=data_fidelity.Poisson())
    with pytest.raises(ValueError, match="data_fidelity is Poisson, which cannot be exported; it takes LeastSquares"):
        inference_module(poisson)
    with pytest.raises(ValueError, match="evaluations is 0; it takes an integer of at least 1"):
        inference_module(paper(), 0)
    with pytest.raises(ValueError, match="each side of size is 5000; it takes an integer from 1 to 1024"):
        inference_module(filtered(), size=(64, 5000))
    for model in (filtered(), preconditioned(), universal(), admm()):
        with pytest.raises(ValueError, match=r"size is None; this model has .* takes size=\(H, W\) of d"):
            inference_module(model)
    for size in (16, (16,), (16, 16, 3)):
        with pytest.raises(ValueError, match=rf"size is {re.escape(repr(size))}; it takes \(H, W\)"):
            inference_module(paper(), size=size)
    with pytest.raises(ValueError, match="x has 9 × 9 pixels; it takes 14 × 18"):
        inference_module(filtered(), size=SIZE)(torch.rand(1, 1, 9, 9))
