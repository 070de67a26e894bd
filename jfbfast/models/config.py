"""`ModelConfig`: the settings that rebuild a network, and what they may be.

The upper bounds lie far beyond any use: they keep a damaged or foreign file from hanging the program or taking all
memory. Arguments without a bound here are checked by the class that takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from jfbfast import checks
from jfbfast.backends.reference import PADDING_MODES
from jfbfast.implicit.methods import gradient_method
from jfbfast.models import registry
from jfbfast.operators.blur import GaussianBlur

Description = Mapping[str, Any]

DEGRAD_FORMS = ("paper", "preconditioned", "filtered", "universal")
FORMS = (*DEGRAD_FORMS, "feed-forward", "plug-and-play", "denoiser")
ANY_BLUR = ("universal", "plug-and-play")  # the forms that can be set for any known blur and noise level
SETTING = ("kernel_size", "sigma", "noise", "padding_mode")  # the fields that describe the measurements

_MOST_TAPS = 1023  # along each axis of a Gaussian filter
_MOST_SCALES = 8  # the most entries in the features and blocks of a UNet
_SIGMA, _NOISE, _POSITIVE, _AVERAGING = (1e-3, 1e6), (0, 100), (1e-9, 1e6), (1e-6, 1)
_FLAGS = ("bias", "residual", "fallback", "identity_start")
_COUNTS = {
    "channels": (1, 64),
    "features": (1, 4096),
    "depth": (2, 200),
    "blocks": (1, 100),
    "conditions": (0, 16),
    "max_iter": (1, 10_000),
    "memory": (1, 100),
    "terms": (1, 1000),
    "steps": (1, 1000),
}


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(map(repr, choices))}")


def _check_between(name: str, value: object, bounds: tuple[float, float]) -> None:
    low, high = bounds
    checks.number(name, value, lambda v: low <= v <= high, f"a number from {low:g} to {high:g}")


def _check_length(name: str, values: object, least: int, most: int) -> None:
    if not isinstance(values, (list, tuple)) or not least <= len(values) <= most:
        count = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{name} is {values!r}; it takes {count} values")


def check_description(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a kind with arguments, and the flags and counts among them are valid."""
    if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
        raise ValueError(f"{name} is {value!r}; it takes a kind with its arguments")
    for argument, given in value.items():
        told = f"{argument} of {name}"
        if argument in _FLAGS:
            _check_choice(told, given, (True, False))
        if argument in _COUNTS:
            a_list = argument == "blocks" or (argument == "features" and isinstance(given, (list, tuple)))
            if a_list:
                _check_length(told, given, 1, _MOST_SCALES)
            for count in given if a_list else (given,):
                checks.integer(told, count, *_COUNTS[argument])
    if value["kind"] == "GaussianBlur":
        _check_gaussian(name, value)


def _check_gaussian(name: str, value: Mapping[str, Any]) -> None:
    """Raise ValueError for a filter of more taps than any use has."""
    sigma, size = value.get("sigma", 1.0), value.get("kernel_size")
    most = _SIGMA[1] if size is not None else (_MOST_TAPS - 1) / 6  # without a size it follows from σ
    for each in sigma if isinstance(sigma, (list, tuple)) else (sigma,):
        _check_between(f"sigma of {name}", each, (_SIGMA[0], most))
    for each in size if isinstance(size, (list, tuple)) else () if size is None else (size,):
        checks.integer(f"kernel_size of {name}", each, 1, _MOST_TAPS)


def _dncnn() -> dict[str, Any]:
    return {"kind": "DnCNN", "norm": None, "spectral_norm": False, "bias": True, "residual": True}


@dataclass(frozen=True)
class ModelConfig:
    """What rebuilds a network: its form, its denoiser, and the measurements that it is for.

    Attributes:
        form: "paper" (T(x) = x − η(Aᵀ(A x − d) + R(x)), where R is the network itself), "preconditioned" or
            "filtered" (a `DEGrad` with `RED`), "universal" (a `UniversalDEGrad`), "feed-forward" (a `FeedForward`),
            "plug-and-play" (a `PlugAndPlay`), or "denoiser" (the network alone).
        denoiser: ``kind`` ("DnCNN", "UNet", "NonexpansiveDenoiser" or "GaussianDenoiser") and its arguments.
        kernel_size, sigma, padding_mode: arguments of the `GaussianBlur`; a kernel_size of None follows from σ.
        noise: standard deviation of the measurements' noise, for images in [−1, 1].
        weight: λ of `RED`, or of the feed-forward network's Tikhonov restoration, at the start of training.
        step_size: η of the paper's form, at the start of training.
        averaging: of the `DEGrad`.
        solver: ``kind`` ("Anderson", "Broyden", "Inertial" or "Picard") and its arguments.
        gradient: ``kind``, the name of a gradient method, and its arguments.
        sigma_range, noise_range: least and largest σ and noise that a `UniversalDEGrad` was trained on, whose first
            measurement has ``sigma`` and ``noise``; None for a network for one setting.

    Raises:
        ValueError: a value of another type, or out of its bounds.

    Example:
        >>> from jfbfast.models.config import ModelConfig
        >>> config = ModelConfig(denoiser={"kind": "UNet", "features": [8, 16], "blocks": [1, 1]}, sigma=2.0)
        >>> type(config.model()).__name__, config.blur().sigma
        ('DEGrad', (2.0, 2.0))
    """

    form: Literal["paper", "preconditioned", "filtered", "universal", "feed-forward", "plug-and-play", "denoiser"] = (
        "filtered"
    )
    denoiser: Description = field(default_factory=_dncnn)
    kernel_size: int | None = 5
    sigma: float = 1.0
    padding_mode: str = "reflect"
    noise: float = 0.01
    weight: float = 0.05
    step_size: float = 1.0
    averaging: float | Literal["auto"] = 1.0
    solver: Description = field(default_factory=lambda: {"kind": "Anderson"})
    gradient: Description = field(default_factory=lambda: {"kind": "jfb"})
    sigma_range: Sequence[float] | None = None
    noise_range: Sequence[float] | None = None

    def __post_init__(self) -> None:
        _check_choice("form", self.form, FORMS)
        _check_choice("padding_mode", self.padding_mode, PADDING_MODES)
        for name in ("denoiser", "solver", "gradient"):
            check_description(name, getattr(self, name))
        size = 1 if self.kernel_size is None else self.kernel_size
        if not checks.is_integer(size) or not 1 <= size <= _MOST_TAPS or size % 2 == 0:
            raise ValueError(f"kernel_size is {size!r}; it takes an odd integer from 1 to {_MOST_TAPS}, or None")
        for name, bounds in (("sigma", _SIGMA), ("noise", _NOISE), ("weight", _POSITIVE), ("step_size", _POSITIVE)):
            _check_between(name, getattr(self, name), bounds)
        if self.averaging != "auto":
            _check_between("averaging", self.averaging, _AVERAGING)
        for name, bounds in (("sigma_range", _SIGMA), ("noise_range", _NOISE)):
            if (values := getattr(self, name)) is not None:
                _check_length(name, values, 2, 2)
                for value in values:
                    _check_between(name, value, bounds)

    @property
    def channels(self) -> int:
        """Channels of the network's images."""
        return int(self.denoiser.get("channels", 3))

    @property
    def least_side(self) -> int:
        """The shortest side, in pixels, of images that every A of the training takes."""
        sigma = self.sigma if self.sigma_range is None else max(self.sigma_range)
        size = max(GaussianBlur(self.kernel_size, sigma).kernel_size)
        return size if self.padding_mode == "valid" else size // 2 + 1

    def blur(self) -> GaussianBlur:
        """The measurement operator A."""
        return GaussianBlur(self.kernel_size, self.sigma, self.padding_mode)

    def degrad_options(self) -> dict[str, Any]:
        """The arguments of a `DEGrad` that do not depend on its form: averaging, solver and gradient."""
        method = str(self.gradient["kind"])
        return {
            "averaging": self.averaging,
            "solver": registry.build("solver", self.solver, registry.SOLVERS),
            "gradient": registry.build("gradient", self.gradient, {method: type(gradient_method(method))}),
        }

    def model(self) -> nn.Module:
        """Make the network, untrained.

        Raises:
            ValueError: an unknown kind, or an argument that a kind does not take.
        """
        network = registry.build("denoiser", self.denoiser, registry.NETWORKS)
        if self.denoiser.get("injection") and self.form not in ("preconditioned", "filtered", "universal"):
            raise ValueError(
                f"form is {self.form!r} with {dict(self.denoiser)}; a network with injection takes the form "
                "'preconditioned', 'filtered' or 'universal'"
            )
        if self.form == "denoiser":
            return network
        return registry.MODELS[self.form].from_config(self, network)
