"""The parts of `jfbfast bench gpu` that check results: against the CPU, by the tests, and by NVIDIA's tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import torch
import torch.nn.functional as F

import jfbfast
from jfbfast import kernels
from jfbfast.backends import cuda, graphs, reference

from .. import machine
from ..problem import model, problem, untrained
from .findings import CPU, DEVICE, OUT, attempt, relative, say, synchronize
from .fused import fused_convolutions

_TOOL_SECONDS = 150  # for each tool of compute-sanitizer
_OURS = "gradient_kernel|blur_kernel|append_full|update_samples|mix_full"  # names of our kernels


def versions() -> None:
    """The machine, its driver and the packages."""
    found = {"python": sys.version.split()[0], **machine.describe(DEVICE)}
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,memory.total,clocks.max.sm,power.limit"
        command = ["nvidia-smi", query, "--format=csv,noheader", "-i", "0"]
        found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    say("machine", **found)
    jfbfast.show_config()


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
        attempt("agreement", f"{layer} layer, CUDA graph", partial(same, layer, cuda_graph=True))
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
    def changed_weights() -> dict[str, Any]:
        """Graphs of a solve follow the weights and the measurement."""
        given = problem(weights, 16 if CPU else 40, 4, DEVICE)
        eager, captured = (model(given, cuda_graph=graph).eval() for graph in (False, True))
        errors = []
        for k in range(3):
            for net in (eager, captured):
                for parameter in net.regularizer.denoiser.parameters():
                    parameter.mul_(1 - 0.05 * k)
            errors.append(relative(captured(given.d * (1 - 0.2 * k)), eager(given.d * (1 - 0.2 * k))))
        return {"ok": max(errors) <= 1e-5, "error": max(errors), "graphs": graphs.describe()}

    attempt("agreement", "CUDA graphs, changed weights", changed_weights)

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
    attempt("agreement", "fused convolutions", partial(fused_convolutions, DEVICE))


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
            state = cuda.AndersonSolve(x, tol=1e-4, memory=memory, history_dtype=history)
            for _ in range(14):
                state.step(x, q * x + b)
            residual = state.finish()[1]
            say("sanitize", name=f"Anderson {memory} {size} {history}", ok=bool(residual.isfinite().all()))


def _root() -> Path | None:
    """The repository, if it is the working directory or holds the package: it has the tests."""
    for folder in (Path.cwd(), Path(jfbfast.__file__).parents[1]):
        if (folder / "tests/backends/test_triton_gpu.py").exists():
            return folder
    return None


def _sanitizers(folder: Path) -> dict[str, subprocess.Popen[bytes]]:
    """Start compute-sanitizer's tools on our kernels, which run beside the tests and so take no time of their own."""
    if shutil.which("compute-sanitizer") is None:
        say("tests", name="compute-sanitizer", left_out="it is not on the PATH")
        return {}
    # Without torch's cache each tensor is its own allocation, so that an access past its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sys.executable, "-m", "jfbfast.benchmarks.gpu.parts", "sanitize"]
    started = {}
    for tool in ("memcheck", "racecheck", "initcheck"):
        with (folder / tool).open("wb") as output:
            started[tool] = subprocess.Popen(
                ["compute-sanitizer", "--tool", tool, "--print-limit", "20", *command],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
    return started


def tests() -> None:
    """Run pytest on those tests that need a GPU, and compute-sanitizer beside it."""
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        started = _sanitizers(folder)
        attempt("tests", "pytest", partial(_pytest, folder / "junit.xml"))
        for tool, process in started.items():
            try:
                process.wait(_TOOL_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            text = (folder / tool).read_text(errors="replace")
            _keep(tool, text)
            summary = [line for line in text.splitlines() if "SUMMARY" in line]
            clean = bool(summary) and all(" 0 errors" in line or " 0 hazards" in line for line in summary)
            say("tests", name=f"compute-sanitizer {tool}", ok=clean, found=" ".join(summary) or "no summary")


def _pytest(report: Path) -> dict[str, Any]:
    root = _root()
    if root is None:
        return {"left_out": "the tests are in the repository; run this in its folder"}
    command = [sys.executable, "-m", "pytest", "tests/backends", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
    command += ["-q", "-rfE", "--tb", "short", "--junitxml", str(report)]
    for module, options in (("pytest", []), ("xdist", ["-n", "8"])):
        if subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0:
            command += options
        elif module == "pytest":
            return {"left_out": "pytest is not installed"}
    status = subprocess.run(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "2"}).returncode
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    for case in failed:
        say("tests", name=f"{case.get('classname')}::{case.get('name')}", ok=False)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"ok": status == 0, "tests": len(cases), "failed": len(failed), "skipped": skipped}


def counters() -> None:
    """The hardware's counters of each of our kernels, by ncu; they go to tools.txt."""
    if shutil.which("ncu") is None:
        say("counters", name="ncu", left_out="it is not on the PATH")
        return
    sections = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats")
    command = ["ncu", "--clock-control", "none", "--target-processes", "all", "-k", f"regex:{_OURS}", "-c", "12"]
    command += [word for section in sections for word in ("--section", section)]
    command += [sys.executable, "-m", "jfbfast.benchmarks.gpu.parts", "sanitize"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = done.stdout.decode(errors="replace")
    _keep("ncu", text)
    wanted = ("_kernel", "_full", "update_samples", "Duration", "Memory Throughput", "Achieved Occupancy")
    print(*[line for line in text.splitlines() if any(word in line for word in wanted)][:60], sep="\n")
    say("counters", name="ncu", ok=done.returncode == 0)


def _keep(tool: str, text: str) -> None:
    with (OUT / "tools.txt").open("a", encoding="utf-8") as file:
        file.write(f"##### {tool}\n{text}\n")
