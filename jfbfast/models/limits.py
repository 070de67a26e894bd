"""What each setting of a network may be, wherever it comes from: its type and its bounds.

The bounds lie beyond any use. They keep what a damaged or foreign file asks for from hanging or taking all memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jfbfast import checks
from jfbfast.backends.reference import PADDING_MODES

Check = Callable[[str, object], None]

MOST_PARAMETERS = 10**9  # numbers in a network
DEGRAD_FORMS = ("paper", "preconditioned", "filtered")
FORMS = (*DEGRAD_FORMS, "feed-forward", "denoiser")


def _integer(least: int, most: int) -> Check:
    return lambda name, value: checks.integer(name, value, least, most)


def _number(least: float, most: float) -> Check:
    takes = f"a number from {least:g} to {most:g}"
    return lambda name, value: checks.number(name, value, lambda v: least <= v <= most, takes)


def _one_of(*choices: object) -> Check:
    def check(name: str, value: object) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(map(repr, choices))}")

    return check


def _or(choice: object, other: Check) -> Check:
    return lambda name, value: None if type(value) is type(choice) and value == choice else other(name, value)


def _sequence(least: int, most: int, each: Check) -> Check:
    def check(name: str, value: object) -> None:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not least <= len(value) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            raise ValueError(f"{name} is {value!r}; it takes {count} values")
        for item in value:
            each(name, item)

    return check


def _odd(name: str, value: object) -> None:
    if not checks.is_integer(value) or not 1 <= value <= 1023 or value % 2 == 0:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it takes an odd integer from 1 to 1023")


def _described(name: str, value: object) -> None:
    if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
        raise ValueError(f"{name} is {value!r}; it takes a kind with its arguments")
    for argument, given in value.items():
        if argument in _ARGUMENTS:
            _ARGUMENTS[argument](f"{argument} of {name}", given)


def _features(name: str, value: object) -> None:
    """One number, or of a UNet one a scale."""
    each = _integer(1, 4096)
    (_sequence(1, 8, each) if isinstance(value, (list, tuple)) else each)(name, value)


_FLAG = _one_of(True, False)
_SIGMA, _NOISE, _POSITIVE = _number(1e-3, 1e6), _number(0, 100), _number(1e-9, 1e6)

# Of a network's, a solver's or a gradient method's kind, which checks the rest itself.
_ARGUMENTS: dict[str, Check] = {
    "channels": _integer(1, 64),
    "features": _features,
    "depth": _integer(2, 200),
    "blocks": _sequence(1, 8, _integer(1, 100)),
    "conditions": _integer(0, 16),
    "norm": _one_of("batch", None),
    "spectral_norm": _one_of(True, False, "conv"),
    "bias": _FLAG,
    "residual": _FLAG,
    "injection": _FLAG,
    "averaging": _number(1e-6, 1),
    "tol": _number(0, 1e6),
    "atol": _number(0, 1e12),
    "max_iter": _integer(1, 10_000),
    "memory": _integer(1, 100),
    "regularization": _number(1e-30, 1e6),
    "history_dtype": _one_of(None),
    "momentum": _number(0, 1),
    "terms": _integer(1, 1000),
    "steps": _integer(1, 1000),
    "damping": _number(1e-6, 1),
    "fallback": _FLAG,
    "ratio": _POSITIVE,
}
# Of `ModelConfig`.
FIELDS: dict[str, Check] = {
    "form": _one_of(*FORMS),
    "denoiser": _described,
    "kernel_size": _odd,
    "sigma": _SIGMA,
    "padding_mode": _one_of(*PADDING_MODES),
    "noise": _NOISE,
    "weight": _POSITIVE,
    "step_size": _POSITIVE,
    "averaging": _or("auto", _ARGUMENTS["averaging"]),
    "solver": _described,
    "gradient": _described,
    "sigma_range": _or(None, _sequence(2, 2, _SIGMA)),
    "noise_range": _or(None, _sequence(2, 2, _NOISE)),
}


def check_fields(values: Mapping[str, Any]) -> None:
    """Raise ValueError, naming it, for a value of `ModelConfig` of another type or beyond its bounds."""
    for name, check in FIELDS.items():
        check(name, values[name])
