"""Copies of the C++ and CUDA sources, optionally with a fault that a test must catch."""

import shutil
from pathlib import Path

Patch = tuple[str, str, str]  # a source, a text in it, and its replacement


def copy_sources(source: Path, folder: Path, patch: Patch | None = None) -> Path:
    """Copy a directory of sources into ``folder`` and apply the patch; return the copy."""
    sources = shutil.copytree(source, folder / "csrc")
    if patch:
        name, text, replacement = patch
        file = sources / name
        assert text in file.read_text(), f"{name} no longer holds {text!r}"
        file.write_text(file.read_text().replace(text, replacement))
    return sources
