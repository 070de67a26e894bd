"""The classes that the file of a network can name.

Each module registers its classes where it defines them, so that the file format imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from jfbfast.solvers import Anderson, Broyden, FixedPointSolver, Inertial, Picard

T = TypeVar("T", bound=type[Any])

NETWORKS: dict[str, type[nn.Module]] = {}  # denoisers and R, by the name of their class
MODELS: dict[str, type[Any]] = {}  # networks that undo blur, by form; each has a class method from_config
SOLVERS: dict[str, type[FixedPointSolver]] = {kind.__name__: kind for kind in (Anderson, Broyden, Inertial, Picard)}


def network(cls: T) -> T:
    """Class decorator: files may name this network. Its attribute ``is_denoiser`` tells whether it is one, or an R."""
    NETWORKS[cls.__name__] = cls
    return cls


def model(*forms: str) -> Callable[[T], T]:
    """Class decorator: models of these forms are made by its class method ``from_config(config, network)``."""

    def register(cls: T) -> T:
        MODELS.update(dict.fromkeys(forms, cls))
        return cls

    return register


def build(name: str, description: Mapping[str, Any], kinds: Mapping[str, type[Any]]) -> Any:
    """Make an instance of the class that ``description["kind"]`` names; the other values are its arguments.

    Raises ValueError, with the ``name`` of the description, for an unknown kind or an argument that it does not have.
    """
    kind = str(description.get("kind"))
    if kind not in kinds:
        raise ValueError(f"{name} is of kind {kind!r}; it takes one of {', '.join(map(repr, kinds))}")
    try:
        return kinds[kind](**{key: value for key, value in description.items() if key != "kind"})
    except TypeError as error:
        raise ValueError(f"{name} is {dict(description)}, which {kind} does not take ({error})") from error
