"""The parts of `jfbfast bench gpu` that measure times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

import jfbfast
from jfbfast.backends import conv3x3, cuda, graphs, reference
from jfbfast.implicit.prepared import prepared
from jfbfast.kernels import launch

from .. import kernels as kernels_benchmark
from .. import step as step_benchmark
from ..problem import Problem, model
from ..report import OURS
from ..step_sides import Side, ours, sides
from .findings import (
    BATCH,
    CPU,
    DEVICE,
    OUT,
    QUICK,
    SIZES,
    attempt,
    convolution_precision,
    median_ms,
    networks,
    relative,
    say,
)

_PRECISIONS = {"TF32": ("tf32", False), "bfloat16": ("tf32", True), "float32": ("ieee", False)}
_STEP = replace(
    step_benchmark.QUICK,
    batch=BATCH,
    targets=(1e-1,) if CPU else (1e-3,),
    seconds=0.05 if CPU else 2.0 if QUICK else 5.0,
)
_KERNELS = replace(
    kernels_benchmark.QUICK,
    shapes=((2, 3, 16, 16),) if CPU else ((16, 3, 256, 256), (16, 3, 128, 128), (16, 3, 64, 64)),
    features=((2, 16, 8, 8),) if CPU else ((16, 64, 128, 128), (16, 64, 64, 64)),
    seconds=0.05 if CPU else 0.5 if QUICK else 2.0,
    compiled_radius=0 if CPU else 2,
    triad_bytes=1 << 16 if CPU else 3 << 28,
)
_LIBRARIES = ("torchdeq", "deepinv")  # which the machine need not have
_EAGER = ("pytorch", "published loop", "jfbfast, solve in bf16")


def step() -> None:
    """Time a training step of each side at equal true error, in each precision: see `benchmarks.step`."""
    _steps("step")


def compiled() -> None:
    """The same with torch.compile, for one size and precision."""
    _steps("compiled")


def _steps(part: str) -> None:
    compiling = part == "compiled"
    for size, network in product(SIZES[:1] if compiling else SIZES, tuple(networks())):
        plan = replace(_STEP, compiled=(network.layer,) if compiling else ())
        libraries = () if CPU or compiling else _LIBRARIES
        benchmark = step_benchmark.Benchmark(plan, network.weights, DEVICE, Console(width=120), libraries)
        benchmark.missing |= set(_EAGER) if compiling else set()
        _compare(part, f"{network.name}, {size}²", benchmark, network.problem(size))


def _compare(part: str, case: str, benchmark: step_benchmark.Benchmark, given: Problem) -> None:
    """Time the sides in each precision, and write each row of the benchmark as a finding."""
    fixed: list[Any] = []

    def solve(device: str) -> dict[str, Any]:
        found = benchmark.fixed_points(given.to(device)) or ()
        fixed.extend(x if x is None else x.to(DEVICE) for x in found)
        return {"ok": bool(fixed)}

    def measure(precision: str) -> dict[str, Any]:
        benchmark.rows.clear()
        convolution, half = _PRECISIONS[precision]
        with convolution_precision(convolution):
            benchmark.at_equal_error(replace(given, half=half), *fixed)
        for row in benchmark.rows:
            say(part, **{**row, "ok": True, "dtype": precision})
        return {"sides": len(benchmark.rows)}

    benchmark.say = lambda text: say(part, name=text, ok=False)  # a side that failed
    for device in dict.fromkeys((DEVICE.type, "cpu")):  # the CPU if the GPU fails
        if not fixed:
            attempt(part, f"{case}, fixed points on {device}", partial(solve, device))
    for precision in _PRECISIONS if part == "step" and fixed else ["TF32"] * bool(fixed):
        attempt(part, f"{case}, {precision}", partial(measure, precision))


@torch.no_grad()
def kernels() -> None:
    """Time each kernel against its roofline and against what users call: see `benchmarks.kernels`."""

    def measure(plan: kernels_benchmark.Plan) -> dict[str, Any]:
        rows = kernels_benchmark.measure(plan, DEVICE, Console(width=120))
        for row in rows:
            say("kernels", ok=True, **row)
        return {"rows": len(rows)}

    none: dict[str, Any] = {"radii": (), "memories": (), "features": ()}
    for name in none:  # one after the other, so that the first are written if time runs out
        attempt("kernels", name, partial(measure, replace(_KERNELS, **{**none, name: getattr(_KERNELS, name)})))


def profile() -> None:
    """Profile one training step: launches, device time, idle time; tables go to profile.txt. Each side's memory."""
    activities = [ProfilerActivity.CPU] + ([] if CPU else [ProfilerActivity.CUDA])

    def measure(given: Problem, evaluations: int, case: str) -> dict[str, Any]:
        side = sides(given)[OURS]()
        wall = median_ms(partial(side.step, given.x, evaluations), graph=False)
        with profiler(activities=activities) as prof:
            side.step(given.x, evaluations)
        on_device = [event for event in prof.events() or () if "CUDA" in str(event.device_type)]
        key = "self_cpu_time_total" if CPU else "self_device_time_total"
        with (OUT / "profile.txt").open("a", encoding="utf-8") as file:
            file.write(f"\n{case}: {wall:.2f} ms\n{prof.key_averages().table(sort_by=key, row_limit=40)}\n")
        busy = sum(event.device_time_total for event in on_device) / 1e3
        return {"wall_ms": wall, "device_ms": busy, "device_operations": len(on_device)}

    def peak(make: Callable[[], Side], given: Problem, evaluations: int) -> dict[str, Any]:
        side = make()
        if CPU:
            return {}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step(given.x, evaluations)
        return {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 2**20}

    for network, half in product(networks(), (False, True)):
        case = f"{network.name}, {SIZES[0]}², {'bf16' if half else 'tf32'}, {network.evaluations} evaluations"
        given = network.problem(SIZES[0], half)
        attempt("profile", case, partial(measure, given, network.evaluations, case))
        for name, make in sides(given, _LIBRARIES).items():
            attempt("memory", f"{case}, {name}", partial(peak, make, given, network.evaluations))


def graph() -> None:
    """Time one evaluation, one step of Anderson and a training step, as eager launches and as CUDA graphs."""

    @torch.no_grad()
    def measure(given: Problem, dtype: torch.dtype | None) -> dict[str, Any]:
        net = model(given).eval()
        evaluate, d = prepared(net.layer, dtype, tol=1e-3), given.d
        x = net.start(d).flatten(1).clone()
        state = None if CPU else cuda.AndersonSolve(x, tol=0.0)

        def layer() -> None:
            evaluate(x.view_as(d), d)

        def iteration() -> None:
            f = evaluate(x.view_as(d), d).to(x.dtype).reshape(x.shape)
            if state is not None:
                state.step(x, f)

        found = {}
        for name, call in (("layer", layer), ("iteration", iteration)):
            found[f"{name}_graph_ms"] = median_ms(call)
            found[f"{name}_eager_ms"] = median_ms(call, graph=False)
        return found

    def measure_step(given: Problem, evaluations: int, dtype: torch.dtype | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        outs = []
        for name, captured in (("eager", False), ("graph", True)):
            side = ours(given, solve_dtype=dtype, cuda_graph=captured)
            found[f"step_{name}_ms"] = median_ms(partial(side.step, given.x, evaluations), graph=False)
            outs.append(side.forward(evaluations))
        error = relative(outs[1], outs[0])
        return {"ok": error <= 1e-5, "error": error, **found, "graphs": graphs.describe()}

    for network, size, dtype in product(networks(), SIZES, (None, torch.bfloat16)):
        case = f"{network.name}, {size}², {'TF32' if dtype is None else 'bfloat16'}"
        given = network.problem(size)
        attempt("graph", case, partial(measure_step, given, network.evaluations, dtype))
        attempt("graph", case, partial(measure, given, dtype))


@torch.no_grad()
def convolutions() -> None:
    """Time a 3 × 3 convolution with bias and ReLU as torch offers it: separately, or fused by cuDNN."""

    def measure(channels: tuple[int, int], size: int, dtype: torch.dtype) -> dict[str, Any]:
        x = torch.randn(BATCH, channels[0], size, size, device=DEVICE, dtype=dtype)
        w = torch.randn(channels[1], channels[0], 3, 3, device=DEVICE, dtype=dtype) / (9 * channels[0]) ** 0.5
        b = torch.randn(channels[1], device=DEVICE, dtype=dtype)
        found = {}
        for layout, form in (("NHWC", torch.channels_last), ("NCHW", torch.contiguous_format)):
            xl, wl = x.to(memory_format=form), w.to(memory_format=form)
            found[f"conv {layout}"] = median_ms(partial(F.conv2d, xl, wl, padding=1))
            separate, ours = (partial(each.conv3x3, xl, wl, b, True) for each in (reference, conv3x3))
            found[f"conv, bias, ReLU {layout}"] = median_ms(separate)
            found[f"{OURS} {layout}"] = median_ms(ours)
            if not CPU:
                fused = partial(torch.ops.aten.cudnn_convolution_relu, xl, wl, b, (1, 1), (1, 1), (1, 1), 1)
                found[f"fused {layout}"] = median_ms(fused)
            found[f"error {layout}"] = relative(ours(), separate())
        errors = max(value for name, value in found.items() if name.startswith("error"))
        return {"ok": errors <= (1e-2 if dtype == torch.bfloat16 else 1e-3), **found}

    for size, precision, search in product(SIZES, ("tf32", "bf16", "ieee"), (False, True)):
        torch.backends.cudnn.benchmark = search
        with convolution_precision("ieee" if precision == "ieee" else "tf32"):
            for channels in ((64, 64), (3, 64), (64, 3)):
                case = f"{channels} {size} {precision} cudnn.benchmark={search}"
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                attempt("convolutions", case, partial(measure, channels, size, dtype))
    torch.backends.cudnn.benchmark = False


def tiles() -> None:
    """Time each tile of the Triton kernels on each shape: which is fastest on this GPU?"""
    blur, eta = jfbfast.GaussianBlur(5, 1.0), torch.tensor(0.5, device=DEVICE)
    shapes = ((2, 3, 16, 16),) if CPU else ((16, 3, 128, 128), (16, 3, 64, 64), (16, 3, 256, 256), (1, 3, 2048, 2048))
    for shape in shapes:
        x, d, r = torch.randn(3, *shape, device=DEVICE)
        for table, call in (
            ("GRADIENT_TILES", partial(blur.gradient_step, x, d, r, eta)),
            ("BLUR_TILES", partial(blur, x)),
        ):
            classes = getattr(launch, table)

            def measure(tile: Any, table: str = table, call: Any = call, classes: Any = classes) -> dict[str, Any]:
                setattr(launch, table, {**classes, 2: (tile,)})
                try:
                    return {"us": 1e3 * median_ms(call)}
                finally:
                    setattr(launch, table, classes)

            for tile in (*classes[2], launch.Tile(64, 64, 2), launch.Tile(64, 32, 2), launch.Tile(64, 24, 4)):
                attempt("tiles", f"{table} {shape} {tuple(tile)}", partial(measure, tile))
