"""The benchmarks: that they compare like with like, count right, and write what they say. No timing is asserted."""

import csv
import itertools
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from jfbfast import Anderson, DnCNN, GaussianBlur
from jfbfast.benchmarks import (
    display,
    implicit_rivals,
    kernels,
    machine,
    memory,
    problem,
    report,
    rivals,
    run,
    split,
    step,
)
from jfbfast.benchmarks.timing import Measured, between_evaluations, interleave, ratios, spread, timed
from jfbfast.checkpoint import ModelConfig, save_checkpoint
from jfbfast.cli import app

CPU = torch.device("cpu")
TINY = kernels.Plan(
    shapes=((2, 3, 16, 16),),
    radii=(2,),
    memories=(3,),
    features=((2, 16, 8, 8),),
    seconds=0.05,
    compiled_radius=0,
    triad_bytes=1 << 16,
)


def optional(name):
    """An optional rival, imported without the warnings of its own import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name)


def rival_blur(name, size, sigma, x):
    if name in ("kornia", "torchvision"):
        optional(name)
    return getattr(rivals, name)(size, sigma, x)


BLURS = ("conv2d", "separable_conv2d", "kornia", "torchvision")


@pytest.mark.parametrize("name", BLURS)
@pytest.mark.parametrize("radius", [2, 4])
def test_the_rivals_blur_as_we_do(name, radius):
    x = torch.randn(2, 3, 25, 31)
    size, sigma = 2 * radius + 1, 1.5
    theirs = rival_blur(name, size, sigma, x)(x)
    ours = GaussianBlur(size, sigma, "reflect" if name == "torchvision" else "zeros")(x)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", BLURS)
def test_the_rivals_take_the_same_data_step(name):
    x, d, r = torch.randn(3, 2, 3, 25, 31)
    theirs = rivals.data_step(rival_blur(name, 5, 1.0, x), x, d, r, 0.5)
    ours = GaussianBlur(5, 1.0).gradient_step(x, d, r, 0.5)
    inside = (..., slice(4, -4), slice(4, -4)) if name == "torchvision" else ...  # it reflects at the edge
    torch.testing.assert_close(theirs[inside], ours[inside], rtol=1e-5, atol=2e-6)


def test_channels_last_convolution_stays_channels_last():
    x = torch.randn(2, 3, 25, 31)
    last = x.contiguous(memory_format=torch.channels_last)
    theirs = rivals.conv2d(5, 1.0, last)(last)
    assert theirs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(theirs, GaussianBlur(5, 1.0)(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["gilton", "torchdeq", "deepinv"])
@torch.no_grad()
def test_the_andersons_reach_the_same_fixed_point_in_as_many_evaluations(name):
    if name != "gilton":
        optional(name)
    x0 = torch.randn(2, 3, 8, 8)
    layer = kernels.linear_map(x0)
    evaluations = 0

    def counted(x):
        nonlocal evaluations
        evaluations += 1
        return layer(x)

    theirs = getattr(rivals, f"{name}_anderson")(counted, x0, 5, 120)
    assert evaluations == 120
    ours = Anderson(tol=1e-6, max_iter=100).solve(layer, x0).value
    assert float((layer(ours) - ours).norm()) < 1e-4 * float(ours.norm())
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_published_loop_ends_where_the_iterate_stands_still():
    layer = kernels.linear_map(torch.randn(2, 3, 8, 8))
    seen = []

    def shown(x):
        seen.append(x)
        return layer(x)

    x = rivals.gilton_anderson(shown, torch.randn(2, 3, 8, 8), 5, 100, tol=1e-2)
    changes = [
        float((b - a).flatten(1).norm(dim=1).max() / b.flatten(1).norm(dim=1).max())
        for a, b in itertools.pairwise(seen)
    ]
    assert 4 < len(seen) < 100 and changes[-1] < 1e-2 <= min(changes[2:-1])
    assert x is seen[-1]


def test_the_bytes_of_a_known_case():
    shape = (16, 3, 128, 128)
    image = 16 * 3 * 128 * 128
    assert kernels.blur_bytes(shape, 2, 4) == 2 * 4 * image + 256 * 5 * 4
    assert kernels.data_step_bytes(shape, 2, 4) == 4 * 4 * image + 2 * 256 * 5 * 4
    assert kernels.data_step_bytes(shape, 2, 2) == 4 * 2 * image + 2 * 256 * 5 * 4
    assert kernels.anderson_bytes(shape, 5, 4) == 13 * 4 * image
    assert kernels.conv3x3_bytes(shape, 3, 4) == 2 * 4 * image + 4 * 81
    assert kernels.conv3x3_flops(shape, 3) == 2 * 27 * image


def test_the_step_of_a_solver_is_timed_without_its_layer():
    def solve(layer):
        x = torch.zeros(1)
        for _ in range(4):
            x = layer(x)
            time.sleep(0.001)

    def layer(x):
        time.sleep(0.05)
        return x

    sampler = between_evaluations(solve, layer, CPU, first=1)
    assert sampler.clock == "wall" and sampler.sample() >= 0.001


def test_sides_are_measured_in_turn_and_a_failing_rival_is_said():
    order, said = [], []

    def fails():
        raise RuntimeError("no compiler\nat all")

    def side(name):
        return lambda: timed(lambda: order.append(name) or time.sleep(0.005), CPU)

    measured = interleave({"a": side("a"), "broken": fails, "b": side("b")}, 0.2, ("a", "b"), said.append)
    assert list(measured) == ["a", "b"] and said == ["broken is left out: no compiler"]
    assert order[-6:] == ["a", "b"] * 3  # the rounds; of a busy machine a warm-up may be repeated
    with pytest.raises(RuntimeError, match="no compiler"):
        interleave({"a": fails}, 0.05, ("a",), said.append)


def test_a_slow_rival_is_measured_once():
    sides = {"a": lambda: timed(lambda: None, CPU), "slow": lambda: timed(lambda: time.sleep(0.05), CPU)}
    measured = interleave(sides, 0.06, ("a",), print)
    assert len(measured["slow"].samples) == 1 and len(measured["a"].samples) >= 3


def test_ratios_are_taken_round_by_round():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    doubled = Measured("wall", [2.0, 20.0, 4.0])
    assert ratios(doubled, Measured("wall", [1.0, 10.0, 2.0])) == (2.0, 2.0, 2.0)
    assert ratios(Measured("wall", [6.0]), doubled).median == 1.5


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_benchmark_writes_its_table_csv_and_picture(tmp_path, monkeypatch):
    import_ = rivals.quiet_import
    monkeypatch.setattr(rivals, "quiet_import", lambda n: "kornia is not installed" if n == "kornia" else import_(n))
    console = Console(record=True, width=80)
    kernels.run(tmp_path, True, console, TINY)
    text = console.export_text()
    assert "kornia is not installed; it is left out" in text
    assert "Anderson step, memory 3" in text and torch.__version__ in text and "…" not in text

    with (tmp_path / "kernels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sides = {kernel: {row["side"] for row in rows if row["kernel"] == kernel} for kernel in kernels._KERNELS}
    assert {"jfbfast", "jfbfast bf16", "PyTorch", "conv2d", "conv2d NHWC", "triad"} <= sides["blur"]
    assert sides["blur"] == sides["data step"] and "kornia" not in sides["blur"]
    assert {"jfbfast", "PyTorch", "published loop", "the map"} <= sides["Anderson step"]
    assert {"jfbfast", "conv2d NHWC", "conv2d bf16", "direct at peak"} <= sides["conv3x3"]
    for row in rows:
        assert row["torch"] == torch.__version__ and row["threads"] == str(torch.get_num_threads()) and row["device"]
        assert float(row["q1_us"]) <= float(row["median_us"]) <= float(row["q3_us"])
        rate = float(row["bytes"]) / float(row["median_us"]) / 1e3
        assert rate == pytest.approx(float(row["gb_per_s"]), rel=1e-4)
        assert rate / float(row["triad_gb_per_s"]) == pytest.approx(float(row["bandwidth_fraction"]), rel=1e-4)
        assert row["side"] != "jfbfast" or float(row["ratio"]) == 1
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_a_rival_is_not_charged_for_the_layout_of_its_tensors(monkeypatch):
    given = []
    monkeypatch.setattr(kernels, "timed", lambda call, device: call)
    monkeypatch.setattr(kernels.reference, "conv3x3", lambda *tensors: given.append(tensors[:2]))
    call = kernels.conv3x3_sides((2, 16, 8, 8), 16, TINY, CPU, set())["conv2d NCHW"]()
    call()
    call()
    assert all(a is b and a.is_contiguous() for a, b in zip(*given, strict=True))


def test_the_panels_of_a_kernel_without_bfloat16_do_not_name_it():
    about, side = machine.describe(CPU), Measured("wall", [1.0, 2.0, 3.0])
    rows = [
        report.make_row("conv3x3", (2, 16, 8, 8), 16, name, torch.float32, 1, side, side, about, 1.0)
        for name in ("jfbfast", "jfbfast with its transform", "conv2d NHWC")
    ]
    cases = list(report._cases(rows, "conv3x3"))
    for draw, names in ((report._plot_ratios, ["conv2d NHWC"]), (report._plot_bandwidth, ["jfbfast"])):
        axis = Figure().subplots()
        draw(axis, cases)
        assert [text.get_text() for text in axis.get_legend().get_texts()] == names


def test_times_and_ratios_have_three_digits():
    times = {1234.0: "1234 s", 0.9996: "1 s", 0.99: "990 ms", 0.0123: "12.3 ms", 9.99e-4: "999 µs", 5e-7: "0.5 µs"}
    assert [display.time(seconds) for seconds in times] == list(times.values())
    assert [display.ratio(2.345, 5), display.ratio(1234.5, 1)] == ["2.35×", "~1234×"]


@pytest.mark.parametrize(("high", "ticks"), [(0.1, ["1 ms", "2 ms", "5 ms", "10 ms"]), (10, ["1 ms", "10 ms"])])
def test_a_logarithmic_axis_is_marked_by_how_much_it_spans(high, ticks):
    axis = Figure().subplots()
    axis.set_yscale("log")
    axis.set_ylim(1e-3, high)
    display.logarithmic(axis.yaxis, display.time)
    shown = axis.yaxis.get_major_formatter().format_ticks([v for v in axis.get_yticks() if 1e-3 <= v <= 1.1 * high])
    assert shown[: len(ticks)] == ticks


DNCNN = {"kind": "DnCNN", "features": 4, "depth": 3, "norm": None, "spectral_norm": False, "residual": True}


class OfTwoImages(nn.Module):
    """D(x, z), a contraction of x."""

    injection = True

    def __init__(self):
        super().__init__()
        self.network = DnCNN(6, 4, 3, None).eval()

    def forward(self, x, z):
        return 0.8 * x + 0.05 * self.network(torch.cat([x, z], 1))[:, :3]


def tiny_problem(injection=False):
    network = OfTwoImages() if injection else problem.Contraction(DnCNN(3, 4, 3, None).eval(), 0.05)
    weights = problem.Weights(problem._settled(network), 0.5, 3, 0.7, 0.01)
    return problem.problem(weights, 12, 2, CPU).to(torch.float64)


def make_side(name, given, layer, half=False):
    if name in ("TorchDEQ", "deepinv"):
        optional(name.lower())
    return dict(implicit_rivals.sides(given, layer, half, set()))[name]()


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
    given = tiny_problem(injection)
    side, ours = make_side(name, given, layer), make_side("jfbfast", given, layer)
    assert not side.batch_statistics
    evaluations = 400 if name == "published loop" else 80  # its regularisation slows it down
    found = step.error(side.forward(evaluations, None), problem.fixed_point(given, layer, False))
    assert found.largest < 1e-5
    for theirs, own in zip(gradients(side, given.x, evaluations), gradients(ours, given.x, 80), strict=True):
        torch.testing.assert_close(theirs, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", problem.LAYERS)
def test_every_side_counts_its_evaluations(layer):
    given = tiny_problem()
    for name in ("jfbfast", *RIVALS):
        seen = []
        make_side(name, given, layer).forward(7, seen.append)
        assert len(seen) == 7, name


def test_the_published_loop_normalises_by_the_batch():
    given = problem.problem(problem.untrained(4, 4), 12, 3, CPU).to(torch.float64)
    side = make_side("published loop", given, "preconditioned")
    exact = problem.fixed_point(given, "preconditioned", True)
    assert side.batch_statistics and step.error(side.forward(80, None), exact).largest < 1e-4
    assert step.error(exact, problem.fixed_point(given, "preconditioned", False)).largest > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_a_side_gets_the_fewest_evaluations_that_reach_the_target():
    given = tiny_problem()
    exact = problem.fixed_point(given, "preconditioned", False)
    for name in ("jfbfast", "published loop", "TorchDEQ", "deepinv"):
        side = make_side(name, given, "preconditioned")
        (found,) = step.find(side, exact, (1e-3,), 30)
        again = step.error(side.forward(found.evaluations, None), exact)
        assert found.reached and found.error == pytest.approx(again)
        assert found.error.median <= found.error.largest <= 1e-3
        assert found.evaluations == side.least or step.error(side.forward(found.evaluations - 1, None), exact)[0] > 1e-3
        (beyond,) = step.find(side, exact, (1e-30,), 4)
        assert not beyond.reached and beyond.error.largest > 1e-30


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
    with pytest.raises(ValueError, match="checkpoint is gaussian5, for a range of measurements; it takes one for a"):
        problem.trained("gaussian5")
    with pytest.raises(ValueError, match="the benchmark step alone takes one"):
        run("kernels", tmp_path, True, Console(), tmp_path / "weights")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "--batch", "4"), "batch is 4; the benchmark step alone takes one, not kernels"),
        (("step", "--batch", "0"), "batch is 0; it takes an integer of at least 1"),
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
    shares = split.split(tiny_problem(), "filtered", True, 3)
    assert sum(vars(shares).values()) == pytest.approx(1) and min(vars(shares).values()) > 0


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
    jacobian=(12,),
    memory=(("jfbfast", 3),),
)


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_step_benchmark_writes_its_tables_csv_and_picture(tmp_path, monkeypatch):
    import_ = rivals.quiet_import
    monkeypatch.setattr(rivals, "quiet_import", lambda n: "deepinv is not installed" if n == "deepinv" else import_(n))
    console = Console(record=True, width=80)
    monkeypatch.setattr(step, "QUICK", replace(TINY_STEP, batch=9))
    run("step", tmp_path, True, console, batch=2)
    text = console.export_text()
    assert "deepinv is not installed; it is left out" in text and "…" not in text
    assert "preconditioned layer, 2×3×16²" in text and "gradient" in text and torch.__version__ in text

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
        memory.peak_megabytes(tiny_problem(), "filtered", False, "nobody", 2)


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    assert machine.disturbance() is None
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    assert "load 3.0 on 4 cores" in (machine.disturbance() or "")


def test_an_unknown_benchmark_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no benchmark 'speed'"):
        run("speed", tmp_path, True, Console())
    result = CliRunner().invoke(app, ["bench", "speed", "--out", str(tmp_path)])
    assert result.exit_code == 1 and "no benchmark 'speed'" in result.output


def test_the_module_prints_what_there_is(tmp_path):
    command = [sys.executable, "-m", "jfbfast.benchmarks"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "kernels" in shown.stdout and "--quick" in shown.stdout
