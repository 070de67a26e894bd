"""`kernels`: each kernel against the pure-PyTorch path and against what users write or call today.

Every side computes in float32 on the same random data, which lie in the caches where they fit;
jfbfast is measured in bfloat16 too. A time covers everything from the user's call on: dispatch,
allocation of the result, arithmetic. On CUDA it is that of the device alone, of calls replayed from a
graph, but for a side that a graph cannot hold; the column ``clock`` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from jfbfast import backend
from jfbfast.backends import conv3x3 as winograd
from jfbfast.backends import reference
from jfbfast.operators.blur import GaussianBlur
from jfbfast.operators.tables import bands
from jfbfast.solvers import Anderson

from . import machine, rivals
from .report import OURS, OURS_BF16, Row, make_row, plot, tables, write_csv
from .timing import Measured, Sampler, between_evaluations, interleave, timed

_STEP_SIZE = 0.5
_STEPS = 6  # of Anderson's method with a full history, in one solve

Shape = tuple[int, int, int, int]
Sides = dict[str, Callable[[], Sampler]]


@dataclass(frozen=True)
class Plan:
    """What is measured: image shapes, radii of the blur, memories of Anderson's method, shapes of features.

    Attributes:
        features: of the convolution, to as many channels.
        seconds: for the rounds of one case.
        compiled_radius: the largest radius whose unrolled taps torch.compile gets; 31 take it a minute.
        triad_bytes: of the arrays by which the memory's bandwidth is measured.
    """

    shapes: tuple[Shape, ...]
    radii: tuple[int, ...]
    memories: tuple[int, ...]
    features: tuple[Shape, ...]
    seconds: float
    compiled_radius: int
    triad_bytes: int


FULL = Plan(
    shapes=(*((16, 3, n, n) for n in (32, 64, 128, 256)), (1, 3, 2048, 2048)),
    radii=(2, 4, 15),
    memories=(3, 5, 10),
    features=((16, 64, 64, 64), (16, 64, 128, 128), (16, 128, 64, 64), (16, 96, 32, 32)),
    seconds=3.0,
    compiled_radius=4,
    triad_bytes=3 << 28,
)
QUICK = Plan(
    shapes=((16, 3, 64, 64), (16, 3, 128, 128)),
    radii=(2,),
    memories=(5,),
    features=((16, 64, 64, 64),),
    seconds=2.0,
    compiled_radius=2,
    triad_bytes=3 << 27,
)


def table_bytes(shape: Shape, radius: int) -> int:
    """The float32 band tables of one operator: (H + W) rows of 2r + 1 weights."""
    return 4 * (shape[-2] + shape[-1]) * (2 * radius + 1)


def blur_bytes(shape: Shape, radius: int, itemsize: int) -> int:
    """x is read, A x written, and the tables of A are read."""
    return 2 * itemsize * torch.Size(shape).numel() + table_bytes(shape, radius)


def data_step_bytes(shape: Shape, radius: int, itemsize: int) -> int:
    """x, d and r are read, the result written, and the tables of A and Aᵀ are read."""
    return 4 * itemsize * torch.Size(shape).numel() + 2 * table_bytes(shape, radius)


def anderson_bytes(shape: Shape, memory: int, itemsize: int) -> int:
    """A step with a full history: the pass over the residuals, then the mix.

    x and f are read, the residual f − x is written and the m − 1 others are read; then the m images
    are read and the next x is written. A history in bfloat16 keeps m − 1 differences of images: the
    newest is written, from f and the image before it, and the others are read.
    """
    if itemsize == 2:
        per_pixel = (4 + 4 + 2 + 2 * (memory - 1)) + (4 + 4 + 2 + 2 * (memory - 2) + 4)
    else:
        per_pixel = (2 * memory + 3) * itemsize
    return per_pixel * torch.Size(shape).numel()


def conv3x3_bytes(shape: Shape, channels: int, itemsize: int) -> int:
    """x is read, the result of as many channels written, and the weight read."""
    return itemsize * (2 * torch.Size(shape).numel() + 9 * channels**2)


def conv3x3_flops(shape: Shape, channels: int) -> int:
    """Of the direct convolution; Winograd's F(4 × 4, 3 × 3) needs a quarter of them in its products."""
    return 18 * channels * torch.Size(shape).numel()


def _scaled(sampler: Sampler, factor: float) -> Sampler:
    return Sampler(sampler.clock, lambda: factor * sampler.sample())


def _bytes_of(kernel: str, shape: Shape, parameter: int, dtype: torch.dtype) -> int:
    count = {
        "blur": blur_bytes,
        "data step": data_step_bytes,
        "Anderson step": anderson_bytes,
        "conv3x3": conv3x3_bytes,
    }[kernel]
    return count(shape, parameter, dtype.itemsize)


def _images(shape: Shape, device: torch.device, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, device=device) for _ in range(count))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _compiled(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """The function compiled for these very shapes."""
    compiled = torch.compile(function, dynamic=False)
    compiled(*arguments)
    return lambda: compiled(*arguments)


def _floor(count: int, device: torch.device) -> Sides:
    """What no kernel can beat: the triad on as many bytes, and on a GPU the launch of a kernel."""
    sides: Sides = {"triad": lambda: timed(machine.triad(count, device), device)}
    if device.type == "cuda":
        one = torch.rand(1, device=device)
        sides["launch"] = lambda: timed(lambda: one.add_(1), device)
    return sides


def blur_sides(shape: Shape, radius: int, plan: Plan, device: torch.device, missing: set[str]) -> Sides:
    """A x."""
    (x,) = _images(shape, device, 1)
    half, last = x.bfloat16(), _channels_last(x)
    size, sigma = 2 * radius + 1, max(radius / 2, 1.0)
    blur = GaussianBlur(size, sigma)
    tables = bands(blur.taps, (shape[2], shape[3]), x.dtype, device, False)

    sides: Sides = {
        OURS: partial(timed, partial(blur, x), device),
        OURS_BF16: partial(timed, partial(blur, half), device),
        "PyTorch": partial(timed, partial(reference.blur, x, tables), device),
    }
    if radius <= plan.compiled_radius:
        sides["compiled"] = lambda: timed(_compiled(reference.blur, x, tables), device)
    for name, image, make in _users_blurs(x, last, missing):
        sides[name] = partial(timed, partial(make(size, sigma, image), image), device)
    return sides | _floor(blur_bytes(shape, radius, 4), device)


def data_step_sides(shape: Shape, radius: int, plan: Plan, device: torch.device, missing: set[str]) -> Sides:
    """x − η(Aᵀ(A x − d) + r)."""
    x, d, r = _images(shape, device, 3)
    half = x.bfloat16(), d.bfloat16(), r.bfloat16()
    last = _channels_last(x), _channels_last(d), _channels_last(r)
    size, sigma = 2 * radius + 1, max(radius / 2, 1.0)
    blur = GaussianBlur(size, sigma)
    step_size = torch.tensor(_STEP_SIZE, device=device)
    forward, adjoint = (bands(blur.taps, (shape[2], shape[3]), x.dtype, device, a) for a in (False, True))
    arguments = (x, d, r, step_size, forward, adjoint)

    sides: Sides = {
        OURS: partial(timed, partial(blur.gradient_step, x, d, r, step_size), device),
        OURS_BF16: partial(timed, partial(blur.gradient_step, *half, step_size), device),
        "PyTorch": partial(timed, partial(reference.gradient_step, *arguments), device),
    }
    if radius <= plan.compiled_radius:
        sides["compiled"] = lambda: timed(_compiled(reference.gradient_step, *arguments), device)
    for name, image, make in _users_blurs(x, last[0], missing):
        given = (x, d, r) if image is x else last
        call = partial(rivals.data_step, make(size, sigma, image), *given, _STEP_SIZE)
        sides[name] = partial(timed, call, device)
    return sides | _floor(data_step_bytes(shape, radius, 4), device)


def _users_blurs(
    x: Tensor, last: Tensor, missing: set[str]
) -> Iterator[tuple[str, Tensor, Callable[[int, float, Tensor], rivals.Blur]]]:
    """What users blur with: its name, its image and what makes it."""
    yield "conv2d", x, rivals.conv2d
    yield "conv2d NHWC", last, rivals.conv2d
    yield "conv2d separable", x, rivals.separable_conv2d
    if "kornia" not in missing:
        yield "kornia", x, rivals.kornia
    if "torchvision" not in missing:
        yield "torchvision", x, rivals.torchvision


def linear_map(x: Tensor) -> Callable[[Tensor], Tensor]:
    """T(x) = c ⊙ x + b with random c in [0, 0.95]: a contraction that costs one pass over x."""
    c, b = torch.rand_like(x) * 0.95, torch.randn_like(x)
    return lambda x: torch.addcmul(b, c, x)


def anderson_sides(shape: Shape, memory: int, plan: Plan, device: torch.device, missing: set[str]) -> Sides:
    """One step of Anderson's method with a full history, without the map, on one linear map.

    Each side is its whole solver, stopping rule included; torch.compile takes none of these loops.
    """
    (x0,) = _images(shape, device, 1)
    layer = linear_map(x0)
    max_iter = memory + _STEPS
    solver, half = (
        Anderson(tol=0.0, max_iter=max_iter, memory=memory, history_dtype=history) for history in (None, torch.bfloat16)
    )

    def pure(layer: rivals.Layer) -> None:
        with backend("reference"):
            solver.solve(layer, x0)

    def side(solve: Callable[[rivals.Layer], object]) -> Callable[[], Sampler]:
        return lambda: between_evaluations(solve, layer, device, first=memory - 1)

    sides: Sides = {
        OURS: side(lambda layer: solver.solve(layer, x0)),
        OURS_BF16: side(lambda layer: half.solve(layer, x0)),  # the history alone
        "PyTorch": side(pure),
        "published loop": side(lambda layer: rivals.gilton_anderson(layer, x0, memory, max_iter)),
    }
    if "torchdeq" not in missing:
        sides["TorchDEQ"] = side(lambda layer: rivals.torchdeq_anderson(layer, x0, memory, max_iter))
    if "deepinv" not in missing:
        sides["deepinv"] = side(lambda layer: rivals.deepinv_anderson(layer, x0, memory, max_iter))
    sides["the map"] = lambda: timed(lambda: layer(x0), device)
    return sides | _floor(anderson_bytes(shape, memory, 4), device)


def conv3x3_sides(shape: Shape, channels: int, plan: Plan, device: torch.device, missing: set[str]) -> Sides:
    """ReLU(weight ∗ x + bias) from and to as many channels, with the weight transformed before, as a solve has it."""
    x = _channels_last(torch.randn(shape, device=device))
    weight = _channels_last(torch.randn(channels, channels, 3, 3, device=device) / (9 * channels) ** 0.5)
    bias = torch.randn(channels, device=device)
    transformed = winograd.transformed_weight(weight)
    half = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    planar = x.contiguous(), weight.contiguous()
    side = 1024 if device.type == "cpu" else 8192  # a GPU is full with that
    a, b = torch.randn(2, side, side, device=device)

    sides: Sides = {
        OURS: lambda: timed(lambda: winograd.conv3x3(x, weight, bias, True, transformed), device),
        f"{OURS} with its transform": lambda: timed(lambda: winograd.conv3x3(x, weight, bias, True), device),
        "conv2d NHWC": lambda: timed(lambda: reference.conv3x3(x, weight, bias, True), device),
        "conv2d NCHW": lambda: timed(lambda: reference.conv3x3(*planar, bias, True), device),
        "conv2d bf16": lambda: timed(lambda: reference.conv3x3(*half, True), device),
        "direct at peak": lambda: _scaled(timed(lambda: a @ b, device), conv3x3_flops(shape, channels) / (2 * side**3)),
    }
    return sides | _floor(conv3x3_bytes(shape, channels, 4), device)


_KERNELS: Mapping[str, Callable[[Shape, int, Plan, torch.device, set[str]], Sides]] = {
    "blur": blur_sides,
    "data step": data_step_sides,
    "Anderson step": anderson_sides,
    "conv3x3": conv3x3_sides,
}


def _cases(plan: Plan) -> Iterator[tuple[str, int, Shape]]:
    """Each kernel with its parameter and the shape of its images."""
    for kernel, parameters in (("blur", plan.radii), ("data step", plan.radii), ("Anderson step", plan.memories)):
        yield from ((kernel, parameter, shape) for parameter in parameters for shape in plan.shapes)
    yield from (("conv3x3", shape[1], shape) for shape in plan.features)


@torch.no_grad()
def measure(plan: Plan, device: torch.device, console: Console) -> list[Row]:
    """All cases of the plan, one after another; the memory's bandwidth is taken before, between and after."""
    missing = set()
    for name in ("kornia", "torchvision", "torchdeq", "deepinv"):
        if reason := rivals.quiet_import(name):
            console.print(f"{reason}; it is left out", highlight=False)
            missing.add(name)

    triads = machine.bandwidth_samples(plan.triad_bytes, device)
    found: list[tuple[str, Shape, int, dict[str, Measured]]] = []
    before = None
    for kernel, parameter, shape in _cases(plan):
        if before not in (None, kernel):
            triads += machine.bandwidth_samples(plan.triad_bytes, device)
        before = kernel
        case = f"{kernel}, {'×'.join(map(str, shape))}, {parameter}"
        with console.status(case):
            torch.compiler.reset()  # else the shapes of earlier cases make it compile a general one
            sides = _KERNELS[kernel](shape, parameter, plan, device, missing)
            say = partial(console.print, f"{case}:", highlight=False)
            found.append((kernel, shape, parameter, interleave(sides, plan.seconds, tuple(sides)[:1], say)))
    triads += machine.bandwidth_samples(plan.triad_bytes, device)

    about, bandwidth = machine.describe(device), machine.bandwidth(triads)
    rows = []
    for kernel, shape, parameter, measured in found:
        for side, samples in measured.items():
            dtype = torch.bfloat16 if side.endswith("bf16") else torch.float32
            count = _bytes_of(kernel, shape, parameter, dtype)
            rows.append(
                make_row(kernel, shape, parameter, side, dtype, count, samples, measured[OURS], about, bandwidth)
            )
    return rows


def run(out: Path, quick: bool, console: Console, plan: Plan | None = None) -> None:
    """Measure and write kernels.csv and kernels.png; ``plan`` in place of the full or the quick one."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warning = machine.disturbance()
    rows = measure(plan or (QUICK if quick else FULL), device, console)
    for table in tables(rows):
        console.print(table)
    if warning:
        console.print(f"[yellow]{warning}[/]", highlight=False)
    csv, png = out / "kernels.csv", out / "kernels.png"
    write_csv(rows, csv)
    plot(rows, png)
    console.print(f"Every side of every case: {csv}\nPicture: {png}", highlight=False)
