"""The flags of `jfbfast train`: one for each setting of a run."""

from __future__ import annotations

from inspect import Parameter
from pathlib import Path
from typing import Annotated

import typer

from jfbfast.experiments.settings import setting_types
from jfbfast.experiments.training_settings import TrainingSettings


def train_parameters() -> list[Parameter]:
    """The command's own parameters, and one for each setting; those that are not given are None."""
    own = {
        "out": (Path, Path("jfbfast-run"), "Directory of the run."),
        "config": (Path | None, None, "YAML file of settings; flags override it."),
        "resume": (bool, False, "Go on with the run in OUT from its last checkpoints."),
    }
    found = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, typer.Option(help=told)])
        for name, (kind, default, told) in own.items()
    ]
    for name, (kind, told) in setting_types().items():
        flag = next((plain for plain in (bool, int, float) if kind in (plain, plain | None)), str)
        default = getattr(TrainingSettings, name, None)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        if isinstance(default, bool):
            shown = "yes" if default else "no"
        if default is not None:
            told = f"{told} (default: {shown})"
        info = typer.Argument(help=told) if name == "data" else typer.Option(help=told)
        found.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[flag | None, info]))
    return found
