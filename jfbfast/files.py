"""Write files atomically: under a temporary name in the same directory, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def _beside(path: Path) -> Path:
    """A name in the same directory that no other process uses and that is never too long."""
    return path.with_name(f".{secrets.token_hex(8)}.partial")


def write_whole(path: Path, write: Callable[[Path], object], *, overwrite: bool = True) -> None:
    """Let ``write`` write a temporary file, then rename it to ``path``: readers see the old file or all of the new.

    Raises:
        FileExistsError: without ``overwrite``, if the file exists, even if another process has only just made it.
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
    """Check that `write_whole` can write ``path``, by creating and removing an empty file in the same directory.

    Raises:
        OSError: it cannot, and why.
    """
    with suppress(FileNotFoundError):  # any other error, such as for a name that is too long, goes to the caller
        path.lstat()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    partial = _beside(path)
    partial.touch(exist_ok=False)
    partial.unlink()
