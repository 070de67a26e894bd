"""Make docs/performance.jpg, docs/performance.csv and the tables of docs/performance.md on this machine's CPU.

python docs/performance.py [--quick]

It takes about ten minutes of two quiet cores; --quick takes two, with a batch of 2, to try it.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import matplotlib
import torch
from rich.console import Console
from torch import Tensor, nn

import jfbfast
from jfbfast.benchmarks import machine, report, step, step_report
from jfbfast.benchmarks.convolutions import fastest_product
from jfbfast.benchmarks.kernels import Case
from jfbfast.benchmarks.memory import peak_megabytes
from jfbfast.benchmarks.problem import Problem, Weights, model, photographs, problem, trained, untrained
from jfbfast.benchmarks.report import OURS, Row, where
from jfbfast.benchmarks.timing import timed
from jfbfast.implicit.prepared import prepared

matplotlib.use("Agg")

OUTPUT = Path(__file__).parent
CPU = torch.device("cpu")
MODEL = "gaussian5-sigma1"
RIVALS = ("PyTorch", "published loop", "TorchDEQ", "deepinv")
MEMORY = 5  # Anderson's
MEMORY_CASES = ((2, 32), (8, 64))  # images and their size
GPU = {"TF32": (400e12, 3.0e12), "bfloat16": (798e12, 3.0e12)}  # an H100: operations and bytes per second
PLAN = replace(step.QUICK, batch=16, seconds=20.0, sizes=(16, 32, 64, 128), sizes_batch=16, memory=())
QUICK = replace(PLAN, batch=2, seconds=1.0, sizes=(16, 32), sizes_batch=2, targets=(1e-2,))


class Work(NamedTuple):
    """The least arithmetic and memory traffic of a part, each tensor read or written once from memory, in float32."""

    operations: float
    bytes: float

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def times(self, count: float) -> Work:
        return Work(count * self.operations, count * self.bytes)

    def bound(self, operations_per_second: float, bytes_per_second: float) -> float:
        """Seconds, where arithmetic and transfers overlap."""
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)


def denoiser_work(given: Problem) -> Work:
    """The convolutions of one evaluation; biases, ReLU and norms belong to them."""
    total: list[Work] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        share = weight[0].numel() if isinstance(module, nn.Conv2d) else weight[:, 0].numel()
        total.append(Work(2 * share * output.numel(), 4 * (inputs[0].numel() + output.numel() + weight.numel())))

    denoiser = given.weights.denoiser
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    handles = [m.register_forward_hook(count) for m in denoiser.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        denoiser(given.d, *([given.d] if getattr(denoiser, "injection", False) else []))
    for handle in handles:
        handle.remove()
    return Work(sum(each.operations for each in total), sum(each.bytes for each in total))


def works(given: Problem, evaluations: int) -> dict[str, Work]:
    """The work of each part of a step with so many evaluations."""
    batch, channels, height, width = given.d.shape
    size = given.d.numel()
    # (AᵀA + λI)⁻¹: four products by the singular vectors of the rows and columns; reads an image and writes one.
    inverse = Work(4 * size * (height + width), 8 * size)
    data = inverse.times(2 if given.layer == "filtered" else 1)
    denoiser = denoiser_work(given)
    case = Case("Anderson step", MEMORY, (batch, channels, height, width))
    anderson = Work(4 * MEMORY * size, case.bytes(4))
    return {
        "denoiser": denoiser.times(evaluations),
        "data_step": data.times(evaluations),
        "anderson": anderson.times(evaluations),
        "gradient": (denoiser + data).times(3),  # forward, and the gradients of inputs and of weights
    }


def peaks() -> tuple[float, float]:
    """Operations per second of a large matrix product, and bytes per second of the triad."""
    return 1e9 * fastest_product(), median(machine.bandwidth_samples(3 << 27, CPU))


def parts_table(row: Row, given: Problem, peak: tuple[float, float]) -> list[list[str]]:
    """Each part's work, bound, and measured time, for our step of this row."""
    lines = []
    for part, work in works(given, row["evaluations"]).items():
        operations, transfers = work.operations / peak[0], work.bytes / peak[1]
        estimates = {name: 1e3 * work.bound(*rates) for name, rates in GPU.items()}
        estimates["bfloat16"] = 1e3 * max(work.operations / GPU["bfloat16"][0], work.bytes / 2 / GPU["bfloat16"][1])
        lines.append(
            [
                {"data_step": "data step", "anderson": "Anderson", "gradient": "gradient, backward"}.get(part, part),
                f"{work.operations / 1e9:.3g}",
                f"{work.bytes / 1e6:.3g}",
                "arithmetic" if operations > transfers else "memory",
                report.seconds(max(operations, transfers)),
                report.seconds(row[f"split_{part}"] * row["median_s"]),
                f"{row[f'split_{part}']:.1%}",
                *(f"{value:.2g}" for value in estimates.values()),
            ]
        )
    spent = row["split_overhead"]
    lines.append(["overhead", "", "", "", "", report.seconds(spent * row["median_s"]), f"{spent:.1%}", "", ""])
    return lines


def steps_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each layer, dtype and target."""
    lines = []
    cases = dict.fromkeys((row["layer"], row["dtype"], row["target_error"]) for row in rows)
    for layer, dtype, target in cases:
        case = {row["side"]: row for row in where(rows, layer=layer, dtype=dtype, target_error=target)}
        cells = []
        for side in (OURS, *RIVALS):
            row = case.get(side)
            mark = "" if row is None or row["reached"] else "†"
            cells.append("–" if row is None else f"{step_report.time_or_ratio(row)} ({row['evaluations']}){mark}")
        lines.append([f"{layer}, {dtype}, to {target:g}", *cells])
    return lines


def fastest_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each layer and target: each library in its fastest dtype."""
    best = step_report.fastest(rows)
    lines = []
    for layer, target in dict.fromkeys((row["layer"], row["target_error"]) for row in best):
        case = {row["library"]: row for row in where(best, layer=layer, target_error=target)}
        cells = []
        for library in (OURS, *RIVALS):
            row = case.get(library)
            time = "" if row is None else report.seconds(row["median_s"]) if library == OURS else report.ratio(row)
            cells.append("–" if row is None else f"{time} ({row['side'].partition(', ')[2] or row['dtype']})")
        lines.append([f"{layer}, to {target:g}", *cells])
    return lines


def sizes_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each size."""
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        case = {row["side"]: step_report.time_or_ratio(row) for row in where(rows, size=size)}
        lines.append([f"{size}²", *(case.get(side, "–") for side in (OURS, *RIVALS))])
    return lines


def memory_table(weights: Weights) -> list[list[str]]:
    """The peak of a step, in megabytes, for each of `MEMORY_CASES`."""
    cases = [problem(weights, size, batch, CPU) for batch, size in MEMORY_CASES]
    sides = (OURS, *RIVALS)
    return [[side, *(f"{peak_megabytes(given, side, 5):.0f} MB" for given in cases)] for side in sides]


@torch.no_grad()
def tolerance_table(batch: int) -> list[list[str]]:
    """A line for each tolerance: evaluations, PSNR and time of restoring with the shipped model."""
    x = photographs(128, batch)
    net = jfbfast.DEGrad.from_pretrained(MODEL).eval()
    d = net.blur(x) + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    lines = []
    for tol in (1e-1, 1e-2, 1e-3, 1e-4):
        net.solver = jfbfast.Anderson(tol=tol, max_iter=50)
        net(d)
        start = time.perf_counter()
        out = net(d)
        seconds = (time.perf_counter() - start) / batch
        psnr = -10 * torch.log10((out - x).square().mean((1, 2, 3)) / 4).mean()
        evaluations = net.solution.iterations.double().mean()
        lines.append([f"{tol:g}", f"{evaluations:.1f}", f"{psnr:.2f} dB", report.seconds(seconds)])
    return lines


@torch.no_grad()
def denoisers_table() -> list[list[str]]:
    """A line for each denoiser: weights, arithmetic and time of one evaluation for an image of 256 × 256 pixels."""
    d = torch.randn(1, 3, 256, 256)
    lines = []
    for name, layer, weights in (
        ("DnCNN, 17 × 64", "preconditioned", untrained(64, 17)),
        (f"U-Net of `{MODEL}`", "filtered", trained(MODEL)),
    ):
        given = Problem(weights, d, d, layer)
        net = model(given).eval()
        evaluate = prepared(net.layer, None, tol=1e-3)
        x = net.start(d)
        sampler = timed(lambda evaluate=evaluate, x=x: evaluate(x, d), CPU)
        sampler.sample()
        count = sum(p.numel() for p in weights.denoiser.parameters())
        seconds = report.seconds(median(sampler.sample() for _ in range(7)))
        lines.append([name, f"{count / 1e3:,.0f} k", f"{denoiser_work(given).operations / 1e9:.3g}", seconds])
    return lines


def ours(rows: Sequence[Row], layer: str, plan: step.Plan) -> Row:
    """Our step in float32 to the smallest error."""
    cells = {"experiment": "step", "side": OURS, "dtype": "float32", "target_error": plan.targets[-1]}
    return where(rows, layer=layer, **cells)[0]


def fill(page: str, name: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Replace the table between the marks of this name."""
    table = report.markdown_table(header, lines)
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"performance.md has no place for the table {name}")
    return pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


def main() -> None:
    """Measure, and write the page's tables, its picture and its data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    plan = QUICK if parser.parse_args().quick else PLAN
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    jfbfast.keep_freed_memory()
    console, busy = Console(width=100), machine.disturbance()
    peak = peaks()
    rows: list[Row] = []
    networks = {"preconditioned": untrained(64, 17), "filtered": trained(MODEL)}
    for layer, weights in networks.items():
        benchmark = step.Benchmark(replace(plan, cases=((layer, 64),), counts=(), sizes=()), weights, CPU, console)
        rows += benchmark.run()
        sized = step.Benchmark(plan, weights, CPU, console)
        sized.against_size(layer, ours(rows, layer, plan)["evaluations"], (OURS, *RIVALS))
        rows += sized.rows

    path = OUTPUT / "performance.md"
    page = path.read_text(encoding="utf-8")
    sides = ["", OURS, *RIVALS]
    steps = where(rows, experiment="step")
    page = fill(page, "steps", sides, steps_table(steps))
    page = fill(page, "fastest", sides, fastest_table(steps))
    for layer, weights in networks.items():
        row = ours(rows, layer, plan)
        given = problem(weights, 64, plan.batch, CPU, layer)
        head = ["part", "10⁹ operations", "MB", "bound by", "bound", "measured", "share", "H100, TF32, ms", "bf16, ms"]
        page = fill(page, f"parts {layer}", head, parts_table(row, given, peak))
        page = fill(page, f"sizes {layer}", sides, sizes_table(where(rows, experiment="size", layer=layer)))
    heads = [f"{batch} × 3 × {size}²" for batch, size in MEMORY_CASES]
    page = fill(page, "memory", ["", *heads], memory_table(networks["preconditioned"]))
    page = fill(page, "tolerance", ["tolerance", "evaluations", "PSNR", "an image"], tolerance_table(2))
    page = fill(page, "denoisers", ["", "weights", "10⁹ operations", "an evaluation"], denoisers_table())
    about = f"{machine.about(CPU)}; matrix products {peak[0] / 1e9:.0f} GFLOP/s, memory {peak[1] / 1e9:.0f} GB/s"
    note = f"{about}; batch {plan.batch}" + "".join(f"; {text}" for text in busy)
    page = fill(page, "machine", ["measured on"], [[note]])
    path.write_text(page, encoding="utf-8")

    made = step_report.figure([row for row in rows if row["experiment"] == "step" or row["layer"] == "preconditioned"])
    made.suptitle(about, fontsize=9)
    made.savefig(OUTPUT / "performance.jpg", dpi=80)
    report.write_csv(OUTPUT / "performance.csv", rows, significant=4)
    console.print(note)


if __name__ == "__main__":
    main()
