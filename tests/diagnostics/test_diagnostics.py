"""The report against dense linear algebra in float64: spectra, bounds, gradients, histories."""

import copy
import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from skimage import data as photographs
from torch import nn

from helpers.command_line import run
from helpers.maps import dense_jacobian
from helpers.models import Cell, networks
from jfbfast import RED, Anderson, DEGrad, DnCNN, GaussianBlur, Picard, Status, UNet
from jfbfast.diagnostics import convergence_history, jfb_condition, lipschitz_bound, report
from jfbfast.diagnostics.verdicts import rows
from jfbfast.imaging.photographs import Photograph, read_photograph, write_photograph
from jfbfast.imaging.quality import psnr
from jfbfast.implicit.methods import GRADIENTS
from jfbfast.models.checkpoint import save_checkpoint
from jfbfast.models.config import ModelConfig


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


def test_the_spectrum_at_the_fixed_point_agrees_with_the_dense_one(measured):
    model, d, _, found = measured
    j = dense_jacobian(model.layer, found.history.solution.value, d)
    torch.testing.assert_close(found.contraction_factor, torch.linalg.eigvals(j).abs().amax(1), rtol=0.05, atol=0)
    torch.testing.assert_close(found.operator_norm, torch.linalg.matrix_norm(j, 2), rtol=0.05, atol=0)
    assert (found.contraction_factor < 1).all() and (found.contraction_factor <= found.lipschitz_bound).all()


def test_unknown_surroundings_count_for_nothing_in_a_report():
    """What the truth is beyond the frame of d changes neither the quality nor the gradients."""
    torch.manual_seed(0)
    model = DEGrad(GaussianBlur(3, 1.0, "valid"), RED(DnCNN(1, 2, 2, norm=None), 0.1, "weight"), preconditioner="exact")
    x = torch.rand(1, 1, 6, 7) * 2 - 1
    d = model.blur(x)
    other = torch.full_like(x, 100.0)
    other[..., 1:-1, 1:-1] = x[..., 1:-1, 1:-1]
    reports = [report(model, d, truth, iterations=20, steps=5) for truth in (x, other)]
    assert reports[0].history.solution.value.shape == x.shape
    torch.testing.assert_close(reports[1].history.psnr, reports[0].history.psnr)
    torch.testing.assert_close(reports[1].cosine["jfb"], reports[0].cosine["jfb"])
    value = reports[0].history.solution.value
    quality = psnr(model.layer(value, d)[..., 1:-1, 1:-1], x[..., 1:-1, 1:-1])
    torch.testing.assert_close(reports[0].history.psnr[-1], quality, rtol=1e-4, atol=1e-3)


def test_a_printed_report_has_a_line_with_a_verdict_for_each_figure(measured):
    *_, found = measured
    lines = str(found).splitlines()[1:]
    assert [line.split("  ")[0] for line in lines] == [row.name for row in rows(found)]
    assert all(line.endswith(row.verdict) for line, row in zip(lines, rows(found), strict=True))


def test_the_bound_of_the_filtered_layer_holds(measured):
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


def test_the_cosines_agree_with_the_dense_implicit_gradient(measured):
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


def test_the_history_agrees_with_the_solver(measured):
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
def test_every_kind_of_model_is_measured_without_a_truth(model):
    found = report(model().train(), torch.randn(2, 3, 8, 8), iterations=20, steps=20)
    assert found.history.psnr is None
    for values in (found.contraction_factor, found.operator_norm, found.jfb_condition, *found.cosine.values()):
        assert values.shape == (2,) and not values.isnan().any()


def test_the_report_estimates_a_missing_averaging_for_itself():
    red = RED(lambda x: -3 * x, 1.0)
    model = DEGrad(GaussianBlur(), red, preconditioner="exact", averaging="auto")
    d = torch.randn(2, 3, 8, 8)
    found = report(model, d, iterations=20, steps=20)
    assert model.averaging.isnan()
    model(d)
    torch.testing.assert_close(found.contraction_factor, report(model, d, iterations=20, steps=20).contraction_factor)
    assert (found.contraction_factor < 1).all() and (found.solution.status == Status.CONVERGED).all()


def test_a_diverged_sample_is_reported_and_leaves_the_others_alone(tmp_path):
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


def test_the_table_and_the_picture_have_every_part(measured, tmp_path):
    *_, found = measured
    console = Console(width=120, file=io.StringIO())
    console.print(found.table())
    text = console.file.getvalue()
    for expected in ("contraction factor γ", "operator norm", "bound on γ", "κ(MᵀM)", "PSNR at 30", "cosine of jfb"):
        assert expected in text
    assert f"{float(found.contraction_factor.max()):.3f}" in text
    found.plot(tmp_path / "report.png")
    assert min(read_photograph(tmp_path / "report.png").pixels.shape[1:]) > 800


def verdicts(found):
    return {row.name: row.verdict for row in rows(found)}


def test_the_verdicts_tell_a_good_model_from_a_bad_one(measured):
    good = verdicts(measured[3])
    assert good["contraction factor γ"].startswith("good")
    assert all(told.startswith(("good", "fair", "open", "see")) for told in good.values()), good
    red = RED(lambda x: -3 * x, 1.0)  # ∂T has an eigenvalue near −3/2, where A keeps all
    expanding = DEGrad(GaussianBlur(sigma=0.3), red, preconditioner="exact", solver=Picard(max_iter=20)).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5
    bad = verdicts(report(expanding, expanding.blur(x), x, iterations=30))
    assert re.match("poor: no contraction, .*; train with --jacobian-penalty 1e-3", bad["contraction factor γ"])
    assert bad["lowest Re μ"].startswith("poor: x ← T(x) swings out; train with --averaging below 0.79")
    assert bad["evaluations"].startswith("poor: 2 diverged") or bad["evaluations"].startswith("poor: 0 diverged, 2")
    assert bad["residual at 10"].startswith("poor: it stays above tol")


def test_every_threshold_changes_the_verdict(measured):
    found = measured[3]
    ones = torch.ones(3)
    psnr = torch.tensor([30.0] * 9 + [20.0] * 51)[:, None].expand(60, 3)
    late = found.solution._replace(status=torch.full((3,), int(Status.MAX_ITER)))
    for values, name, told in (
        ({"contraction_factor": 0.95 * ones}, "contraction factor γ", "fair: it converges slowly"),
        ({"operator_norm": 2 * ones}, "operator norm ‖∂T/∂x‖", "fair"),
        ({"lipschitz_bound": 2 * ones}, "bound on γ", "fair"),
        ({"ritz_values": torch.full((3, 1), 0.95 + 0j)}, "highest Re μ", "fair: I − ∂T/∂x is close to singular"),
        ({"ritz_values": torch.full((3, 1), 1.5 + 0j)}, "highest Re μ", "poor: x. repels"),
        ({"ritz_values": torch.full((3, 1), -3 + 0j)}, "lowest Re μ", "poor: .* --averaging below 0.50"),
        ({"jfb_condition": 1e9 * ones}, "κ(MᵀM), at least", "fair"),
        ({"solution": late}, "evaluations", "poor: 0 diverged, 3 stopped above tol"),
        ({"tol": 1e-300}, "residual at 30", "good"),  # rounding is no floor that matters
        ({"history": found.history._replace(psnr=psnr)}, "PSNR at 30", "poor: 10.0 dB below the best before"),
        ({"cosine": {"jfb": 0.7 * ones}}, "cosine of jfb", "fair: descends"),
        ({"cosine": {"jfb": -ones}}, "cosine of jfb", "poor: train with --gradient implicit"),
        ({"cosine": {"jfb": torch.nan * ones}}, "cosine of jfb", "no figure"),
    ):
        verdict = verdicts(replace(found, **values))[name]
        assert re.match(told, verdict), (name, verdict)


def test_report_takes_any_implicit_layer():
    torch.manual_seed(0)
    cell = Cell().double()
    d, x0 = torch.randn(3, 12, dtype=torch.float64), torch.zeros(3, 12, dtype=torch.float64)
    solver = Anderson(tol=1e-4, memory=3)
    found = report(cell, x0=x0, inputs=(d,), solver=solver, iterations=20)
    value = found.history.solution.value
    j = dense_jacobian(cell, value, d)
    torch.testing.assert_close(found.contraction_factor, torch.linalg.eigvals(j).abs().amax(1))
    torch.testing.assert_close(found.operator_norm, torch.linalg.matrix_norm(j, 2))
    torch.testing.assert_close(value, solver.solve(cell, x0, (d,)).value, rtol=0, atol=1e-3)
    assert found.lipschitz_bound is None and found.tol == 1e-4
    assert (found.cosine["implicit"] > 0.999).all() and (found.cosine["jfb"] > 0.9).all()
    assert found.jfb_condition.isfinite().all() and cell.inner.weight.grad is None
    history = convergence_history(cell, x0=x0, inputs=(d,), iterations=20)
    assert history.residual.shape == (20, 3) and (history.residual[-1] < 1e-9).all() and history.psnr is None
    again = convergence_history(cell, x0, inputs=(d,), x=value, iterations=20)
    assert torch.equal(history.residual, again.residual) and again.psnr.shape == (20, 3)


def test_a_function_has_no_gradients_to_report_and_a_method_has(tmp_path):
    torch.manual_seed(0)
    cell = Cell()
    d, x0 = torch.randn(2, 12), torch.zeros(2, 12)
    options = {"x0": x0, "inputs": (d,), "iterations": 12, "steps": 12}
    function, method = report(lambda x, d: cell(x, d), **options), report(cell.forward, **options)
    assert function.cosine == {} and function.jfb_condition is None
    assert set(method.cosine) == set(GRADIENTS)
    torch.testing.assert_close(function.contraction_factor, method.contraction_factor)
    function.plot(tmp_path / "function.png")
    console = Console(width=120, file=io.StringIO())
    console.print(function.table())
    assert "contraction factor" in console.file.getvalue() and "cosine" not in console.file.getvalue()


@pytest.mark.parametrize("measure", [report, convergence_history])
def test_a_wrong_model_or_input_gets_a_message_that_says_what_it_takes(measure):
    cell, x0, d = Cell(), torch.zeros(2, 12), torch.zeros(2, 12)
    model, image = networks()["filtered"], torch.zeros(1, 3, 8, 8)
    for arguments, options in (
        ((cell, d), {}),
        ((cell,), {}),
        ((Cell,), {"x0": x0}),
        ((3,), {"x0": x0}),
        ((cell,), {"x0": "x"}),
    ):
        with pytest.raises(TypeError, match=r"it takes a DEGrad and the measurements d, or a layer T\(x, \*inputs\)"):
            measure(*arguments, **options)
    for options in ({"x0": image}, {"d": image, "inputs": (image,)}, {"d": image, "solver": Anderson()}):
        with pytest.raises(TypeError, match="model is a DEGrad, which takes the measurements d"):
            measure(model, **options)
    with pytest.raises(TypeError, match="inputs is a tensor"):
        measure(cell, x0=x0, inputs=d)
    with pytest.raises(TypeError, match="x is a tuple; it takes the true images"):
        measure(cell, x=(d,), x0=x0, inputs=(d,))


def test_frozen_models_and_inference_mode_change_no_figure():
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


def test_the_message_names_a_bad_input():
    model = networks()["filtered"]
    with pytest.raises(ValueError, match="x has shape"):
        report(model, torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="max_iter is 0"):
        report(model, torch.zeros(1, 3, 8, 8), iterations=0)


def test_diagnose_works_on_the_command_line(tmp_path):
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
