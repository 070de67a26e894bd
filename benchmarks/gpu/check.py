"""What `check.sh` runs on the GPU, one part per call: `python -m jfbfast.benchmarks.gpu.check PART`.

Each finding is one JSON object in $OUT/results.jsonl, written at once, so that a part that runs out of time keeps its
findings. GPU_CHECK_CPU=1 runs a part on the CPU at tiny sizes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

import jfbfast
from jfbfast import kernels
from jfbfast.backends import cuda, reference
from jfbfast.implicit.prepared import prepared
from jfbfast.kernels import launch

from ..problem import Problem, model, problem, trained, untrained
from ..report import OURS
from ..step_sides import Side, sides
from ..timing import first_line, timed

CPU = os.environ.get("GPU_CHECK_CPU") == "1"
DEVICE = torch.device("cpu" if CPU else "cuda:0")
OUT = Path(os.environ.get("OUT", "."))
SIZES = (16,) if CPU else (128, 64)
BATCH = 2 if CPU else 16
ROUNDS = 2 if CPU else 15
OTHERS = ("torchdeq", "deepinv")  # libraries that the machine need not have


def say(part: str, **found: Any) -> None:
    """Write one finding, and print it."""
    with (OUT / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part, **found}, default=str) + "\n")
    told = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found.items()}
    print(part, *(f"{name}={value}" for name, value in told.items()), flush=True)


def attempt(part: str, name: str, check: Callable[[], dict[str, Any]]) -> None:
    """Run one check; a failure is a finding, after which the next check runs."""
    try:
        found = {"ok": True, **check()}
        synchronize()
        say(part, name=name, **found)
    except Exception as error:
        say(part, name=name, ok=False, error=f"{type(error).__name__}: {first_line(error)}")
        traceback.print_exc()
        if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
            raise SystemExit(f"{part}: the CUDA context is lost, this part ends") from None


def synchronize() -> None:
    """Wait for the device."""
    if not CPU:
        torch.cuda.synchronize()


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def median_ms(call: Callable[[], object], graph: bool = True) -> float:
    """Milliseconds of a call, a median: on the GPU from a CUDA graph, or else with its launches by the wall clock."""

    def waiting() -> None:
        call()
        synchronize()

    sampler = timed(call, DEVICE) if graph else timed(waiting, torch.device("cpu"))
    sampler.sample()
    return 1e3 * median(sampler.sample() for _ in range(ROUNDS))


@contextmanager
def convolution_precision(precision: str) -> Iterator[None]:
    """Run float32 convolutions in "ieee" or "tf32"; matrix products stay as torch has them."""
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before


def networks() -> Iterator[tuple[str, partial[Problem], int]]:
    """A DnCNN and a U-Net: a name, what makes a problem of some size, and the evaluations of a solve."""
    made = partial(problem, batch=BATCH, device=DEVICE)
    yield "DnCNN", partial(made, untrained(8, 3) if CPU else untrained(64, 17), layer="preconditioned"), 6
    yield "U-Net", partial(made, trained("gaussian5-sigma1"), layer="filtered"), 3


def agreement() -> None:
    """Layers, solvers and gradients must give on the device what they give on the CPU."""
    why = "" if CPU else cuda.unavailable_because(DEVICE.index or 0)
    say("agreement", name="Anderson's CUDA module", ok=not why, why=why)
    weights = untrained(8, 3) if CPU else untrained(16, 5)

    def same(layer: str, bound: float = 1e-3, half: bool = False, **options: Any) -> dict[str, Any]:
        """The restored images and the parameters' gradient, solved to 1e-5."""
        options.setdefault("solver", jfbfast.Anderson(tol=1e-5, max_iter=200))
        found = []
        for device in (torch.device("cpu"), DEVICE):
            given = problem(weights, 16 if CPU else 40, 4, device, layer, half)
            net = model(given, **options).train()
            with given.autocast():
                out = net(given.d)
            F.mse_loss(out.float(), given.x).backward()
            gradient = torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.grad is not None])
            found.append((out, gradient))
        error, gradient_error = (relative(b, a) for a, b in zip(*found, strict=True))
        return {"ok": error <= bound and gradient_error <= 20 * bound, "error": error, "gradient_error": gradient_error}

    for layer in ("preconditioned", "paper", "filtered"):
        attempt("agreement", f"{layer} layer", partial(same, layer))
        attempt("agreement", f"{layer} layer, autocast", partial(same, layer, 5e-2, half=True))
        attempt("agreement", f"{layer} layer, solve_dtype", partial(same, layer, solve_dtype=torch.bfloat16))
    for solver in (jfbfast.Broyden, jfbfast.Inertial, jfbfast.Picard):
        made = solver(tol=1e-5, max_iter=1000)
        attempt("agreement", f"solver {solver.__name__}", partial(same, "preconditioned", solver=made))
    history = jfbfast.Anderson(tol=1e-5, max_iter=200, history_dtype=torch.bfloat16)
    attempt("agreement", "history in bfloat16", partial(same, "preconditioned", solver=history))
    for gradient in ("neumann", "phantom", "implicit", jfbfast.Implicit("cg"), "shine", "unrolled"):
        attempt("agreement", f"gradient {gradient}", partial(same, "preconditioned", 5e-3, gradient=gradient))

    @torch.no_grad()
    def shipped() -> dict[str, Any]:
        net = jfbfast.DEGrad.from_pretrained("gaussian5-sigma1")
        d = net.blur(torch.rand(2, 3, 40, 44) * 2 - 1)
        error = relative(net.to(DEVICE)(d.to(DEVICE)), net.cpu()(d))
        return {"ok": error <= 3e-3, "error": error}

    attempt("agreement", "a shipped model", shipped)

    @torch.no_grad()
    def other_stream() -> dict[str, Any]:
        given = problem(weights, 40, 4, DEVICE)
        net = model(given).eval()
        expected = net(given.d)
        synchronize()
        with torch.cuda.stream(None if CPU else torch.cuda.Stream()):
            found = net(given.d)
        synchronize()
        error = relative(found, expected)
        return {"ok": error <= 1e-6, "error": error}

    attempt("agreement", "another stream", other_stream)


def sanitize() -> None:
    """Run our own kernels on small odd shapes, for compute-sanitizer and ncu: no cuDNN, no cuBLAS."""
    for mode, radii, shape, dtype in (
        ("zeros", (2, 2), (2, 33, 65), torch.float32),
        ("circular", (2, 3), (2, 17, 36), torch.bfloat16),
        ("reflect", (9, 2), (1, 21, 30), torch.float32),
        ("valid", (2, 3), (2, 19, 40), torch.float32),
    ):
        taps = (torch.rand(2 * radius + 1).tolist() for radius in radii)
        y, x = (reference.band_table(t, n, mode).float().to(DEVICE) for t, n in zip(taps, shape[1:], strict=True))
        forward = reference.Bands(y, x, mode == "circular")
        y, x = (table.contiguous() for table in reference.transpose(forward)[:2])
        adjoint = reference.Bands(y, x, forward.circular)
        x, d, r = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
        eta = torch.tensor(0.5, device=DEVICE)
        ours = (reference if CPU else kernels).gradient(x, d, r, forward, adjoint, eta)
        error = relative(ours, reference.gradient(x, d, r, forward, adjoint, eta))
        say("sanitize", name=f"{mode} {dtype}", ok=error <= 1e-2, error=error)
    for history, memory, size in ((None, 5, 3000), (None, 3, 301), (torch.bfloat16, 5, 2050), (None, 10, 4096)):
        q, b = torch.rand(3, size, device=DEVICE) * 1.5 - 0.6, torch.randn(3, size, device=DEVICE)
        if not CPU:
            x = torch.zeros_like(b)
            state = cuda.AndersonCuda(x, tol=1e-4, memory=memory, history_dtype=history)
            for _ in range(14):
                state.step(x, q * x + b)
            residual = state.finish()[1]
            say("sanitize", name=f"Anderson {memory} {size} {history}", ok=bool(residual.isfinite().all()))


def step(compiled: bool = False) -> None:
    """Time a training step of each side with equal evaluations, in each precision."""

    def measure(make: Callable[[], Side], given: Problem, evaluations: int) -> dict[str, Any]:
        side = make()
        start = time.perf_counter()
        side.step(given.x, evaluations)
        first = time.perf_counter() - start
        if not CPU:
            torch.cuda.reset_peak_memory_stats()
        ms = median_ms(partial(side.step, given.x, evaluations), graph=False)
        return {"ms": ms, "first_s": first, "peak_mb": 0 if CPU else torch.cuda.max_memory_allocated() >> 20}

    sizes, precisions = (SIZES[:1], ("tf32",)) if compiled else (SIZES, ("tf32", "bf16", "fp32"))
    for (kind, make_problem, evaluations), size, precision in product(networks(), sizes, precisions):
        given = make_problem(size=size, half=precision == "bf16")
        with convolution_precision("ieee" if precision == "fp32" else "tf32"):
            for name, make in sides(given, OTHERS, compiled).items():
                if ("compiled" in name) == compiled:
                    case = f"{name}, {kind}, {size}², {precision}, {evaluations} evaluations"
                    attempt("compiled" if compiled else "step", case, partial(measure, make, given, evaluations))


def profile() -> None:
    """Profile one training step: launches, device time, idle time; tables go to profile.txt."""
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

    for (kind, make_problem, evaluations), half in product(networks(), (False, True)):
        case = f"{kind}, {SIZES[0]}², {'bf16' if half else 'tf32'}, {evaluations} evaluations"
        attempt("profile", case, partial(measure, make_problem(size=SIZES[0], half=half), evaluations, case))


def graph() -> None:
    """Time one evaluation and one step of Anderson, as eager launches and as one CUDA graph."""

    @torch.no_grad()
    def measure(given: Problem, dtype: torch.dtype | None) -> dict[str, Any]:
        net = model(given).eval()
        evaluate, d = prepared(net.layer, dtype, tol=1e-3), given.d
        x = net.start(d).flatten(1).clone()
        state = None if CPU else cuda.AndersonCuda(x, tol=0.0)

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

    for (kind, make_problem, _), size, dtype in product(networks(), SIZES, (None, torch.bfloat16)):
        attempt("graph", f"{kind} {size} {dtype}", partial(measure, make_problem(size=size), dtype))


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
            found[f"conv, bias, ReLU {layout}"] = median_ms(partial(reference.conv3x3, xl, wl, b, True))
            if not CPU:
                fused = partial(torch.ops.aten.cudnn_convolution_relu, xl, wl, b, (1, 1), (1, 1), (1, 1), 1)
                found[f"fused {layout}"] = median_ms(fused)
        return found

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


PARTS: dict[str, Callable[[], None]] = {
    "agreement": agreement,
    "sanitize": sanitize,
    "step": step,
    "compiled": partial(step, compiled=True),
    "profile": profile,
    "graph": graph,
    "convolutions": convolutions,
    "tiles": tiles,
}


def main() -> None:
    """Run the part that the command line names."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    PARTS[sys.argv[1]]()


if __name__ == "__main__":
    main()
