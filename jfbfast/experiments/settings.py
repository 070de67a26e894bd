"""Training settings by name, as the command line and YAML files have them, and the files of a run that hold them."""

from __future__ import annotations

import difflib
import json
import reprlib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from jfbfast import checks
from jfbfast.experiments.setting_checks import check_settings
from jfbfast.experiments.training_settings import TrainingSettings
from jfbfast.files import write_whole

_MOST_TEXT = 1 << 20  # characters in a file of settings
_MOST_NAMES = 1 << 28  # characters in a file of photographs' names
_YAML_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # from values such as dates

# Where and how a run computes, not what: a resumed run may change these.
CIRCUMSTANCES = frozenset({"data", "workers", "cache", "logger"})


class Setting(NamedTuple):
    """The type of a setting: ``kind`` itself, a tuple of it if ``several``, or None if ``optional``."""

    kind: type[Any]
    several: bool
    optional: bool


def setting_types() -> dict[str, Setting]:
    """The type of each setting, by name."""
    found = {}
    for name, hint in get_type_hints(TrainingSettings).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        several = get_origin(kinds[0]) is tuple
        found[name] = Setting(get_args(kinds[0])[0] if several else kinds[0], several, type(None) in kinds)
    return found


def _convert(name: str, value: Any, setting: Setting) -> Any:
    """The value in the setting's type; a tuple may come as a list, as one value, or as text with commas."""
    if value is None and setting.optional:
        return None
    if setting.several:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(name, item, setting._replace(several=False, optional=False)) for item in items)
    kind = setting.kind
    wrong = isinstance(value, bool) != (kind is bool) or (kind is int and isinstance(value, float) and value % 1)
    try:
        if not wrong and isinstance(value, (bool, int, float, str)):
            return kind(value)
    except (ValueError, OverflowError):
        pass
    takes = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]
    raise ValueError(f"{name} is {reprlib.repr(value)}; it takes {takes}")


def make_settings(values: Mapping[str, Any]) -> TrainingSettings:
    """The settings of a training run, from their names and values.

    Args:
        values: as in a YAML file or on the command line; a number may be text, and a list may be text with commas.

    Raises:
        ValueError: an unknown name, a value of the wrong type or out of its range, settings that contradict each
            other, or no ``data``.

    Example:
        >>> from jfbfast.experiments.settings import make_settings
        >>> settings = make_settings({"data": "photographs", "denoiser": "UNet", "learning_rate": "1e-3"})
        >>> settings.learning_rate, settings.resolved().features
        (0.001, (64, 96, 128))
    """
    known = setting_types()
    unknown = sorted(map(str, values.keys() - known.keys()))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"{unknown[0]} is no setting; {meant}jfbfast train --help lists all settings")
    if values.get("data") is None:
        raise ValueError("data is missing; it takes a directory of photographs")
    settings = TrainingSettings(**{name: _convert(name, value, known[name]) for name, value in values.items()})
    check_settings(settings)
    return settings


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Refuses references, which can expand to any amount of text, and a name that appears twice."""

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
    """The names and values in a YAML file; ValueError if it is missing, over a megabyte, or not a mapping."""
    try:
        values = yaml.load(checks.read_text(Path(path), _MOST_TEXT), _Loader)
    except (OSError, RecursionError, yaml.YAMLError, *_YAML_ERRORS) as error:
        raise ValueError(f"{path}: not a file of settings ({checks.one_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a file of settings (it holds no names with values)")
    return values


def read_run_settings(path: Path) -> TrainingSettings:
    """The settings in a run's ``config.yaml``; ValueError, with its path, if they are damaged."""
    values = read_settings(path)
    if isinstance(old := values.pop("tensorboard", None), bool):  # of older versions
        values["logger"] = "tensorboard" if old else "csv"
    try:
        return make_settings(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_settings(path: Path, settings: TrainingSettings) -> None:
    """Write all settings as YAML; a reader sees the old file or the whole new one."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(settings).items()}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_photographs(path: Path, photographs: Mapping[str, Sequence[str]]) -> None:
    """Write the names of a run's photographs for `read_photographs`."""
    text = json.dumps(photographs, indent=1)  # ASCII, with escapes for names that are not UTF-8
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_photographs(path: Path) -> dict[str, list[str]]:
    """The names of a run's "training" and "validation" photographs; ValueError if the file is damaged."""
    error = ValueError(f"{path}: not the names of a run's photographs")
    try:
        found = json.loads(checks.read_text(path, _MOST_NAMES))
    except (ValueError, RecursionError) as cause:
        raise ValueError(f"{error} ({checks.one_line(cause)})") from cause
    if not isinstance(found, dict) or found.keys() != {"training", "validation"}:
        raise ValueError(f"{error} (it takes training and validation)")
    for name, names in found.items():
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise ValueError(f"{error} ({name} is no list of names)")
    return found
