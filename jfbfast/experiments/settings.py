"""Settings of a training run by name, as flags and YAML files have them, and the file of its photographs' names."""

from __future__ import annotations

import json
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from jfbfast import checks
from jfbfast.experiments.training_settings import TrainingSettings
from jfbfast.files import write_whole

_MOST_TEXT = 1 << 20  # characters of a file
_MOST_NAMES = 1 << 28  # characters of the names of a run's photographs
_OF_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # what YAML's own types raise

# Of where and how a run computes; a resumed run may change them.
CIRCUMSTANCES = frozenset({"data", "workers", "cache", "tensorboard"})


def setting_types() -> dict[str, tuple[Any, str]]:
    """Each setting's type and help."""
    hints = get_type_hints(TrainingSettings, include_extras=True)
    return {name: (get_args(hint)[0], get_args(hint)[1]) for name, hint in hints.items()}


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _checked(name: str, value: Any) -> Any:
    """The value as the setting's type; tuples from lists, single numbers, or text with commas."""
    kinds = _alternatives(setting_types()[name][0])
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        return tuple(_single(name, part, get_args(kind)[0]) for part in parts)
    return _single(name, value, kind)


def _single(name: str, value: Any, kind: type[Any]) -> Any:
    wrong = isinstance(value, bool) != (kind is bool) or (kind is int and isinstance(value, float) and value % 1)
    try:
        if not wrong and isinstance(value, (bool, int, float, str)):
            return kind(value)
    except (ValueError, OverflowError):
        pass
    told = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]
    raise ValueError(f"{name} is {reprlib.repr(value)}; it takes {told}")


def make_settings(values: Mapping[str, Any]) -> TrainingSettings:
    """Settings from their names and values, as YAML or the command line has them.

    Raises:
        ValueError: an unknown name, a value of another type, or one out of its range; no data directory.
    """
    known = setting_types()
    unknown = sorted(map(str, values.keys() - known.keys()))
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting; the settings are {', '.join(known)}")
    if values.get("data") is None:
        raise ValueError("data is missing; it takes a directory of photographs")
    return TrainingSettings(**{name: _checked(name, value) for name, value in values.items()})


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # of a package without types
    """YAML without references, which can stand for any amount of text, and without a name twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1} has a reference; settings take none")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"{reprlib.repr(key.value)} is there twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The names and values of a YAML file.

    Raises:
        ValueError: no such file, one of more than a megabyte, or not a mapping in YAML.
    """
    try:
        values = yaml.load(checks.read_text(Path(path), _MOST_TEXT), _Loader)
    except (OSError, RecursionError, yaml.YAMLError, *_OF_VALUES) as error:
        raise ValueError(f"{path}: not a file of settings ({checks.one_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a file of settings (it holds no names with values)")
    return values


def read_run_settings(path: Path) -> TrainingSettings:
    """The settings of a run, from the file that `write_settings` wrote; raises ValueError, naming it, for another."""
    values = read_settings(path)
    try:
        return make_settings(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_settings(path: Path, settings: TrainingSettings) -> None:
    """Every setting, as YAML that `read_settings` reads; a reader sees the old file or the whole new one."""
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def changed_settings(old: TrainingSettings, new: TrainingSettings) -> list[str]:
    """The settings that a resumed run may not change, and that differ."""
    names = [f.name for f in fields(TrainingSettings) if f.name not in CIRCUMSTANCES]
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def write_photographs(path: Path, photographs: Mapping[str, Sequence[str]]) -> None:
    """Write the names of a run's photographs, as `read_photographs` reads them."""
    text = json.dumps(photographs, indent=1)  # in ASCII, which names that are not UTF-8 have escapes in
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_photographs(path: Path) -> dict[str, list[str]]:
    """The names of a run's photographs: for "training" and for "validation".

    Raises:
        ValueError: another file.
    """
    try:
        found = json.loads(checks.read_text(path, _MOST_NAMES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the names of a run's photographs ({checks.one_line(error)})") from error
    if not isinstance(found, dict) or found.keys() != {"training", "validation"}:
        raise ValueError(f"{path}: not the names of a run's photographs (it takes training and validation)")
    for name, names in found.items():
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise ValueError(f"{path}: not the names of a run's photographs ({name} is no list of names)")
    return found
