"""RED: a regulariser made from a denoiser."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.models.description import Described


def log_parameter(name: str, value: float) -> nn.Parameter:
    """A learnable log(value), so that the value stays positive; raises ValueError, naming ``name``, if it is not."""
    checks.positive(name, value.item() if isinstance(value, Tensor) else value)
    return nn.Parameter(torch.tensor(math.log(value)))


class ToldNoise(nn.Module):
    """A module with a denoiser D that may be told a noise level σ, as D(x, σ)."""

    denoiser: Any
    log_noise: nn.Parameter | None

    def set_noise(self, noise: float | None, learn_noise: bool) -> None:
        """Tell D the noise level σ > 0, the start of a learnable parameter or as it is; None for a D that takes none.

        Raises:
            ValueError: σ not positive and finite, or ``learn_noise`` without a noise level.
        """
        if noise is None and learn_noise:
            raise ValueError("noise is None; learn_noise takes a positive number to start from")
        if noise is not None:
            checks.positive("noise", noise)
        self._noise = noise
        self.log_noise = log_parameter("noise", noise) if noise and learn_noise else None

    @property
    def noise(self) -> float | Tensor | None:
        """The σ that D is told, a number, or a tensor of shape () if it is learnt; None for a D that is told none."""
        return self._noise if self.log_noise is None else self.log_noise.exp()

    def told(self, x: Tensor) -> tuple[Any, ...]:
        """What D takes besides the images x (B, …): (σ,), or ()."""
        noise = self.noise
        if isinstance(noise, Tensor):
            return (noise.to(x.dtype).expand(x.shape[0]),)  # deepinv takes (B,)
        return () if noise is None else (noise,)


class RED(Described, ToldNoise):
    """Regularisation by denoising (Romano, Elad, Milanfar, 2017): R(x) = λ(x − D(W x)), or R(x; d) = λ(x − D(W x, z)).

    W is the identity, or with ``filter_damping`` the Tikhonov filter AᵀA(AᵀA + δI)⁻¹ of the operator A, so
    that the denoiser sees only what was measured. With ``injection`` the denoiser also sees Tikhonov's
    restoration of the measurement, z = (AᵀA + λI)⁻¹Aᵀd. With ``noise`` it is told a noise level, D(x, σ), as the
    denoisers of deepinv are.

    Args:
        denoiser: D, a map of images (B, C, H, W) to images; with ``injection``, of two such batches to one. It gets the
            images as they are: deepinv's pretrained denoisers take images on [0, 1], and then so does the whole model.
        weight: λ > 0, the start of a learnable parameter.
        filter_damping: δ. None for no filter, a number > 0 for the start of a learnable parameter of
            its own, or "weight" for δ = λ.
        injection: give D the measurement, as a deep equilibrium model gets its input at every evaluation
            (Bai, Kolter, Koltun, 2019). None takes the denoiser's attribute ``injection``, False without one.
        noise: σ > 0, the standard deviation of the noise that D is told, in the units of the images; None for a D that
            takes images only.
        learn_noise: whether ``noise`` is the start of a learnable parameter; False keeps it as it is.

    Raises:
        ValueError: λ, δ or σ not positive and finite; another string; an ``injection`` other than the denoiser's own;
            a noise level with an injection; ``learn_noise`` without a noise level.
        TypeError: a denoiser that cannot be called, or a class.

    Example:
        >>> import torch, jfbfast
        >>> blur = jfbfast.GaussianBlur()
        >>> red = jfbfast.RED(torch.nn.Identity(), weight=0.5, filter_damping="weight")
        >>> x = torch.rand(1, 1, 8, 8)
        >>> expected = 0.5 * (x - blur.filter(x, 0.5))
        >>> torch.allclose(red(x, blur), expected, atol=1e-6)
        True
    """

    def __init__(
        self,
        denoiser: nn.Module,
        weight: float = 0.05,
        filter_damping: float | Literal["weight"] | None = None,
        injection: bool | None = None,
        noise: float | None = None,
        learn_noise: bool = False,
    ) -> None:
        super().__init__()
        if not callable(denoiser) or isinstance(denoiser, type):
            raise TypeError(f"denoiser is {denoiser!r}; it takes a module")
        own = getattr(denoiser, "injection", injection)
        if injection not in (None, own):
            raise ValueError(f"injection is {injection}; it takes that of the {type(denoiser).__name__}, {own}")
        self.denoiser = denoiser
        self.log_weight = log_parameter("weight", weight)
        self.filtered = filter_damping is not None
        self.injection = bool(own)
        if noise is not None and self.injection:
            raise ValueError(f"noise is {noise}; a denoiser with injection takes None")
        self.set_noise(noise, learn_noise)
        self.log_filter_damping: nn.Parameter | None = None
        if isinstance(filter_damping, str):
            if filter_damping != "weight":
                raise ValueError(f"filter_damping is {filter_damping!r}; it takes None, a positive number or 'weight'")
        elif filter_damping is not None:
            self.log_filter_damping = log_parameter("filter_damping", filter_damping)

    @property
    def weight(self) -> Tensor:
        """λ, a tensor of shape ()."""
        return self.log_weight.exp()

    @property
    def filter_damping(self) -> Tensor | None:
        """δ, a tensor of shape (); None without a filter."""
        if not self.filtered:
            return None
        return self.weight if self.log_filter_damping is None else self.log_filter_damping.exp()

    @property
    def needs(self) -> tuple[str, ...]:
        """The methods of the operator that R calls."""
        return ("filter",) * self.filtered + ("adjoint", "solve") * self.injection

    def forward(self, x: Tensor, operator: Any = None, d: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """R(x), or R(x; d).

        Args:
            x: images (B, C, H, W).
            operator: A; only a filter or an injection needs it.
            d: the measurements; only an injection needs them.
            z: the image that an injection adds, if ``injected(operator, d)`` was called before.

        Returns:
            A tensor of the shape of x.

        Raises:
            ValueError: an ``operator`` that lacks one of the methods in ``needs``; no d with an injection; a denoiser
                that changes the shape.
        """
        for method in self.needs:
            if not callable(getattr(operator, method, None)):
                kind, needed = type(operator).__name__, ", ".join(self.needs)
                raise ValueError(f"operator is {kind}; this RED takes one with {needed}")
        seen = self.seen(x, operator) if self.filtered else x
        denoised = self.denoised(seen, x, *(self.injected(operator, d) if z is None else (z,)))
        return (self.weight * (x - denoised)).to(x.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether R is λ(x − `denoised`), so that a layer may call `denoised` alone.

        It is not if a derived class has a ``forward`` of its own, or a ``seen`` without its ``seen_factors``; nor if a
        hook is to see every call.
        """
        classes = [next(c for c in type(self).__mro__ if name in vars(c)) for name in ("seen", "seen_factors")]
        hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks
        return type(self).forward is RED.forward and classes[0] is classes[1] and not any(hooks)

    def seen(self, x: Tensor, operator: Any) -> Tensor:
        """W x, which the denoiser sees with a filter."""
        filtered: Tensor = operator.filter(x, self.filter_damping)
        return filtered

    def seen_factors(self, eigenvalues: Tensor) -> Tensor:
        """The factors by which `seen` multiplies in the basis where AᵀA has these eigenvalues s: s/(s + δ)."""
        damping = self.filter_damping
        assert damping is not None
        return eigenvalues / (eigenvalues + damping)

    def injected(self, operator: Any, d: Tensor | None) -> tuple[Tensor, ...]:
        """(z,), or () without an injection."""
        if not self.injection:
            return ()
        if d is None:
            raise ValueError("d is None; a RED with injection takes the measurements")
        return (operator.solve(operator.adjoint(d), self.weight),)

    def restoration(self, z: Tensor, weight: Tensor) -> Tensor:
        """P Aᵀd from the z that `injected` returned, and λ."""
        return z

    def denoised(self, seen: Tensor, x: Tensor, *injected: Tensor) -> Tensor:
        """D's output; raises ValueError for a denoiser that changes the shape."""
        denoised = self.denoise(seen, x, *injected)
        if denoised.shape != x.shape:
            raise ValueError(
                f"denoiser maps shape {tuple(x.shape)} to {tuple(denoised.shape)}; it takes one that keeps the shape"
            )
        return denoised

    def denoise(self, seen: Tensor, x: Tensor, *injected: Tensor) -> Tensor:
        """Apply D to W x, and to z with an injection or to σ with a noise level; subclasses may use x as well."""
        return self.denoiser(seen, *injected, *self.told(x))  # it takes one of both at most
