"""Data fidelities: how far A x is from the measurement d, for each kind of noise. `DEGrad` takes one.

Example:
    >>> import torch, jfbfast
    >>> _ = torch.manual_seed(0)
    >>> blur = jfbfast.GaussianBlur(padding_mode="reflect")
    >>> counts = torch.poisson(100 * (blur(torch.rand(1, 1, 8, 8)) + 1))  # 100 photons where x = 0
    >>> d = counts / 100 - 1  # in the units of A x
    >>> poisson = jfbfast.data_fidelity.Poisson(gain=1 / 100, background=1.0)
    >>> red = jfbfast.RED(blur, weight=100.0)  # a blur as denoiser, for a short example
    >>> restored = jfbfast.DEGrad(blur, red, step_size=0.003, data_fidelity=poisson)(d)
    >>> restored.shape
    torch.Size([1, 1, 8, 8])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.operators.iterative import IterativeOperator, gradient_step
from jfbfast.operators.physics import PhysicsOperator

__all__ = ["DataFidelity", "LeastSquares", "Poisson", "WeightedLeastSquares"]


class DataFidelity(nn.Module):
    """The base of data fidelities f(x; d). A subclass defines `gradient`; all else has a default.

    It treats each sample by itself. What it computes for each sample of a batch, it returns from `inputs`. Samples that
    have converged stay in the batch, unless a subclass that holds nothing else of each sample sets
    ``may_hold_sample_data = False``.

    Example:
        >>> import torch, jfbfast
        >>> class Huber(jfbfast.data_fidelity.DataFidelity):  # for measurements with outliers
        ...     def gradient(self, operator, x, d):
        ...         return operator.adjoint((operator(x) - d).clamp(-0.1, 0.1))
        >>> model = jfbfast.DEGrad(jfbfast.GaussianBlur(), jfbfast.DnCNN(1, 2, 2), data_fidelity=Huber())
    """

    may_hold_sample_data: bool = True

    def inputs(self, d: Tensor) -> tuple[Tensor, ...]:
        """What f needs of the measurements d beside them, (B, …) each: computed once a forward."""
        return ()

    def gradient(self, operator: Any, x: Tensor, d: Tensor, *inputs: Tensor) -> Tensor:
        """∇f(x; d), in the shape of x.

        Args:
            operator: A, with ``adjoint``.
            x: images (B, …).
            d: measurements (B, …), in the shape of A x.
            inputs: what `inputs` returned for d.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gradient; a subclass of DataFidelity defines it")

    def value(self, operator: Any, x: Tensor, d: Tensor, *inputs: Tensor) -> Tensor:
        """f(x; d) of each sample, (B,); no layer needs it."""
        raise NotImplementedError(f"{type(self).__name__} has no value; a subclass of DataFidelity may define it")

    def measured(self, d: Tensor, *inputs: Tensor) -> Tensor:
        """d, with zeros where nothing was measured: what a solve starts from."""
        return d

    def descend(
        self, operator: Any, x: Tensor, d: Tensor, r: Tensor | None, step_size: Tensor, *inputs: Tensor
    ) -> Tensor:
        """One step against ∇f + r, x − η(∇f(x; d) + r); None stands for r = 0."""
        g = self.gradient(operator, x, d, *inputs)
        return x - step_size * (g if r is None else g + r)

    def least_squares(self, operator: Any, d: Tensor, *inputs: Tensor) -> tuple[Any, Tensor] | None:
        """(A', d') with f(x; d) = ½‖A' x − d'‖², which preconditioner and filter need; None if f is no such square."""
        return None


class LeastSquares(DataFidelity):
    """f(x; d) = ½‖A x − d‖², for white Gaussian noise; the default.

    Example:
        >>> import torch, jfbfast
        >>> blur, x = jfbfast.GaussianBlur(), torch.rand(1, 1, 8, 8)
        >>> f = jfbfast.data_fidelity.LeastSquares()
        >>> f.value(blur, x, blur(x)), bool(f.gradient(blur, x, blur(x)).abs().max() < 1e-6)
        (tensor([0.]), True)
    """

    may_hold_sample_data = False

    def value(self, operator: Any, x: Tensor, d: Tensor) -> Tensor:  # type: ignore[override]
        """f(x; d) of each sample, (B,)."""
        return (operator(x) - d).abs().square().flatten(1).sum(1) / 2

    def gradient(self, operator: Any, x: Tensor, d: Tensor) -> Tensor:  # type: ignore[override]
        """Aᵀ(A x − d)."""
        return operator.adjoint(operator(x) - d)

    def descend(  # type: ignore[override]
        self, operator: Any, x: Tensor, d: Tensor, r: Tensor | None, step_size: Tensor
    ) -> Tensor:
        """x − η(Aᵀ(A x − d) + r), in one pass over the images if A is separable."""
        return gradient_step(operator, x, d, r, step_size)

    def least_squares(self, operator: Any, d: Tensor) -> tuple[Any, Tensor]:  # type: ignore[override]
        """(A, d)."""
        return operator, d


class WeightedLeastSquares(DataFidelity):
    """f(x; d) = ½⟨A x − d, w(A x − d)⟩, for Gaussian noise of the variance 1/w in each measured value.

    Values that were not measured have w = 0; whatever d has there, such as NaN, counts as zero. The preconditioner, the
    filter and the injection of `DEGrad` become those of W^½A: they solve (AᵀWA + λI) u = b by conjugate gradients, to
    the ``tol`` of the model's operator if that is an `IterativeOperator`, or else to 1e-6. As each evaluation solves,
    ``IterativeOperator(blur, tol=1e-3)`` saves time.

    Args:
        weights: w ≥ 0: a number, a tensor that broadcasts to d, (B, …) for weights of each sample, or a function from
            the measurements d to such a tensor. Assign ``model.data_fidelity.weights`` for the next batch. A
            parameter, or the parameters of a module that computes them, are trained. Otherwise a tensor moves with the
            model, and is not in its ``state_dict``.

    Raises:
        TypeError: weights that are none of these.
        ValueError: at the forward, weights that are negative, not finite, or do not broadcast to d; zeros among
            weights that require a gradient.

    Example:
        >>> import torch, jfbfast
        >>> f = jfbfast.data_fidelity.WeightedLeastSquares(torch.tensor([2.0, 1.0, 0.0]))  # the last was not measured
        >>> operator = jfbfast.GaussianBlur(kernel_size=1)
        >>> x, d = torch.ones(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
        >>> f.gradient(operator, x, d, *f.inputs(d))
        tensor([[[[2., 1., 0.]]]])
    """

    may_hold_sample_data = False
    weights: Any

    def __init__(self, weights: float | Tensor | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weights":
            return super().__setattr__(name, value)
        if not isinstance(value, Tensor) and not callable(value):
            checks.non_negative("weights", value)
            value = torch.tensor(float(value))
        for held in (self.__dict__, self._parameters, self._buffers, self._modules):
            held.pop("weights", None)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer("weights", value, persistent=False)
        else:
            super().__setattr__("weights", value)

    def inputs(self, d: Tensor) -> tuple[Tensor, ...]:
        """(w,), in the shape of d."""
        weights = self.weights if isinstance(self.weights, Tensor) else self.weights(d)
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights returned a {type(weights).__name__}; it takes a function that returns a tensor")
        weights = weights.to(d.device, d.real.dtype if d.is_complex() else d.dtype)
        try:
            weights = weights.broadcast_to(d.shape)
        except RuntimeError as error:
            raise ValueError(
                f"weights has shape {tuple(weights.shape)}; it takes one that broadcasts to d, {tuple(d.shape)}"
            ) from error
        least = weights.detach().amin() if weights.numel() else 1.0
        if not (least >= 0 and weights.detach().isfinite().all()):
            raise ValueError(f"weights has values down to {float(least)}; it takes finite numbers of at least 0")
        if weights.requires_grad and least == 0:
            raise ValueError("weights has zeros and requires a gradient; it takes positive weights, or detached ones")
        return (weights,)

    def measured(self, d: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """d, with zeros where w = 0."""
        return torch.where(weights > 0, d, 0)

    def value(self, operator: Any, x: Tensor, d: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """f(x; d) of each sample, (B,)."""
        return (weights * (operator(x) - self.measured(d, weights)).abs().square()).flatten(1).sum(1) / 2

    def gradient(self, operator: Any, x: Tensor, d: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """Aᵀ(w(A x − d))."""
        return operator.adjoint(weights * (operator(x) - self.measured(d, weights)))

    def least_squares(  # type: ignore[override]
        self, operator: Any, d: Tensor, weights: Tensor
    ) -> tuple[Any, Tensor]:
        """(W^½A, W^½d)."""
        root = weights.sqrt()
        settings = (operator.tol, operator.max_iter) if isinstance(operator, IterativeOperator) else ()
        return IterativeOperator(_Scaled(operator, root), *settings), root * self.measured(d, weights)


class _Scaled(nn.Module):
    """W^½A, for the root of the weights w."""

    def __init__(self, operator: Any, root: Tensor) -> None:
        super().__init__()
        self.operator = operator
        self.root = root

    def forward(self, x: Tensor) -> Tensor:
        return self.root * self.operator(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.operator.adjoint(self.root * y)


class Poisson(DataFidelity):
    """For photon counts, the Kullback-Leibler divergence f(x; d) = (1/γ) Σ u − y + y log(y/u).

    Here u = A x + b and y = d + b. The counts y/γ are Poisson distributed with the mean u/γ. So d has the units of A x;
    for counts n it is γn − b. Images on [0, 1] take a small b ≥ 0, the light that is not the image's. Images on
    [−1, 1], as the networks of this package expect them, take b = 1: then x + 1 is the light, and a pixel with x = 0
    has 1/γ photons. A must not make A x + b negative, as no blur does.

    The step is the mirror-descent step of Burg's entropy −Σ log(x + b) (Bauschke, Bolte, Teboulle, 2017; for deep
    equilibrium models Daniele et al., 2025),

        x + b ← (x + b) / (1 + η(x + b)(∇f(x; d) + R(x))),

    or without ``mirror`` the projected gradient step, max(x − η(∇f + R), −b), which has the same fixed points. Where
    light nearly vanishes, ∇f is so steep that the gradient step needs a small η, and with it many evaluations; the
    mirror step is scaled by the light itself. ∇f grows as 1/γ, so an η of 0.1γ to γ suits, and an R of the order 1/γ.

    Args:
        gain: γ > 0, the value of one photon, as in ``deepinv.physics.PoissonNoise``.
        background: b ≥ 0, in the units of A x.
        mirror: take the mirror-descent step. It divides by no less than ½, so that x + b at most doubles in a step.
            False takes the projected gradient step.
        floor: below this u > 0 each term of f goes on as its parabola, which is convex, and so has a gradient
            everywhere. The mirror step takes x + b as at least this.

    Raises:
        ValueError: a value out of its range; at the forward, d + b < 0.

    Example:
        >>> import torch, jfbfast
        >>> operator = jfbfast.GaussianBlur(kernel_size=1)
        >>> f = jfbfast.data_fidelity.Poisson(gain=0.5)
        >>> x, d = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[1.0, 4.0]]]])
        >>> f.gradient(operator, x, d, *f.inputs(d))
        tensor([[[[ 0., -2.]]]])
    """

    may_hold_sample_data = False

    def __init__(self, gain: float = 1.0, background: float = 0.0, *, mirror: bool = True, floor: float = 1e-3) -> None:
        super().__init__()
        checks.positive("gain", gain)
        checks.non_negative("background", background)
        checks.positive("floor", floor)
        self.gain, self.background, self.mirror, self.floor = float(gain), float(background), bool(mirror), float(floor)

    def inputs(self, d: Tensor) -> tuple[Tensor, ...]:
        """(y,), y = d + b."""
        y = d + self.background
        if y.numel() and not y.detach().amin() >= -1e-5:  # what rounding leaves of no photons
            raise ValueError(
                f"d has values down to {float(d.detach().amin())}; the Poisson fidelity takes values of at least "
                f"−background, {-self.background}"
            )
        return (y.clamp_min(0),)

    def _light(self, operator: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """u clamped to the floor from below, and how far it is below it (≤ 0)."""
        u = operator(x) + self.background
        return u.clamp_min(self.floor), (u - self.floor).clamp_max(0)

    def value(self, operator: Any, x: Tensor, d: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """f(x; d) of each sample, (B,)."""
        u, below = self._light(operator, x)
        t = below / self.floor
        terms = u + below - y + torch.xlogy(y, y) - y * u.log() - y * (t - t.square() / 2)
        return terms.flatten(1).sum(1) / self.gain

    def gradient(self, operator: Any, x: Tensor, d: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """(1/γ)Aᵀ(1 − y/u)."""
        u, below = self._light(operator, x)
        return operator.adjoint((1 - y / u + y * below / self.floor**2) / self.gain)

    def descend(  # type: ignore[override]
        self, operator: Any, x: Tensor, d: Tensor, r: Tensor | None, step_size: Tensor, y: Tensor
    ) -> Tensor:
        """One step against ∇f + r, by the mirror or by the projected gradient."""
        if not self.mirror:
            return super().descend(operator, x, d, r, step_size, y).clamp_min(-self.background)
        light = (x + self.background).clamp_min(self.floor)
        g = self.gradient(operator, x, d, y)
        g = g if r is None else g + r
        return (light / (1 + step_size * light * g).clamp_min(0.5) - self.background).to(x.dtype)

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}, background={self.background:g}, mirror={self.mirror}, floor={self.floor:g}"


class _DeepinvFidelity(DataFidelity):
    """A data fidelity of deepinv, by its ``fn(x, y, physics)`` and ``grad(x, y, physics)``."""

    def __init__(self, fidelity: Any) -> None:
        super().__init__()
        self.fidelity = fidelity

    def value(self, operator: Any, x: Tensor, d: Tensor) -> Tensor:  # type: ignore[override]
        return self.fidelity.fn(x, d, _as_physics(operator))

    def gradient(self, operator: Any, x: Tensor, d: Tensor) -> Tensor:  # type: ignore[override]
        return self.fidelity.grad(x, d, _as_physics(operator))


class _Physics:
    """What deepinv's data fidelities call of a physics, for an operator that is not deepinv's."""

    def __init__(self, operator: Any) -> None:
        self.A, self.A_adjoint = operator, operator.adjoint

    def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        return self.A_adjoint(v)

    def A_adjoint_A(self, x: Tensor) -> Tensor:
        return self.A_adjoint(self.A(x))


def _as_physics(operator: Any) -> Any:
    """The physics that the operator wraps, or the operator as a physics."""
    if isinstance(operator, IterativeOperator):
        return _as_physics(operator.operator)
    return operator.physics if isinstance(operator, PhysicsOperator) else _Physics(operator)


def as_data_fidelity(given: Any) -> DataFidelity:
    """``given`` as a `DataFidelity`: None for `LeastSquares`, and one of deepinv as it is.

    Raises:
        TypeError: ``given`` is none of these.
    """
    if given is None:
        return LeastSquares()
    if isinstance(given, DataFidelity):
        return given
    if not isinstance(given, type) and callable(getattr(given, "grad", None)) and callable(getattr(given, "fn", None)):
        return _DeepinvFidelity(given)
    raise TypeError(f"data_fidelity is {given!r}; it takes None, a DataFidelity or a data fidelity of deepinv")


def check_quadratic(layer: str, fidelity: DataFidelity) -> None:
    """Raise ValueError for a ``layer`` that needs f = ½‖A' x − d'‖² if ``fidelity`` is no such square."""
    if type(fidelity).least_squares is DataFidelity.least_squares:
        kind = type(getattr(fidelity, "fidelity", fidelity)).__name__
        raise ValueError(
            f"data_fidelity is {kind}; {layer} takes LeastSquares or WeightedLeastSquares, whose weights can be the "
            "1/variance of other noise"
        )
