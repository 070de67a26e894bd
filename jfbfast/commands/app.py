"""`jfbfast app`: a web page that restores photographs, for this machine alone."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from jfbfast import checks
from jfbfast.commands.common import console, one_sentence


def app(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0 takes any free one.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Whether to open the page in your browser.")] = True,
    megabytes: Annotated[float, typer.Option(help="The largest file that can be uploaded.")] = 100,
    megapixels: Annotated[float, typer.Option(help="The largest photograph; one of 12 takes 3 GB of memory.")] = 50,
) -> None:
    """Open a web page that restores photographs: drop one, choose or estimate its blur, and compare before and after.

    The page restores as `jfbfast restore` does. It is served to this machine alone, and uploads are deleted.
    """
    with one_sentence(extra="app"):
        for name, value in (("--megabytes", megabytes), ("--megapixels", megapixels)):
            checks.positive(name, value)
        from jfbfast.app.serving import serve

        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        serve(port, megabytes, megapixels, browser=browser, say=say)
