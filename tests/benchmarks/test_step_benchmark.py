"""The benchmark of a whole training step: its sides agree, its counts are right, its files hold what it measured."""

import csv
import itertools
import sys
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from helpers.rivals import optional
from jfbfast import RED, DnCNN
from jfbfast.benchmarks import memory, problem, run, split, step, step_report, step_sides
from jfbfast.cli import app
from jfbfast.models.checkpoint import save_checkpoint
from jfbfast.models.config import ModelConfig

CPU = torch.device("cpu")
DNCNN = {"kind": "DnCNN", "features": 4, "depth": 3, "norm": None, "spectral_norm": False, "residual": True}


class OfTwoImages(nn.Module):
    """D(x, z), a contraction of x."""

    injection = True

    def __init__(self):
        super().__init__()
        self.network = DnCNN(6, 4, 3, None).eval()

    def forward(self, x, z):
        return 0.8 * x + 0.05 * self.network(torch.cat([x, z], 1))[:, :3]


def tiny_problem(layer="preconditioned", injection=False):
    network = OfTwoImages() if injection else problem.Contraction(DnCNN(3, 4, 3, None).eval(), 0.05)
    weights = problem.Weights(problem._settled(network), 0.5, 3, 0.7, 0.01)
    return problem.problem(weights, 12, 2, CPU, layer).to(torch.float64)


def make_side(name, given):
    if name in ("TorchDEQ", "deepinv"):
        optional(name.lower())
    return step_sides.sides(given)[name]()


def largest_error(x, fixed):
    return float(step.errors(x, fixed).max())


def gradients(side, x, evaluations):
    side.step(x, evaluations)
    return (
        torch.stack(sorted(p.grad for p in side.parameters if p.dim() == 0)),
        torch.cat([p.grad.flatten() for p in side.parameters if p.dim()]),
    )


RIVALS = ("PyTorch", "published loop", "TorchDEQ", "deepinv")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["jfbfast", *RIVALS])
@pytest.mark.parametrize("layer", problem.LAYERS)
@pytest.mark.parametrize("injection", [False, True])
def test_every_side_has_the_same_fixed_point_and_gradient(injection, layer, name):
    given = tiny_problem(layer, injection)
    side, ours = make_side(name, given), make_side("jfbfast", given)
    assert not side.batch_statistics
    evaluations = 400 if name == "published loop" else 80  # its regularisation slows it down
    assert largest_error(side.forward(evaluations), problem.fixed_point(given, False)) < 1e-5
    for theirs, own in zip(gradients(side, given.x, evaluations), gradients(ours, given.x, 80), strict=True):
        torch.testing.assert_close(theirs, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", problem.LAYERS)
def test_every_side_counts_its_evaluations(layer, monkeypatch):
    given, seen = tiny_problem(layer), []
    for owner, name in ((RED, "denoised"), (step_sides.UsersLayer, "forward")):
        forward = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *x, forward=forward: seen.append(x) or forward(*x))
    for name in ("jfbfast", *RIVALS):
        seen.clear()
        make_side(name, given).forward(7)
        assert len(seen) == 7 + 1, name  # and the one with the gradient


def test_the_published_loop_normalises_by_the_batch():
    given = problem.problem(problem.untrained(4, 4), 12, 3, CPU).to(torch.float64)
    side = make_side("published loop", given)
    exact = problem.fixed_point(given, True)
    assert side.batch_statistics and largest_error(side.forward(80), exact) < 1e-4
    assert largest_error(exact, problem.fixed_point(given, False)) > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_a_side_gets_the_fewest_evaluations_that_reach_the_target():
    given = tiny_problem()
    exact = problem.fixed_point(given, False)
    for name in ("jfbfast", "published loop", "TorchDEQ", "deepinv"):
        side = make_side(name, given)
        (found,) = step.find(side, exact, (1e-3,), 30)
        again = step.errors(side.forward(found.evaluations), exact)
        assert found.reached and found.error == pytest.approx(float(again.max()))
        assert found.error_median == pytest.approx(float(again.median()))
        assert found.error_median <= found.error <= 1e-3
        fewer = found.evaluations - 1
        assert found.evaluations == side.least or largest_error(side.forward(fewer), exact) > 1e-3
        (beyond,) = step.find(side, exact, (1e-30,), 4)
        assert not beyond.reached and beyond.error > 1e-30


def solves_with_errors(errors, monkeypatch):
    """A side whose largest error after k evaluations is errors(k), and a list of the k that it was asked for."""
    asked = []
    monkeypatch.setattr(step, "errors", lambda x, fixed: x)
    side = step_sides.Side(lambda k: asked.append(k) or torch.tensor([errors(k), 0.0]), [])
    return side, asked


@pytest.mark.parametrize("starts", [None, (3, 7), (5, 5), (40, 40), (1, 12)])
def test_the_search_finds_the_fewest_evaluations_from_any_start(starts, monkeypatch):
    side, asked = solves_with_errors(lambda k: 0.5**k, monkeypatch)
    found = step.find(side, None, (0.2, 0.01), 100, starts)
    assert [each.evaluations for each in found] == [3, 7] and all(each.reached for each in found)
    assert len(asked) == len(set(asked))
    if starts == (3, 7):  # these and one fewer
        assert sum(asked) == 2 + 3 + 6 + 7


def test_the_search_ends_where_the_error_stands_still(monkeypatch):
    side, asked = solves_with_errors(lambda k: max(0.5**k, 0.05), monkeypatch)
    reached, beyond = step.find(side, None, (0.2, 0.01), 1000)
    assert reached.evaluations == 3 and reached.reached
    assert not beyond.reached and beyond.error == pytest.approx(0.05) and max(asked) < 40


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_an_untrained_network_is_made_a_contraction():
    weights = problem.untrained(6, 4)
    x, v = torch.randn(2, 2, 3, 16, 16)
    for _ in range(5):
        v = torch.func.jvp(weights.denoiser, (x,), (v / v.norm(),))[1].detach()
        assert v.norm() < 1


def test_trained_weights_come_from_a_checkpoint(tmp_path):
    config = ModelConfig(denoiser=DNCNN, weight=0.07, noise=0.02)
    model = config.model().eval()
    save_checkpoint(tmp_path / "weights", model, config)
    weights = problem.trained(tmp_path / "weights")
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(weights.denoiser(x), model.regularizer.denoiser(x))
    assert weights.weight == pytest.approx(0.07) and weights.noise == 0.02
    other = ModelConfig(form="denoiser", denoiser=DNCNN)
    save_checkpoint(tmp_path / "denoiser", other.model(), other)
    with pytest.raises(ValueError, match="of the form 'denoiser'"):
        problem.trained(tmp_path / "denoiser")
    assert problem.trained("gaussian5-sigma1").denoiser.injection
    denoiser = {"kind": "UNet", "features": [4], "blocks": [1], "conditions": 3, "injection": 13}
    other = ModelConfig(form="universal", denoiser=denoiser)
    save_checkpoint(tmp_path / "universal", other.model(), other)
    with pytest.raises(ValueError, match="universal, for many measurements; it takes one for a single setting"):
        problem.trained(tmp_path / "universal")
    with pytest.raises(ValueError, match="the benchmark step alone takes one"):
        run("kernels", tmp_path, True, Console(), checkpoint=tmp_path / "weights")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "--batch", "4"), "batch is 4; the benchmark step alone takes one, not kernels"),
        (("step", "--batch", "0"), "batch is 0; it takes an integer of at least 1"),
        (("step", "--size", "8"), "size is 8; it takes an integer of at least 16"),
        (("kernels", "--size", "64"), "size is 64; the benchmark step alone takes one, not kernels"),
    ],
)
def test_a_batch_that_no_benchmark_takes_is_refused(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1 and message in " ".join(result.output.split())


@pytest.mark.filterwarnings("ignore::jfbfast.ConvergenceWarning")
def test_a_part_of_the_step_pauses_the_one_around_it():
    watch = split.Stopwatch(CPU)
    inner = watch("denoiser", lambda: time.sleep(0.02))
    with torch.no_grad():
        watch("data_step", lambda: (inner(), time.sleep(0.01)))()
    inner()
    assert watch.seconds["denoiser"] >= 0.02 and watch.seconds["gradient"] >= 0.02
    assert watch.seconds["data_step"] >= 0.01 and watch.seconds["anderson"] == 0
    shares = split.split(replace(tiny_problem("filtered"), half=True), 3)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0


TINY_STEP = step.Plan(
    features=4,
    depth=3,
    cases=(("preconditioned", 16), ("paper", 12)),
    batch=2,
    targets=(1e-1, 1e-2),
    compiled=(),
    limit=40,
    seconds=0.05,
    counts=(2, 3),
    counts_size=12,
    sizes=(12, 16),
    sizes_batch=2,
    exact=(12,),
    memory=(("jfbfast", 3),),
)


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_step_benchmark_writes_its_tables_csv_and_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    console = Console(record=True, width=80)
    monkeypatch.setattr(step, "QUICK", replace(TINY_STEP, batch=9))
    run("step", tmp_path, True, console, batch=2)
    text = console.export_text()
    assert "deepinv is not installed; it is left out" in text and "…" not in text
    assert "preconditioned layer, 2×3×16²" in text and "gradient" in text and torch.__version__ in text
    assert "fastest at equal error in any dtype" in text

    with (tmp_path / "step.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    of = {e: [row for row in rows if row["experiment"] == e] for e in ("step", "evaluations", "size", "memory")}
    assert {row["side"] for row in of["step"]} >= {"jfbfast", "PyTorch", "published loop", "jfbfast, solve in bf16"}
    assert "deepinv" not in {row["side"] for row in rows}
    assert {(row["layer"], row["dtype"], row["target_error"]) for row in of["step"]} == set(
        itertools.product(("preconditioned", "paper"), ("float32", "bfloat16"), ("0.1", "0.01"))
    )
    for row in of["step"]:
        assert (float(row["error"]) <= float(row["target_error"])) == (row["reached"] == "True")
        assert float(row["error_median"]) <= float(row["error"])
        if row["side"] == "jfbfast":
            assert sum(float(row[name]) for name in row if name.startswith("split_")) == pytest.approx(1, abs=1e-4)
    for row in of["step"] + of["evaluations"] + of["size"]:
        assert 0 < float(row["q1_s"]) <= float(row["median_s"]) <= float(row["q3_s"])
        assert row["side"] != "jfbfast" or float(row["ratio"]) == 1
        assert row["instruction_sets"] and row["torch"] == torch.__version__
    assert {row["evaluations"] for row in of["evaluations"]} == {"2", "3"}
    assert {row["size"] for row in of["size"]} == {"12", "16"}
    assert {row["side"] for row in of["size"] if row["size"] == "12"} >= {"jfbfast, CG", "jfbfast, GMRES"}
    assert [float(row["peak_mb"]) >= 0 for row in of["memory"]] == [True]
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_that_fails_in_its_own_process_is_said():
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        memory.peak_megabytes(tiny_problem("filtered"), "nobody", 2)


def test_a_side_counts_in_the_dtype_in_which_it_is_fastest():
    case = {"layer": "paper", "size": 16, "batch": 2, "target_error": 0.1, "samples": 5}
    times = {
        ("jfbfast", "float32"): (4.0, True),
        ("TorchDEQ", "float32"): (6.0, True),
        ("jfbfast", "bfloat16"): (2.0, True),
        ("TorchDEQ", "bfloat16"): (1.0, False),
        ("TorchDEQ, compiled", "float32"): (5.0, True),
    }
    rows = [
        {**case, "side": side, "dtype": dtype, "median_s": seconds, "reached": reached}
        for (side, dtype), (seconds, reached) in times.items()
    ]
    found = {row["library"]: (row["side"], row["dtype"], row["ratio"]) for row in step_report.fastest(rows)}
    assert found == {"jfbfast": ("jfbfast", "bfloat16", 1), "TorchDEQ": ("TorchDEQ, compiled", "float32", 2.5)}
