"""DE-ADMM: the implicit network whose layer is an iteration of ADMM with a network in place of a proximal operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jfbfast.models.data_step import data_step, inputs_of_step, tikhonov_start
from jfbfast.models.deprox import check_denoiser, denoised, solvable
from jfbfast.models.implicit_network import ImplicitNetwork
from jfbfast.models.red import ToldNoise, log_parameter
from jfbfast.operators.data_fidelity import as_data_fidelity, check_quadratic
from jfbfast.operators.iterative import LinearOperator


class DEADMM(ToldNoise, ImplicitNetwork):
    """The fixed point of ADMM with a trained network D (Gilton, Ongie, Willett, 2021, DE-ADMM).

    ADMM alternates z = P(Aᵀd + λ(x − u)), x = D(z + u) and u ← u + z − x, with P = (AᵀA + λI)⁻¹. The single state
    v = x − u carries it from one iteration to the next (Douglas–Rachford):

        T(v) = v + D(2z − v) − z,   z = P(Aᵀd + λv).

    At a fixed point z = D(2z − v), and z is the restored image. ``solution`` and ``x0`` are about v.

    Args:
        blur: A, as in `DEGrad`.
        denoiser: D, a map of images to images of the same shape, without an injection.
        data_fidelity: f, as in `DEGrad`: None for `LeastSquares`, or `WeightedLeastSquares`.
        weight: λ > 0, the start of a learnable parameter.
        noise, learn_noise: σ > 0 that D(x, σ) is told, in the units of the images, as in `RED`; None for a D that takes
            images only.
        options: averaging, solver, gradient, solve_dtype, compile_solve and cuda_graph of `DEGrad`.

    Raises:
        ValueError: a value out of its range, a network that is not a denoiser, or another data fidelity.
        TypeError: as for `DEGrad`.

    Example:
        >>> import torch, jfbfast
        >>> blur = jfbfast.GaussianBlur(kernel_size=5, sigma=1.0)
        >>> model = jfbfast.DEADMM(blur, jfbfast.NonexpansiveDenoiser(channels=1, features=4, depth=2))
        >>> d = blur(torch.rand(2, 1, 16, 16))
        >>> model(d).square().mean().backward()
        >>> model.solution.value.shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(
        self,
        blur: LinearOperator | None,
        denoiser: nn.Module,
        *,
        data_fidelity: Any = None,
        weight: float = 0.05,
        noise: float | None = None,
        learn_noise: bool = False,
        **options: Any,
    ) -> None:
        check_denoiser(denoiser)
        fidelity = as_data_fidelity(data_fidelity)
        check_quadratic("DE-ADMM", fidelity)
        super().__init__(solvable("blur", blur), **options)
        self.denoiser = denoiser
        self.set_noise(noise, learn_noise)
        self.data_fidelity = fidelity
        self.log_weight = log_parameter("weight", weight)

    @property
    def weight(self) -> Tensor:
        """λ, a tensor of shape ()."""
        return self.log_weight.exp()

    def injected(self, d: Tensor) -> tuple[Tensor, ...]:
        """What the step on the data needs at every evaluation."""
        return inputs_of_step(self, d)

    def step(self, x: Tensor, d: Tensor, *injected: Tensor) -> Tensor:
        """T(v; d) for the states v and the measurements d of one batch; ``injected`` is what `injected` returned."""
        z = self.image(x, d, *injected)
        return x + denoised(self, 2 * z - x) - z

    def image(self, state: Tensor, d: Tensor, *injected: Tensor) -> Tensor:
        """z = P(Aᵀd + λv), the image of the state v."""
        return data_step(self, state, d, injected or self.injected(d))

    @torch.no_grad()
    def start(self, d: Tensor, *injected: Tensor) -> Tensor:
        """The default start of a solve: P Aᵀd."""
        return tikhonov_start(self, d, injected or self.injected(d))
