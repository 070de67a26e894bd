"""`paper`: the two tables and two figures of Liu, Tong and Zhao (2024), measured here.

Each part writes its numbers as CSV and a picture; all parts together also write the page paper.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

import jfbfast

from .plan import QUICK, Plan

_HEADING = """# The paper's tables and figures, measured here

By `jfbfast bench paper`, after Liu, Tong and Zhao (2024), [arXiv 2402.02065](https://arxiv.org/abs/2402.02065).
PSNR at the true range 2 of images in [−1, 1] and, where marked, with a peak of 1, as in the paper's code."""
PARTS = ("figure1", "table1", "table2", "figure2")


def run(out: Path, quick: bool, console: Console, plan: Plan | None = None, parts: tuple[str, ...] = PARTS) -> None:
    """Make the ``parts`` of ``plan``, or else of a small or the default one; the directory is created if missing.

    Raises:
        ValueError: an unknown part, options that contradict each other, or a checkpoint for another role.
        ImageError: a photograph that cannot be used.
    """
    from .. import machine
    from . import figure1, figure2, tables
    from .study import LABELS, Study, free_photographs, load_networks, measurement

    for part in parts:
        if part not in PARTS:
            raise ValueError(f"there is no part {part!r} of the paper; there are {', '.join(PARTS)}")
    plan = plan or (QUICK if quick else Plan())
    out.mkdir(parents=True, exist_ok=True)
    if plan.data is None and parts != ("figure2",):
        plan = replace(plan, data=free_photographs(out / "photographs", plan.resize))
        console.print("No directory of photographs is given; taking three of scikit-image's.", highlight=False)
    study = Study(plan, console) if {"table1", "table2"} & set(parts) else None
    sections = []
    for part in parts:
        console.rule(part)
        if part == "figure1":
            setting = study.setting if study else measurement(plan, load_networks(plan))
            sections.append(figure1.run(plan, setting, out, console))
        elif part == "figure2":
            sections.append(figure2.run(plan, out, console))
        elif study is not None:
            make = tables.table1 if part == "table1" else tables.table2
            sections.append(make(study, out))
    if study is not None and set(parts) == set(PARTS):
        missing = [f"- {LABELS[name]}: {why}." for name, why in study.missing.items()]
        if missing:
            sections.insert(0, "Missing:\n\n" + "\n".join(missing))
        about = f"jfbfast {jfbfast.__version__}; {machine.about(machine.default_device())}; seed {plan.seed}."
        (out / "paper.md").write_text("\n\n".join([_HEADING, about, *sections]) + "\n", encoding="utf-8")
        console.print(f"The page: {out / 'paper.md'}", highlight=False)
