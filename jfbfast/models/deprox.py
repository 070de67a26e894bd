"""DE-PROX: the implicit network whose layer is a gradient step on the data, followed by a denoiser."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from jfbfast.models.data_step import data_step, inputs_of_step, tikhonov_start
from jfbfast.models.implicit_network import ImplicitNetwork, check_operator
from jfbfast.models.red import ToldNoise, log_parameter
from jfbfast.operators.data_fidelity import as_data_fidelity, check_quadratic
from jfbfast.operators.iterative import LinearOperator, linear_operator, with_solve


class DEProx(ToldNoise, ImplicitNetwork):
    """The fixed point of T(x) = D(x − ηAᵀ(A x − d)), with a trained network D (Gilton, Ongie, Willett, 2021, DE-PROX).

    With ``preconditioner="exact"`` the step on the data is its proximal operator, T(x) = D(P(Aᵀd + λx)) with
    P = (AᵀA + λI)⁻¹, which converges in fewer evaluations where A has small singular values.

    Args:
        blur: A, as in `DEGrad`.
        denoiser: D, a map of images to images of the same shape, without an injection.
        data_fidelity: f, as in `DEGrad`: T(x) = D(x − η∇f(x; d)).
        step_size: η > 0, the start of a learnable parameter; the preconditioned layer has none.
        preconditioner: None, or "exact".
        weight: λ > 0 of the preconditioned layer, the start of a learnable parameter; None for 0.05.
        noise, learn_noise: σ > 0 that D(x, σ) is told, in the units of the images, as in `RED`; None for a D that takes
            images only.
        options: averaging, solver, gradient, solve_dtype, compile_solve and cuda_graph of `DEGrad`.

    Raises:
        ValueError: a value out of its range, or a network that is not a denoiser.
        TypeError: as for `DEGrad`.

    Example:
        >>> import torch, jfbfast
        >>> blur = jfbfast.GaussianBlur(kernel_size=5, sigma=1.0)
        >>> model = jfbfast.DEProx(blur, jfbfast.NonexpansiveDenoiser(channels=1, features=4, depth=2))
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
        step_size: float = 1.0,
        preconditioner: Literal["exact"] | None = None,
        weight: float | None = None,
        noise: float | None = None,
        learn_noise: bool = False,
        **options: Any,
    ) -> None:
        if preconditioner not in (None, "exact"):
            raise ValueError(f"preconditioner is {preconditioner!r}; it takes None or 'exact'")
        if preconditioner and step_size != 1.0:
            raise ValueError(f"step_size is {step_size}; the preconditioned layer takes none")
        if weight is not None and not preconditioner:
            raise ValueError(f"weight is {weight}; only preconditioner='exact' takes one")
        check_denoiser(denoiser)
        fidelity = as_data_fidelity(data_fidelity)
        if preconditioner:
            check_quadratic("the preconditioned layer", fidelity)
        super().__init__(solvable("blur", blur) if preconditioner else blur, **options)
        self.denoiser = denoiser
        self.set_noise(noise, learn_noise)
        self.data_fidelity = fidelity
        self.preconditioner = preconditioner
        self.log_step_size = None if preconditioner else log_parameter("step_size", step_size)
        self.log_weight = log_parameter("weight", 0.05 if weight is None else weight) if preconditioner else None

    @property
    def step_size(self) -> Tensor | None:
        """η, a tensor of shape (); None for a preconditioned layer."""
        return None if self.log_step_size is None else self.log_step_size.exp()

    @property
    def weight(self) -> Tensor | None:
        """λ, a tensor of shape (); None without a preconditioner."""
        return None if self.log_weight is None else self.log_weight.exp()

    def injected(self, d: Tensor) -> tuple[Tensor, ...]:
        """What the step on the data needs at every evaluation."""
        return inputs_of_step(self, d) if self.preconditioner else self.data_fidelity.inputs(d)

    def step(self, x: Tensor, d: Tensor, *injected: Tensor) -> Tensor:
        """T(x; d) for the images x and the measurements d of one batch; ``injected`` is what `injected` returned."""
        own = injected or self.injected(d)
        if self.step_size is None:
            return denoised(self, data_step(self, x, d, own))
        return denoised(self, self.data_fidelity.descend(self.blur, x, d, None, self.step_size, *own))

    @torch.no_grad()
    def start(self, d: Tensor, *injected: Tensor) -> Tensor:
        """The default start of a solve: Aᵀd, or P Aᵀd for a preconditioned layer."""
        own = injected or self.injected(d)
        if self.preconditioner:
            return tikhonov_start(self, d, own)
        check_operator(self.blur)
        return self.blur.adjoint(self.data_fidelity.measured(d, *own))


def check_denoiser(denoiser: Any) -> None:
    """Raise TypeError or ValueError unless ``denoiser`` is a module from images to images of the same kind."""
    if not callable(denoiser) or isinstance(denoiser, type):
        raise TypeError(f"denoiser is {denoiser!r}; it takes a module")
    kind = type(denoiser).__name__
    if getattr(denoiser, "is_denoiser", True) is False:
        raise ValueError(f"denoiser is a {kind} that is R, the image less its denoised form; it takes residual=True")
    if getattr(denoiser, "injection", False):
        raise ValueError(f"denoiser is a {kind} with injection, which takes two images; this layer gives it one")


def denoised(network: ToldNoise, x: Tensor) -> Tensor:
    """D(x), or D(x, σ), in the shape and dtype of x; raises ValueError for a denoiser that changes the shape."""
    out: Tensor = network.denoiser(x, *network.told(x))
    if out.shape != x.shape:
        raise ValueError(
            f"denoiser maps shape {tuple(x.shape)} to {tuple(out.shape)}; it takes one that keeps the shape"
        )
    return out.to(x.dtype)


def solvable(name: str, operator: Any) -> Any:
    """The operator with a ``solve``: its own, or an `IterativeOperator` around it; None for None."""
    return None if operator is None else with_solve(linear_operator(name, operator))
