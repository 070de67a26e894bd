"""What the benchmark `step` restores: a network, a batch of photographs, the layer, and its fixed point."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jfbfast import RED, Anderson, DEGrad, DnCNN, GaussianBlur, Status
from jfbfast.imaging.quality import measure
from jfbfast.models.lipschitz import SpectralNormConv2d
from jfbfast.models.pretrained import load_model
from jfbfast.spectrum import operator_norm

LAYERS = ("preconditioned", "filtered", "paper")

_SHRINKAGE, _DEPARTURE = 0.8, 0.2  # D(x) = c(x − γN(x)) with γ‖∂N‖ = 0.2, so that ‖∂D‖ ≤ 0.96
_POWER_ITERATIONS = 300  # enough that one more does not change a spectral norm
_REFERENCE = Anderson(tol=1e-7, max_iter=400)  # with ‖∂T‖ ≤ 0.995, an error of at most 2e-5


class Contraction(nn.Module):
    """D(x) = c(x − γ N(x)): makes an untrained network a contraction, to stand for a trained denoiser."""

    def __init__(self, network: nn.Module, departure: float) -> None:
        super().__init__()
        self.network = network
        self.departure = departure

    def forward(self, x: Tensor) -> Tensor:
        return _SHRINKAGE * torch.sub(x, self.network(x), alpha=self.departure)


@dataclass(frozen=True)
class Weights:
    """A denoiser and the blur that it was made for; the blur pads with zeros, as in the paper.

    The denoiser's batch norms keep their running statistics and its spectral norms have converged, so that all
    training steps are equal.
    """

    denoiser: nn.Module
    weight: float  # λ of RED
    kernel_size: int  # of the blur in pixels
    sigma: float  # of the blur in pixels
    noise: float  # standard deviation on [−1, 1]


@dataclass(frozen=True)
class Problem:
    """One batch to restore, and the layer that restores it."""

    weights: Weights
    x: Tensor  # images (B, 3, size, size) in [−1, 1]
    d: Tensor  # measurements A x + ν ε, (B, 3, size, size)
    layer: str = "preconditioned"  # one of `LAYERS`
    half: bool = False  # whether the denoiser runs in bfloat16, by autocast

    def to(self, *target: Any) -> Problem:
        """The problem on another device or in another dtype, with a copy of the denoiser."""
        weights = replace(self.weights, denoiser=copy.deepcopy(self.weights.denoiser).to(*target))
        return replace(self, weights=weights, x=self.x.to(*target), d=self.d.to(*target))

    def autocast(self) -> torch.autocast:
        """The precision in which the denoiser runs."""
        return torch.autocast(self.d.device.type, torch.bfloat16, enabled=self.half)


def photographs(size: int, batch: int) -> Tensor:
    """Random crops of scikit-image's astronaut, (batch, 3, size, size) in [−1, 1]."""
    from skimage import data

    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 127.5 - 1
    corners = torch.randint(image.shape[-1] - size + 1, (batch, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.stack([image[:, top : top + size, left : left + size] for top, left in corners])


def problem(
    weights: Weights, size: int, batch: int, device: torch.device, layer: str = "preconditioned", half: bool = False
) -> Problem:
    """Blur ``batch`` crops of ``size`` × ``size`` pixels and add noise; equal arguments give equal problems."""
    x = photographs(size, batch)
    white = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    d = measure(x, GaussianBlur(weights.kernel_size, weights.sigma), weights.noise, white)
    return Problem(weights, x, d, layer, half).to(device)


def untrained(features: int, depth: int) -> Weights:
    """The paper's DnCNN at initialisation, made a contraction, so that every layer has a fixed point."""
    x = photographs(32, 4)
    network = DnCNN(3, features, depth)
    for norm in batch_norms(network):
        norm.momentum = 1.0
    with torch.no_grad():
        network(x)  # sets the running statistics
    network.eval()
    denoiser = Contraction(network, _DEPARTURE / float(operator_norm(network, x, steps=10).max()))
    return Weights(_settled(denoiser), weight=0.05, kernel_size=5, sigma=1.0, noise=0.01)


def trained(checkpoint: str) -> Weights:
    """The denoiser, λ and blur of a shipped model or a file; ValueError for one that is no DE-GRAD of ours."""
    model, config = load_model(checkpoint)
    if not (isinstance(model, DEGrad) and isinstance(model.regularizer, RED)):
        raise ValueError(f"checkpoint is of the form {config.form!r}; it takes 'filtered' or 'preconditioned'")
    if config.form == "universal" or config.kernel_size is None:
        raise ValueError(f"checkpoint is {checkpoint}, for many measurements; it takes one for a single setting")
    weight = float(model.regularizer.weight.detach())
    return Weights(_settled(model.regularizer.denoiser), weight, config.kernel_size, config.sigma, config.noise)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Those layers that couple the samples of a batch in train()."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def _settled(denoiser: nn.Module) -> nn.Module:
    """Freeze the running statistics and let the spectral norms converge."""
    for norm in batch_norms(denoiser):
        norm.momentum = 0.0
    for conv in denoiser.modules():
        if isinstance(conv, SpectralNormConv2d):
            conv.double()
            for _ in range(_POWER_ITERATIONS):
                conv.power_iteration()
            conv.float()
    return denoiser


def model(given: Problem, **options: Any) -> DEGrad:
    """A DE-GRAD with the problem's layer and a copy of its weights; ``options`` as in `DEGrad`."""
    weights = given.weights
    denoiser = copy.deepcopy(weights.denoiser).to(memory_format=torch.channels_last)
    regularizer = RED(denoiser, weights.weight, "weight" if given.layer == "filtered" else None)
    form: Any = {} if given.layer == "paper" else {"preconditioner": "exact"}
    blur = GaussianBlur(weights.kernel_size, weights.sigma)
    return DEGrad(blur, regularizer, **form, **options).to(given.d.device, given.d.dtype)


@torch.no_grad()
def fixed_point(given: Problem, batch_statistics: bool) -> Tensor | None:
    """Find the layer's fixed point x* in float64, or None if Anderson's method does not converge.

    With ``batch_statistics``, batch norms normalise by the current batch, which then is solved as one sample.
    """
    x0 = given.d
    for dtype, solver in ((torch.float32, Anderson(tol=1e-6, max_iter=100)), (torch.float64, _REFERENCE)):
        twin = model(given.to(dtype)).train(batch_statistics)
        d, x0 = given.d.to(dtype), x0.to(dtype)
        if batch_statistics:
            solution = solver.solve(partial(_as_one_sample, twin, d), x0.reshape(1, -1))
        else:
            solution = solver.solve(twin.layer, x0, (d,))
        x0 = solution.value.view(d.shape)
    return x0 if bool((solution.status == Status.CONVERGED).all()) else None


def _as_one_sample(twin: DEGrad, d: Tensor, x: Tensor) -> Tensor:
    return twin.layer(x.view(d.shape), d).reshape(1, -1)
