"""What the end-to-end benchmark restores: a network, a batch of photographs, the layers, and their fixed points."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jfbfast import RED, Anderson, DEGrad, DnCNN, GaussianBlur, Status
from jfbfast.imaging.quality import measure
from jfbfast.models.lipschitz import SpectralNormConv2d

LAYERS = ("preconditioned", "filtered", "paper")

_SHRINKAGE, _DEPARTURE = 0.8, 0.2  # D(x) = c(x − γN(x)) with γ‖∂N‖ = 0.2, so that ‖∂D‖ ≤ 0.96
_POWER_ITERATIONS = 300  # after which one more step leaves a spectral norm as it is
_REFERENCE = Anderson(tol=1e-8, max_iter=400)  # with ‖∂T‖ ≤ 0.995, an error of 2e-6


class Contraction(nn.Module):
    """D(x) = c(x − γ N(x)): a contraction around an untrained network, in place of a trained denoiser."""

    def __init__(self, network: nn.Module, departure: float) -> None:
        super().__init__()
        self.network = network
        self.departure = departure

    def forward(self, x: Tensor) -> Tensor:
        return _SHRINKAGE * torch.sub(x, self.network(x), alpha=self.departure)


@dataclass(frozen=True)
class Weights:
    """A denoiser and the operator that it goes with; zeros beyond the edge, as in the paper.

    Attributes:
        denoiser: D. Its batch norms keep their running statistics and its spectral norms have converged,
            so that every training step is the same step.
        weight: λ of RED.
    """

    denoiser: nn.Module
    weight: float
    kernel_size: int
    sigma: float
    noise: float


@dataclass(frozen=True)
class Problem:
    """One batch for the weights: images x and measurements d = A x + ν ε, (B, 3, size, size) in [−1, 1]."""

    weights: Weights
    x: Tensor
    d: Tensor

    def to(self, *target: Any) -> Problem:
        denoiser = copy.deepcopy(self.weights.denoiser).to(*target)
        return Problem(replace(self.weights, denoiser=denoiser), self.x.to(*target), self.d.to(*target))


def photographs(size: int, batch: int, seed: int = 0) -> Tensor:
    """Random crops of scikit-image's astronaut, (batch, 3, size, size) in [−1, 1]."""
    from skimage import data

    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(image.shape[-1] - size + 1, (batch, 2), generator=generator).tolist()
    return torch.stack([image[:, top : top + size, left : left + size] for top, left in corners])


def problem(weights: Weights, size: int, batch: int, device: torch.device) -> Problem:
    x = photographs(size, batch)
    white = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    d = measure(x, GaussianBlur(weights.kernel_size, weights.sigma), weights.noise, white)
    return Problem(weights, x, d).to(device)


def untrained(features: int, depth: int) -> Weights:
    """The paper's DnCNN as it is initialised, made a contraction: the layers have fixed points, and well-known ones."""
    x = photographs(32, 4)
    network = DnCNN(3, features, depth)
    for norm in _batch_norms(network):
        norm.momentum = 1.0
    with torch.no_grad():
        network(x)
    network.eval()
    denoiser = Contraction(network, _DEPARTURE / _jacobian_norm(network, x))
    return Weights(_settled(denoiser), weight=0.05, kernel_size=5, sigma=1.0, noise=0.01)


def trained(checkpoint: str) -> Weights:
    """The denoiser of a shipped model, or of a file of `jfbfast train` or `jfbfast demo`, with its λ and its blur.

    Raises:
        ValueError: neither, or one of another form than a `DEGrad` with `RED`, or for a range of measurements.
    """
    from jfbfast.models.pretrained import load_model

    model, config = load_model(checkpoint)
    if not (isinstance(model, DEGrad) and isinstance(model.regularizer, RED)):
        raise ValueError(f"checkpoint is of the form {config.form!r}; it takes 'filtered' or 'preconditioned'")
    if config.ranges is not None:
        raise ValueError(f"checkpoint is {checkpoint}, for a range of measurements; it takes one for a single setting")
    weight = float(model.regularizer.weight.detach())
    return Weights(_settled(model.regularizer.denoiser), weight, config.kernel_size, config.sigma, config.noise)


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether in train() the module couples the samples of a batch."""
    return bool(_batch_norms(module))


def _settled(denoiser: nn.Module) -> nn.Module:
    for norm in _batch_norms(denoiser):
        norm.momentum = 0.0
    for conv in denoiser.modules():
        if isinstance(conv, SpectralNormConv2d):
            conv.double()
            for _ in range(_POWER_ITERATIONS):
                conv.power_iteration()
            conv.float()
    return denoiser


def _jacobian_norm(network: nn.Module, x: Tensor, iterations: int = 10) -> float:
    """The largest singular value of ∂N at x, by power iterations on ∂Nᵀ∂N."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    norm = torch.tensor(1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")  # of torch.func.jvp itself
        for _ in range(iterations):
            image = torch.func.jvp(network, (x,), (v / v.norm(),))[1].detach()
            norm = image.norm()
            v = torch.func.vjp(network, x)[1](image)[0].detach()
    return float(norm)


def model(given: Problem, layer: str, **options: Any) -> DEGrad:
    """The DE-GRAD of that layer, with weights of its own; ``options`` as in `DEGrad`."""
    weights = given.weights
    denoiser = copy.deepcopy(weights.denoiser).to(memory_format=torch.channels_last)
    regularizer = RED(denoiser, weights.weight, "weight" if layer == "filtered" else None)
    form: Any = {} if layer == "paper" else {"preconditioner": "exact"}
    blur = GaussianBlur(weights.kernel_size, weights.sigma)
    return DEGrad(blur, regularizer, **form, **options).to(given.d.device, given.d.dtype)


@torch.no_grad()
def fixed_point(given: Problem, layer: str, batch_statistics: bool) -> Tensor | None:
    """x* of the layer in float64, or None where Anderson's method does not find it.

    Args:
        batch_statistics: of the map whose batch norms normalise by the batch at hand, of which the
            whole batch is one sample; else by their running statistics.
    """
    x0 = given.d
    for dtype, solver in ((torch.float32, Anderson(tol=1e-6, max_iter=100)), (torch.float64, _REFERENCE)):
        twin = model(given.to(dtype), layer).train(batch_statistics)
        d = given.d.to(dtype)
        x0 = x0.to(dtype)
        if batch_statistics:
            flat = _as_one_sample(twin, d)
            solution = solver.solve(flat, x0.reshape(1, -1))
        else:
            solution = solver.solve(twin.layer, x0, (d,))
        x0 = solution.value.view(d.shape)
    return x0 if bool((solution.status == Status.CONVERGED).all()) else None


def _as_one_sample(twin: DEGrad, d: Tensor) -> Any:
    return lambda x: twin.layer(x.view(d.shape), d).reshape(1, -1)
