"""The command line of `paper`: `jfbfast bench paper …` and `python -m jfbfast.benchmarks paper …`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jfbfast.config import keep_freed_memory

from . import PARTS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _network(told: str) -> Any:
    return typer.Option(metavar="NAME|FILE", help=told)


def _say_error(error: Exception | str) -> None:
    Console(stderr=True).print(f"error: {error}", highlight=False, markup=False)


@app.command()
def paper(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART]… [DATA_DIR]",
            help=f"Of {', '.join(PARTS)}; without one, all. Then a directory of photographs; without one, three "
            "of scikit-image's.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for everything that is made.")] = Path("paper"),
    quick: Annotated[bool, typer.Option(help="Small sizes and few images, to see that it works.")] = False,
    ours: Annotated[str | None, _network("A DE-GRAD in our form, trained by JFB. (default: gaussian5-sigma1)")] = None,
    paper: Annotated[str | None, _network("A DE-GRAD in the paper's form, trained by JFB.")] = None,
    implicit: Annotated[str | None, _network("A DE-GRAD trained by the exact gradient.")] = None,
    unrolled: Annotated[str | None, _network("A DE-GRAD trained unrolled.")] = None,
    feed_forward: Annotated[str | None, _network("A feed-forward network.")] = None,
    denoiser: Annotated[str | None, _network("The denoiser of plug-and-play.")] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Directory of jfbfast train for figure1; may be repeated. (default: figure1 trains two)",
        ),
    ] = None,
    published: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="Also train the paper's layer by its published loop for so long, for figure1. (default: no)",
        ),
    ] = None,
    kernel_size: Annotated[
        int | None, typer.Option(help="Side of the blur in pixels, odd. (default: that of --ours)")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Standard deviation of the blur in pixels. (default: that of --ours)")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation of the noise on [−1, 1]. (default: that of --ours)")
    ] = None,
    padding_mode: Annotated[
        str | None, typer.Option(help="What the blur sees beyond the edge. (default: that of --ours)")
    ] = None,
    train: Annotated[
        float | None,
        typer.Option(
            help="Photographs that the tables leave out, first by name: a share or a count. "
            "(default: those that a network's run trained on, or 0)"
        ),
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            help="Photographs that choose parameters, next by name: a share or a count. "
            "(default: those that it validated on, or 0.2)"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most photographs to score, of the rest. (default: all)")] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            help="First resize to a square of this side in pixels, as the paper; 0 for as they are. (default: 128)"
        ),
    ] = None,
    squash: Annotated[
        bool | None,
        typer.Option(
            help="With --resize, stretch to that square, as the paper, in place of keeping the centre. (default: yes)"
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images restored together. (default: 16)")] = None,
    pictures: Annotated[int | None, typer.Option(help="Images in table1. (default: 3)")] = None,
    images: Annotated[
        int | None, typer.Option(help="Photographs that figure1 trains and validates on, 80 to 20. (default: 2000)")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Batches of figure1's training. (default: 2000)")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of figure1's crops in pixels. (default: 128)")] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="Sides of figure2's images in pixels, with commas between. (default: 16,32,48,…,128)"),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Evaluations of the layer in figure2's solves. (default: 20)")
    ] = None,
    cap: Annotated[
        float | None, typer.Option(help="Seconds that a step may take for figure2 to measure it. (default: 120)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
) -> None:
    """Make the two tables and two figures of Liu, Tong and Zhao (2024), and the page paper.md of all four."""
    from . import run as make
    from .plan import QUICK, Plan

    keep_freed_memory()
    parts = tuple(dict.fromkeys(word for word in arguments or () if word in PARTS))
    rest = [word for word in arguments or () if word not in PARTS]
    given = {
        "kernel_size": kernel_size,
        "sigma": sigma,
        "noise": noise,
        "padding_mode": padding_mode,
        "train": train,
        "validation": validation,
        "limit": limit,
        "squash": squash,
        "batch_size": batch_size,
        "pictures": pictures,
        "runs": tuple(run or ()),
        "published": published,
        "images": images,
        "steps": steps,
        "crop": crop,
        "evaluations": evaluations,
        "cap": cap,
        "seed": seed,
    }
    networks = {
        "denoiser": denoiser,
        "feed-forward": feed_forward,
        "unrolled": unrolled,
        "implicit": implicit,
        "paper": paper,
        "ours": ours,
    }
    try:
        if len(rest) > 1:
            raise ValueError(f"{rest[0]!r} is no part; it takes {', '.join(PARTS)}, and one directory of photographs")
        plan = QUICK if quick else Plan()
        checkpoints = dict(plan.checkpoints) | {role: each for role, each in networks.items() if each is not None}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if resize is not None:
            chosen["resize"] = resize or None
        if sizes is not None:
            chosen["sizes"] = _integers(sizes)
        data = Path(rest[0]) if rest else None
        make(out, quick, Console(), replace(plan, data=data, checkpoints=checkpoints, **chosen), parts or PARTS)
    except ModuleNotFoundError as error:
        _say_error(f"{error.name} is not installed; pip install 'jfbfast[bench]'")
        raise typer.Exit(1) from error
    except (ValueError, OSError) as error:
        _say_error(error)
        raise typer.Exit(1) from error


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--sizes is {text!r}; it takes integers with commas") from None
