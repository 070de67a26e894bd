"""Files that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def _beside(path: Path) -> Path:
    """A name in the same directory that no other process takes, and that is never too long."""
    return path.with_name(f".{secrets.token_hex(8)}.partial")


def write_whole(path: Path, write: Callable[[Path], object], *, overwrite: bool = True) -> None:
    """Have ``write`` write a file beside ``path``, then rename it: a reader sees the old one or the whole new one.

    Raises:
        FileExistsError: without ``overwrite``, a file that is there, even if it has only just come.
    """
    partial = _beside(path)
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            os.replace(partial, path)
        else:
            _rename_to_new(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _rename_to_new(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(partial, path)


def check_writable(path: Path) -> None:
    """Tell whether `write_whole` could write there, by an empty file beside it that is removed again.

    Raises:
        OSError: it could not, and why.
    """
    with suppress(FileNotFoundError):  # any other error, such as of a name that is too long, is for the caller
        path.lstat()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    partial = _beside(path)
    partial.touch(exist_ok=False)
    partial.unlink()
