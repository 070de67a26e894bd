"""A model as its description in JSON, and back: the class of each part with its arguments.

Arguments are numbers, strings, lists, tensors (which go into the file of weights), and parts of this package: networks,
operators, solvers, gradient methods. Any other object is described by the name of its class alone, and whoever restores
the model passes such an object.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jfbfast.implicit.methods import JFB, Implicit, Neumann, Phantom, Shine, Unrolled
from jfbfast.models import registry
from jfbfast.models.config import check_description
from jfbfast.operators.blur import GaussianBlur, SeparableBlur
from jfbfast.operators.convolution import Blur
from jfbfast.operators.data_fidelity import LeastSquares, Poisson, WeightedLeastSquares
from jfbfast.operators.iterative import IterativeOperator
from jfbfast.operators.physics import PhysicsOperator

T = TypeVar("T", bound=type[Any])
S = TypeVar("S", bound="Described")

KINDS: dict[str, type[Any]] = dict(registry.SOLVERS)  # what a description can name
_ARGUMENTS: dict[type[Any], tuple[str, ...]] = {  # their arguments, which are attributes of the same names
    GaussianBlur: ("kernel_size", "sigma", "padding_mode"),
    SeparableBlur: ("taps_y", "taps_x", "padding_mode"),
    Blur: ("psf", "padding_mode", "tol", "max_iter"),
    IterativeOperator: ("operator", "tol", "max_iter"),
    LeastSquares: (),
    WeightedLeastSquares: ("weights",),
    Poisson: ("gain", "background", "mirror", "floor"),
}
TENSOR = "argument/"  # begins the names of tensors that are arguments, and no weights


def describable(cls: T) -> T:
    """Class decorator: descriptions may name this class, a dataclass or a `Described`."""
    KINDS[cls.__name__] = cls
    return cls


for _kind in (*_ARGUMENTS, JFB, Implicit, Neumann, Phantom, Shine, Unrolled):
    describable(_kind)


class Described:
    """Remembers the arguments of its constructor, so that a model can be saved with the description that rebuilds it.

    Descriptions can name the subclasses within this package. An attribute with the name of an argument replaces what
    the constructor got, since it may have changed since.
    """

    later_options: tuple[str, ...] = ()  # arguments that `set_options` sets later, and that a constructor need not take

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
            describable(cls)

    def __new__(cls: type[S], *args: Any, **options: Any) -> S:
        made = super().__new__(cls)
        object.__setattr__(made, "_given", (args, options))
        return made

    def set_options(self, **options: Any) -> None:
        """Set the arguments that are named in the class's ``later_options``."""

    def arguments(self) -> dict[str, Any]:
        """The arguments that make a module like this one, apart from its weights.

        Raises:
            ValueError: the constructor got arguments by ``*args``, which have no names.
        """
        args, options = self.__dict__["_given"]
        bound = inspect.signature(type(self).__init__).bind(self, *args, **options)
        bound.apply_defaults()
        found: dict[str, Any] = {}
        for name, value in [*bound.arguments.items()][1:]:
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                found.update(value)
            elif kind is not inspect.Parameter.VAR_POSITIONAL:
                found[name] = value
            elif value:
                raise ValueError(f"{type(self).__name__} got {len(value)} arguments by *{name}; it takes named ones")
        present = {**vars(self), **vars(self).get("_modules", {})}
        return {name: present.get(name, value) for name, value in found.items()}


def describe(model: Described) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of a model, whose weights it does not have, and the tensors among its arguments, by name.

    Raises:
        ValueError: arguments without names.

    Example:
        >>> import jfbfast
        >>> from jfbfast.models.description import build_model, describe
        >>> network = jfbfast.DnCNN(channels=1, features=8, depth=3)
        >>> description, tensors = describe(network)
        >>> description["kind"], description["features"], tensors
        ('DnCNN', 8, {})
        >>> build_model(description, network.state_dict(), {}).channels
        1
    """
    tensors: dict[str, Tensor] = {}
    description = {"kind": type(model).__name__}
    for name, value in model.arguments().items():
        description[name] = _described(value, name, tensors)
    return description, tensors


def _described(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    parameter = isinstance(value, nn.Parameter)
    if isinstance(value, Tensor) and not value.dim() and not parameter:
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (Integral, Real)):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, (list, tuple)):
        return [_described(each, f"{path}.{i}", tensors) for i, each in enumerate(value)]
    if isinstance(value, Tensor):
        tensors[TENSOR + path] = value.detach().cpu().clone().contiguous()
        return {"kind": "tensor", "name": TENSOR + path, **({"parameter": True} if parameter else {})}
    if isinstance(value, torch.dtype):
        return {"kind": "dtype", "name": str(value).removeprefix("torch.")}
    value = value.physics if isinstance(value, PhysicsOperator) else value
    kind = type(value).__name__
    arguments = _arguments(value) if KINDS.get(kind) is type(value) else None
    if arguments is None:
        return {"kind": "external", "class": kind}
    check_description(path, {"kind": kind, **arguments})  # or else it could not be loaded
    found = {name: _described(each, f"{path}.{name}", tensors) for name, each in arguments.items()}
    if isinstance(value, IterativeOperator) and _is(found["operator"], "external"):
        return {"kind": "external", "class": found["operator"]["class"]}  # the model wraps what it is given itself
    return {"kind": kind, **found}


def _arguments(value: Any) -> dict[str, Any] | None:
    """The arguments that make an object like this one; None if they are not known."""
    if type(value) in _ARGUMENTS:
        return {name: getattr(value, name) for name in _ARGUMENTS[type(value)]}
    if isinstance(value, Described):
        return value.arguments()
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _is(node: Any, kind: str) -> bool:
    return isinstance(node, Mapping) and node.get("kind") == kind


def external_objects(node: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """The objects that whoever restores the description has to pass: their path and class, by the argument's name."""
    if _is(node, "external"):
        return {path.rpartition(".")[2]: (path, str(node.get("class")))}
    found: dict[str, tuple[str, str]] = {}
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        found.update(external_objects(child, f"{path}.{name}" if path else str(name)))
    return found


def build_model(
    node: Any, tensors: Mapping[str, Tensor], given: Mapping[str, Any], own: type[Any] | None = None, name: str = ""
) -> Any:
    """What `describe` described, with untrained weights.

    Args:
        node: the description.
        tensors: those that it names.
        given: the objects that the description does not have, by the name of the argument.
        own: the model's class, if it is not of this package.
        name: the argument's name.

    Raises:
        ValueError: a damaged description, one with numbers out of bounds, or one of a network that has more weights
            than ``tensors``.
    """
    if isinstance(node, list):
        return [build_model(each, tensors, given, name=name) for each in node]
    if not isinstance(node, Mapping):
        return node
    kind = node.get("kind")
    if kind == "external":
        return given[name]
    if kind == "tensor":
        tensor = tensors[str(node["name"])]
        return nn.Parameter(tensor) if node.get("parameter") else tensor
    if kind == "dtype":
        dtype = getattr(torch, str(node["name"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} is {node['name']!r}; it takes a dtype of torch")
        return dtype
    kinds = KINDS if own is None else {**KINDS, own.__name__: own}
    described = {"kind": kind}
    for argument, child in node.items():
        if argument != "kind":
            described[argument] = build_model(child, tensors, given, name=argument)
    if kind in KINDS:
        check_description(name or "model", described)
    if kind in registry.NETWORKS:
        _check_size(name, described, sum(tensor.numel() for tensor in tensors.values()))
    set_later = getattr(kinds.get(str(kind)), "later_options", ())
    options = {each: described[each] for each in set_later if each in described}
    if options:
        taken = inspect.signature(kinds[str(kind)].__init__).parameters
        described = {each: value for each, value in described.items() if each in taken or each not in options}
    made = registry.build(name or "model", described, kinds)
    if options:
        made.set_options(**options)
    return made


def _check_size(name: str, described: Mapping[str, Any], most: int) -> None:
    """Raise ValueError for a network with more weights than the file has, before any memory is taken for it."""
    with torch.device("meta"):
        network = registry.build(name or "model", described, registry.NETWORKS)
    if (count := sum(p.numel() for p in network.parameters())) > most:
        raise ValueError(f"{name or 'model'} has {count} weights, and the file has {most} numbers")
