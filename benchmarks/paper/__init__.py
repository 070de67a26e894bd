"""`paper`: the two tables and two figures of Liu, Tong and Zhao (2024), measured here.

Each part writes its figures as CSV and a picture; together they write the page paper.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from jfbfast.models.config import SETTING

from .plan import QUICK, Plan

PARTS = ("figure1", "table1", "table2", "figure2")


def run(out: Path, quick: bool, console: Console, plan: Plan | None = None, parts: tuple[str, ...] = PARTS) -> None:
    """Make the parts, and of all of them together the page ``out``/paper.md.

    Args:
        out: the directory, made where missing.
        quick: small, where no ``plan`` is given.
        plan: what to make the parts of.
        parts: of `PARTS`.

    Raises:
        ValueError: a part that is none, options that contradict each other, or a checkpoint of another kind
            than its option takes.
        ImageError: a photograph that cannot be used.
    """
    from . import figure1, figure2, page, table1, table2
    from .study import Study, free_photographs, load_networks, measurement

    for part in parts:
        if part not in PARTS:
            raise ValueError(f"there is no part {part!r} of the paper; there are {', '.join(PARTS)}")
    plan = plan or (QUICK if quick else Plan())
    out.mkdir(parents=True, exist_ok=True)
    if plan.data is None and parts != ("figure2",):
        plan = replace(plan, data=free_photographs(out / "photographs", plan.resize))
        console.print("No directory of photographs is given; taking three of scikit-image's.", highlight=False)
    study = Study(plan, console) if {"table1", "table2"} & set(parts) else None
    if "figure1" in parts:
        setting = measurement(plan, load_networks(plan)) if study is None else study.setting
        plan = replace(plan, **{name: getattr(setting, name) for name in SETTING})
    sections = []
    for part in parts:
        console.rule(part)
        if part == "figure1":
            sections.append(figure1.run(plan, out, console))
        elif part == "figure2":
            sections.append(figure2.run(plan, out, console))
        else:
            assert study is not None
            sections.append((table1 if part == "table1" else table2).run(study, out, console))
    if set(parts) == set(PARTS):
        page.write(out / "paper.md", sections, plan, study)
        console.print(f"The page: {out / 'paper.md'}", highlight=False)
