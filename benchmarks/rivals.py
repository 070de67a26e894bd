"""The same operations as users write or call them today: blurs, the data step, Anderson's method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast.backends.reference import gaussian_taps

Blur = Callable[[Tensor], Tensor]
Layer = Callable[[Tensor], Tensor]

LAM = 1e-4  # what the published Anderson loops add to the diagonal of the Gram matrix


def conv2d(kernel_size: int, sigma: float, x: Tensor) -> Blur:
    """Depthwise convolution with the k × k Gaussian, for images like x; the weight is channels-last if x is."""
    channels = x.shape[1]
    taps = torch.tensor(gaussian_taps(kernel_size, sigma), dtype=x.dtype, device=x.device)
    weight = torch.outer(taps, taps).expand(channels, 1, -1, -1)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    weight = weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return lambda x: F.conv2d(x, weight, padding=kernel_size // 2, groups=channels)


def separable_conv2d(kernel_size: int, sigma: float, x: Tensor) -> Blur:
    """Two depthwise convolutions, with kernels of k × 1 and 1 × k."""
    channels, radius = x.shape[1], kernel_size // 2
    taps = torch.tensor(gaussian_taps(kernel_size, sigma), dtype=x.dtype, device=x.device)
    columns = taps[:, None].expand(channels, 1, -1, -1).contiguous()
    rows = taps.expand(channels, 1, 1, -1).contiguous()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, columns, padding=(radius, 0), groups=channels)
        return F.conv2d(x, rows, padding=(0, radius), groups=channels)

    return blur


def kornia(kernel_size: int, sigma: float, x: Tensor) -> Blur:
    """`kornia.filters.gaussian_blur2d` with zero padding."""
    from kornia.filters import gaussian_blur2d

    size, sigmas = (kernel_size, kernel_size), (sigma, sigma)
    return lambda x: gaussian_blur2d(x, size, sigmas, border_type="constant")


def torchvision(kernel_size: int, sigma: float, x: Tensor) -> Blur:
    """`torchvision.transforms.functional.gaussian_blur`, which always pads by reflection."""
    from torchvision.transforms.functional import gaussian_blur

    return lambda x: gaussian_blur(x, [kernel_size, kernel_size], [sigma, sigma])


def data_step(blur: Blur, x: Tensor, d: Tensor, r: Tensor, step_size: float) -> Tensor:
    """x − η(Aᵀ(A x − d) + r), with Aᵀ = A, which holds for a Gaussian with zero padding."""
    return x - step_size * (blur(blur(x) - d) + r)


def gilton_anderson(layer: Layer, x0: Tensor, memory: int, max_iter: int, tol: float = 0.0) -> Tensor:
    """The batched Anderson loop of the deep-equilibrium literature (Gilton, Ongie and Willett, 2021).

    It keeps the whole history, (B, m, N). Each step computes the whole Gram matrix GGᵀ + λI again and borders it
    with the constraint Σ αᵢ = 1. The loop ends after ``max_iter`` evaluations of the layer; from the fourth on, also
    once the batch's largest change of an iterate is below ``tol`` times its largest iterate.
    """
    batch, size = x0.shape[0], x0[0].numel()
    xs = x0.new_zeros(batch, memory, size)
    fs = torch.zeros_like(xs)
    bordered = x0.new_zeros(batch, memory + 1, memory + 1)
    bordered[:, 0, 1:] = bordered[:, 1:, 0] = 1
    unit = x0.new_zeros(batch, memory + 1, 1)
    unit[:, 0] = 1

    x = previous = x0
    for k in range(max_iter):
        f = layer(x)
        change, largest = (each.flatten(1).norm(dim=1).max() for each in (x - previous, x))
        if (change / largest).item() < tol and k > 2:
            break
        previous = x
        xs[:, k % memory], fs[:, k % memory] = x.reshape(batch, -1), f.reshape(batch, -1)
        n = min(k + 1, memory)
        g = fs[:, :n] - xs[:, :n]
        gram = torch.bmm(g, g.transpose(1, 2)) + LAM * torch.eye(n, dtype=x.dtype, device=x.device)
        bordered[:, 1 : n + 1, 1 : n + 1] = gram
        alpha = torch.linalg.solve(bordered[:, : n + 1, : n + 1], unit[:, : n + 1])[:, 1:, 0]
        x = torch.bmm(alpha[:, None], fs[:, :n]).view_as(x0)
    return x


def torchdeq_anderson(layer: Layer, x0: Tensor, memory: int, max_iter: int) -> Tensor:
    """`torchdeq.solver.anderson.anderson_solver`."""
    anderson_solver = import_module("torchdeq.solver.anderson").anderson_solver
    return anderson_solver(layer, x0, max_iter=max_iter, tol=0.0, m=memory, lam=LAM)[0]


def deepinv_anderson(layer: Layer, x0: Tensor, memory: int, max_iter: int) -> Tensor:
    """`deepinv.optim.fixed_point.FixedPoint` with its Anderson acceleration, undamped."""
    optim = import_module("deepinv.optim")
    fixed_point, config = optim.fixed_point.FixedPoint, optim.optimizers.AndersonAccelerationConfig

    class Iterator(torch.nn.Module):
        cost_fn = None

        def forward(self, X: dict[str, tuple[Tensor, ...]], *_: object) -> dict[str, tuple[Tensor, ...] | None]:
            return {"est": (layer(X["est"][0]),), "cost": None}

    solver = fixed_point(
        iterator=Iterator(),
        init_iterate_fn=lambda *_, **__: {"est": (x0,), "cost": None},
        max_iter=max_iter,
        early_stop=False,
        anderson_acceleration_config=config(memory, beta=1.0, eps=LAM),
    )
    return solver()[0]["est"][0]


def missing(packages: Iterable[str], say: Callable[[str], object]) -> set[str]:
    """Import the packages before anything is timed, without their warnings; report and return those that fail."""
    failed = set()
    for name in packages:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module(name)
        except ImportError as error:
            reason = "is not installed" if error.name == name else f"does not load: {error}"
            say(f"{name} {reason}; it is left out")
            failed.add(name)
    return failed
