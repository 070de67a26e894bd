"""The site's reference has every public name once. How the pages look is checked by docs/check_pages.py."""

from __future__ import annotations

import re
from collections import Counter
from importlib import import_module
from inspect import ismodule
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import jfbfast

API = Path(__file__).parent.parent / "docs" / "api"


def public(module: ModuleType, name: str) -> list[str]:
    """The names in ``__all__`` of a module, and of the modules among them."""
    found = []
    for member in module.__all__:
        value, path = getattr(module, member), f"{name}.{member}"
        found += public(value, path) if ismodule(value) else [path]
    return found


def documented() -> list[str]:
    pages = "".join(path.read_text("utf-8") for path in API.glob("*.md"))
    return re.findall(r"^\.\. auto(?:class|data|exception|function):: (\S+)$", pages, re.MULTILINE)


def thing(path: str) -> Any:
    """What the dotted ``path`` names; its modules need not be attributes of one another."""
    value: Any = jfbfast
    parts = path.split(".")
    for i, part in enumerate(parts[1:], 2):
        value = getattr(value, part) if hasattr(value, part) else import_module(".".join(parts[:i]))
    return value


def test_the_reference_has_every_public_name_once() -> None:
    missing = set(public(jfbfast, "jfbfast")) - set(documented())
    assert not missing, f"{sorted(missing)} are in no page of docs/api"
    assert [name for name, count in Counter(documented()).items() if count > 1] == []


@pytest.mark.parametrize("path", documented())
def test_a_name_in_the_reference_exists_and_has_a_docstring(path: str) -> None:
    assert thing(path).__doc__
