"""The report against dense linear algebra in float64: spectra, bounds, gradients, histories."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from models import networks
from rich.console import Console
from skimage import data as photographs
from test_cli import run
from test_spectrum import dense_jacobian
from torch import nn

from jfbfast import RED, Anderson, DEGrad, DnCNN, GaussianBlur, Picard, Status, UNet
from jfbfast.checkpoint import ModelConfig, save_checkpoint
from jfbfast.data import Photograph, read_photograph, write_photograph
from jfbfast.diagnostics import jfb_condition, lipschitz_bound, report
from jfbfast.gradients.methods import GRADIENTS
from jfbfast.quality import psnr


@pytest.fixture(scope="module")
def measured():
    """A filtered model that contracts, three images, and its report."""
    torch.manual_seed(0)
    model = networks()["filtered"].double().train()
    with torch.no_grad():
        for conv in model.regularizer.denoiser.layers[::3]:
            conv.weight *= 1.5
    x = torch.rand(3, 3, 6, 6, dtype=torch.float64) * 2 - 1
    d = model.blur(x) + 0.01 * torch.randn_like(x)
    before = copy.deepcopy(model.state_dict())
    found = report(model, d, x, iterations=60)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    assert all(p.grad is None for p in model.parameters())
    return model.eval(), d, x, found


def parameter_jacobian(model, x, d):
    """∂T/∂Θ of one sample, (N, p)."""
    out = model.layer(x[None], d[None]).flatten()
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in out]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_the_spectrum_at_the_fixed_point(measured):
    model, d, _, found = measured
    j = dense_jacobian(model.layer, found.history.solution.value, d)
    torch.testing.assert_close(found.contraction_factor, torch.linalg.eigvals(j).abs().amax(1), rtol=0.05, atol=0)
    torch.testing.assert_close(found.operator_norm, torch.linalg.matrix_norm(j, 2), rtol=0.05, atol=0)
    assert (found.contraction_factor < 1).all() and (found.contraction_factor <= found.lipschitz_bound).all()


def test_the_bound_of_the_filtered_layer(measured):
    model, d, _, found = measured
    red, value = model.regularizer, found.history.solution.value
    seen = model.blur.filter(value, red.filter_damping).detach()
    denoiser = dense_jacobian(lambda v, _: red.denoiser(v), seen, d)
    expected = torch.linalg.matrix_norm(denoiser, 2) / 4  # δ = λ
    torch.testing.assert_close(found.lipschitz_bound, expected, rtol=0.02, atol=0)
    averaged = copy.deepcopy(model)
    averaged.averaging = 0.5
    torch.testing.assert_close(
        lipschitz_bound(averaged, value, d), 0.5 + 0.5 * found.lipschitz_bound, rtol=1e-6, atol=0
    )
    unequal = DEGrad(GaussianBlur(), RED(red.denoiser, 0.1, 0.4), preconditioner="exact").double().eval()
    bound = lipschitz_bound(unequal, value, d)
    j = dense_jacobian(unequal.layer, value, d)
    assert (torch.linalg.eigvals(j).abs().amax(1) <= bound).all()
    for name in ("paper", "red", "preconditioned", "own dampings"):
        assert lipschitz_bound(networks()[name].double(), value, d) is None


def test_the_condition_is_a_lower_bound(measured):
    model, d, _, found = measured
    value = found.history.solution.value
    for i in range(2):
        m = parameter_jacobian(model, value[i], d[i]).T
        eigenvalues = torch.linalg.eigvalsh(m.T @ m)
        kappa = eigenvalues[-1] / eigenvalues[0].clamp_min(0)
        assert 1 < found.jfb_condition[i] <= kappa
        whole = jfb_condition(model, value[i : i + 1], d[i : i + 1], steps=108)
        known = eigenvalues[-1] / (eigenvalues[0].clamp_min(0) + 108 * 2.3e-16 * eigenvalues[-1])
        assert found.jfb_condition[i] <= whole[0] * 1.01 and whole[0] <= 1.01 * known
    small = DEGrad(GaussianBlur(), RED(nn.Conv2d(3, 3, 1), 0.1), step_size=0.5).double()
    assert (jfb_condition(small, value, d) == torch.inf).all()


def test_the_cosines_are_those_to_the_dense_implicit_gradient(measured):
    model, d, x, found = measured
    value = found.history.solution.value
    assert set(found.cosine) == set(GRADIENTS)
    with torch.no_grad():
        cotangent = (model.layer(value, d) - x).flatten(1)
    j = dense_jacobian(model.layer, value, d)
    for i in range(3):
        m = parameter_jacobian(model, value[i], d[i]).T
        exact = m @ torch.linalg.solve(torch.eye(108) - j[i].T, cotangent[i])
        approximate = m @ cotangent[i]
        cosine = torch.cosine_similarity(approximate, exact, dim=0)
        assert abs(found.cosine["jfb"][i] - cosine) < 2e-3  # the solve's own tolerance
        assert abs(found.norm_ratio["jfb"][i] - approximate.norm() / exact.norm()) < 5e-3
        assert found.cosine["implicit"][i] > 0.999


def test_the_history_is_that_of_the_solver(measured):
    model, d, x, found = measured
    history = found.history
    assert history.residual.shape == history.psnr.shape == (60, 3)
    solution = Anderson(tol=1e-3, max_iter=50).solve(model.layer, model.start(d), (d,))
    assert (found.solution.status == Status.CONVERGED).all()
    for i, iterations in enumerate(solution.iterations.tolist()):
        assert history.residual[iterations - 1, i] <= 1e-3
        assert (history.residual[: iterations - 1, i] > 1e-3).all()
        torch.testing.assert_close(history.residual[iterations - 1, i], solution.residual[i], rtol=1e-6, atol=0)
    torch.testing.assert_close(history.psnr[-1], psnr(model.layer(history.solution.value, d), x), rtol=1e-6, atol=0)
    assert abs(float(psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2))) - 20) < 1e-4


@pytest.mark.parametrize(
    "model",
    [
        lambda: networks()["paper"],
        lambda: DEGrad(GaussianBlur(), RED(UNet(3, (4, 6), (1, 1)), 0.1, "weight"), preconditioner="exact"),
        lambda: DEGrad(GaussianBlur(), RED(DnCNN(3, 4, 3, residual=True)), step_size=0.5, solver=Picard(max_iter=20)),
        lambda: DEGrad(GaussianBlur(), RED(DnCNN(3, 4, 3), 0.1, "weight"), preconditioner="exact", averaging="auto"),
    ],
    ids=["paper", "unet", "picard", "auto"],
)
def test_every_kind_of_model_without_a_truth(model):
    found = report(model().train(), torch.randn(2, 3, 8, 8), iterations=20, steps=20)
    assert found.history.psnr is None
    for values in (found.contraction_factor, found.operator_norm, found.jfb_condition, *found.cosine.values()):
        assert values.shape == (2,) and not values.isnan().any()


def test_an_averaging_that_is_due_is_estimated_for_the_report_alone():
    red = RED(lambda x: -3 * x, 1.0)
    model = DEGrad(GaussianBlur(), red, preconditioner="exact", averaging="auto")
    d = torch.randn(2, 3, 8, 8)
    found = report(model, d, iterations=20, steps=20)
    assert model.averaging.isnan()
    model(d)
    torch.testing.assert_close(found.contraction_factor, report(model, d, iterations=20, steps=20).contraction_factor)
    assert (found.contraction_factor < 1).all() and (found.solution.status == Status.CONVERGED).all()


def test_a_bad_sample_is_reported_as_such_and_touches_nothing(tmp_path):
    model = networks()["filtered"].double().eval()
    d = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    bad = d.clone()
    bad[1, 0, 0, 0] = torch.nan
    found, alone = report(model, bad, iterations=15, steps=15), report(model, d[:1], iterations=15, steps=15)
    assert found.solution.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    for name in ("contraction_factor", "operator_norm", "lipschitz_bound", "jfb_condition"):
        values = getattr(found, name)
        torch.testing.assert_close(values[:1], getattr(alone, name), rtol=1e-4, atol=0)
        assert values[1].isnan()
    assert all(values[1].isnan() for values in found.cosine.values())
    empty = report(model, d[:0], iterations=5, steps=5)
    for each in (found, alone, empty, replace(alone, tol=0.0)):
        Console(file=io.StringIO()).print(each.table())
        each.plot(tmp_path / "bad.png")


def test_table_and_picture(measured, tmp_path):
    *_, found = measured
    console = Console(width=120, file=io.StringIO())
    console.print(found.table())
    text = console.file.getvalue()
    for expected in ("contraction factor γ", "operator norm", "bound on γ", "κ(MᵀM)", "PSNR at 30", "cosine of jfb"):
        assert expected in text
    assert f"{float(found.contraction_factor.max()):.3f}" in text
    found.plot(tmp_path / "report.png")
    assert min(read_photograph(tmp_path / "report.png").pixels.shape[1:]) > 800


def test_a_frozen_model_and_one_under_inference_mode_are_measured_as_any():
    model = networks()["filtered"].double().eval()
    d = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    options = {"iterations": 20, "steps": 10}
    expected = report(model, d, **options)
    with torch.inference_mode():
        without = report(model, d.clone(), **options)
    frozen = report(model.requires_grad_(False), d, **options)
    assert not any(p.requires_grad for p in model.parameters())
    for found in (without, frozen):
        assert torch.equal(found.cosine["jfb"], expected.cosine["jfb"]) and found.cosine["jfb"].isfinite().all()
        for name in ("jfb_condition", "contraction_factor"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_bad_input_is_named():
    model = networks()["filtered"]
    with pytest.raises(ValueError, match="x has shape"):
        report(model, torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="max_iter is 0"):
        report(model, torch.zeros(1, 3, 8, 8), iterations=0)


def test_diagnose_on_the_command_line(tmp_path):
    config = ModelConfig(
        denoiser={"kind": "DnCNN", "features": 4, "depth": 3, "norm": None, "spectral_norm": False, "residual": True}
    )
    save_checkpoint(tmp_path / "small.safetensors", config.model(), config)
    pixels = torch.from_numpy(photographs.coffee()[:90, :90].copy()).permute(2, 0, 1) / 255
    write_photograph(tmp_path / "photo.png", Photograph(pixels, None, photographs.coffee().dtype))
    arguments = ("diagnose", tmp_path / "small.safetensors", tmp_path / "photo.png", "--crop", 16, "--samples", 2)
    result = run(*arguments, "--iterations", 12, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "contraction factor" in result.output
    assert (tmp_path / "out" / "small-diagnosis.png").exists()
    for wrong, message in (
        (("--samples", 0), "--samples is 0"),
        (("--crop", 0), "--crop is 0"),
        (("--crop", 271), "too small for crops"),
    ):
        refused = run(*arguments, *wrong)
        assert refused.exit_code == 1 and message in refused.output and "Traceback" not in refused.output
