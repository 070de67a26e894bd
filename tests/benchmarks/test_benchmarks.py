"""The benchmarks: that they compare like with like, count right, and write what they say. No timing is asserted."""

import csv
import itertools
import subprocess
import sys
import time

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from helpers.rivals import optional
from jfbfast import Anderson, GaussianBlur
from jfbfast.benchmarks import kernels, machine, report, rivals, run
from jfbfast.benchmarks.timing import between_evaluations, compare, interleave, spread, timed
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
    size = 16 * 3 * 128 * 128
    assert kernels.Case("blur", 2, shape).bytes(4) == 2 * 4 * size + 256 * 5 * 4
    assert kernels.Case("data step", 2, shape).bytes(4) == 4 * 4 * size + 2 * 256 * 5 * 4
    assert kernels.Case("data step", 2, shape).bytes(2) == 4 * 2 * size + 2 * 256 * 5 * 4
    assert kernels.Case("Anderson step", 5, shape).bytes(4) == 13 * 4 * size
    assert kernels.Case("Anderson step", 5, shape).bytes(2) == (18 + 20) * size
    assert kernels.Case("conv3x3", 3, shape).bytes(4) == 2 * 4 * size + 4 * 81


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

    measured = interleave({"a": side("a"), "broken": fails, "b": side("b")}, 0.6, said.append)
    assert list(measured) == ["a", "b"] and said == ["broken is left out: no compiler"]
    assert order[-6:] == ["a", "b"] * 3  # the rounds; of a busy machine a warm-up may be repeated
    with pytest.raises(RuntimeError, match="no compiler"):
        interleave({"a": fails}, 0.05, said.append)


def test_a_slow_rival_is_measured_once():
    sides = {"a": lambda: timed(lambda: None, CPU), "slow": lambda: timed(lambda: time.sleep(0.05), CPU)}
    measured = interleave(sides, 0.06, print)
    assert measured["slow"].samples == 1 and measured["a"].samples >= 3


def test_ratios_are_taken_round_by_round():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert compare("wall", [2.0, 20.0, 4.0], [1.0, 10.0, 2.0]).ratio == (2.0, 2.0, 2.0)
    assert compare("wall", [6.0], [2.0, 20.0, 4.0]).ratio.median == 1.5


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_benchmark_writes_its_table_csv_and_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    console = Console(record=True, width=80)
    monkeypatch.setattr(kernels, "QUICK", TINY)
    kernels.run(tmp_path, True, console)
    text = console.export_text()
    assert "kornia is not installed; it is left out" in text
    assert "Anderson step, memory 3" in text and torch.__version__ in text and "…" not in text

    with (tmp_path / "kernels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sides = {kernel: {row["side"] for row in rows if row["kernel"] == kernel} for kernel in kernels._SIDES}
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
    case = kernels.Case("conv3x3", 16, (2, 16, 8, 8))
    call = kernels.conv3x3_sides(case, TINY, CPU, set())["conv2d NCHW"]()
    call()
    call()
    assert all(a is b and a.is_contiguous() for a, b in zip(*given, strict=True))


def test_the_panels_of_a_kernel_without_bfloat16_do_not_name_it():
    case, timing = kernels.Case("conv3x3", 16, (2, 16, 8, 8)), compare("wall", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    rows = [case.row(name, timing, 1.0) for name in ("jfbfast", "jfbfast with its transform", "conv2d NHWC")]
    for draw, names in ((kernels.plot_ratios, ["conv2d NHWC"]), (kernels.plot_bandwidth, ["jfbfast"])):
        axis = Figure().subplots()
        draw(axis, rows)
        assert axis.get_legend_handles_labels()[1] == names


def test_times_and_ratios_have_three_digits():
    times = {1234.0: "1234 s", 0.9996: "1 s", 0.99: "990 ms", 0.0123: "12.3 ms", 9.99e-4: "999 µs", 5e-7: "0.5 µs"}
    assert [report.seconds(seconds) for seconds in times] == list(times.values())
    rows = {"ratio": 2.345, "samples": 5}, {"ratio": 1234.5, "samples": 1}
    assert list(map(report.ratio, rows)) == ["2.35×", "~1234×"]


@pytest.mark.parametrize(("high", "ticks"), [(0.1, ["1 ms", "2 ms", "5 ms", "10 ms"]), (10, ["1 ms", "10 ms"])])
def test_a_logarithmic_axis_is_marked_by_how_much_it_spans(high, ticks):
    axis = Figure().subplots()
    axis.set_yscale("log")
    axis.set_ylim(1e-3, high)
    report.logarithmic(axis.yaxis, report.seconds)
    shown = axis.yaxis.get_major_formatter().format_ticks([v for v in axis.get_yticks() if 1e-3 <= v <= 1.1 * high])
    assert shown[: len(ticks)] == ticks


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    assert machine.disturbance() == []
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    assert "load 3.0 on 4 cores" in machine.disturbance()[0]


def test_an_unknown_benchmark_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no benchmark 'speed'"):
        run("speed", tmp_path, True, Console())
    result = CliRunner().invoke(app, ["bench", "speed", "--out", str(tmp_path)])
    assert result.exit_code == 1 and "no benchmark 'speed'" in result.output


def test_the_module_prints_what_there_is(tmp_path):
    command = [sys.executable, "-m", "jfbfast.benchmarks"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "kernels" in shown.stdout and "--quick" in shown.stdout
