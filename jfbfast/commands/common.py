"""What all commands share: the console, and one sentence for each mistake."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from jfbfast.experiments.processes import Interrupted, rank

_PIPE_WIDTH = 1000  # columns: a pipe has none, and lines must not be wrapped in it


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Make a console that wraps lines only in a terminal."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, emoji=False, quiet=quiet, width=None if terminal else _PIPE_WIDTH)


console = make_console(quiet=rank() > 0)  # only one of torchrun's processes prints


def say_error(error: BaseException | str, kind: str = "error") -> None:
    """Print a sentence to stderr."""
    make_console(stderr=True).print(f"{kind}: {error}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def one_sentence(extra: str = "train") -> Iterator[None]:
    """End the program with one sentence, and not with a traceback, if the user made a mistake.

    Args:
        extra: what to install if a package is missing.
    """
    try:
        yield
    except (ModuleNotFoundError, ValueError, OSError) as error:
        told = f"this command needs more packages: pip install 'jfbfast[{extra}]'"
        say_error(f"{error.name} is not installed; {told}" if isinstance(error, ModuleNotFoundError) else error)
        raise typer.Exit(1) from error
    except Interrupted as stop:
        if rank() == 0:
            say_error(stop)
        raise typer.Exit(128 + stop.signal) from stop
