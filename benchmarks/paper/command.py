"""The command line of `paper`: an option for each field of `Plan` and each role of a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console

from . import PARTS, run
from .plan import QUICK, Plan
from .study import ROLES


def _parameters() -> Iterator[Parameter]:
    def parameter(name: str, kind: Any, default: Any, info: Any) -> Parameter:
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])

    told = f"Any of {', '.join(PARTS)} (default: all); then a directory of photographs (default: scikit-image's)."
    yield parameter("arguments", list[str] | None, None, typer.Argument(metavar="[PART]… [DATA_DIR]", help=told))
    yield parameter("out", Path, Path("paper"), typer.Option(help="Directory for everything that is made."))
    yield parameter("quick", bool, False, typer.Option(help="Small sizes and few images, to see that it works."))
    for role, takes in ROLES.items():
        default = f" (default: {Plan().checkpoints[role]})" if role in Plan().checkpoints else ""
        info = typer.Option(metavar="NAME|FILE|DIR", help=f"{takes.label}: {takes.takes}.{default}")
        yield parameter(role.replace("-", "_"), str | None, None, info)
    for name, hint in get_type_hints(Plan, include_extras=True).items():
        if not hasattr(hint, "__metadata__"):
            continue
        kind, told = get_args(hint)
        default = getattr(Plan, name)
        if default not in (None, ()):
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            told += f" (default: {'yes' if shown is True else shown})"
        if name == "runs":
            yield parameter(name, list[str] | None, None, typer.Option("--run", metavar="[NAME=]DIR", help=told))
        else:
            yield parameter(name, str | None if name == "sizes" else kind | None, None, typer.Option(help=told))


def paper(arguments: list[str] | None, out: Path, quick: bool, **options: Any) -> None:
    """Make the two tables and two figures of Liu, Tong and Zhao (2024), and the page paper.md of all four."""
    words = arguments or []
    parts = tuple(dict.fromkeys(word for word in words if word in PARTS))
    rest = [word for word in words if word not in PARTS]
    if len(rest) > 1:
        raise ValueError(f"{rest[0]!r} is no part; it takes {', '.join(PARTS)}, and one directory of photographs")
    given = {name: value for name, value in options.items() if value is not None}
    plan = QUICK if quick else Plan()
    networks = {role: given.pop(name) for role in ROLES if (name := role.replace("-", "_")) in given}
    if "resize" in given:
        given["resize"] = given["resize"] or None
    if "sizes" in given:
        try:
            given["sizes"] = tuple(int(size) for size in given["sizes"].split(","))
        except ValueError:
            raise ValueError(f"--sizes is {given['sizes']!r}; it takes integers with commas") from None
    data = Path(rest[0]) if rest else None
    plan = replace(plan, data=data, checkpoints={**plan.checkpoints, **networks}, **given)
    run(out, quick, Console(), plan, parts or PARTS)


paper.__signature__ = Signature(list(_parameters()))  # type: ignore[attr-defined]
paper.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters()}
