"""The page that holds the parts: their tables as Markdown, and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import machine
from .plan import Plan
from .study import LABELS, Study


@dataclass(frozen=True)
class Section:
    """One part.

    Attributes:
        title: its heading.
        text: Markdown.
        picture: file name of its PNG.
        data: file names of its CSVs.
    """

    title: str
    text: str
    picture: str
    data: tuple[str, ...]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path, sections: Sequence[Section], plan: Plan, study: Study | None) -> None:
    about = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [
        "# The paper's tables and figures, measured here",
        "",
        "By `jfbfast bench paper`, after Liu, Tong and Zhao (2024), "
        "[arXiv 2402.02065](https://arxiv.org/abs/2402.02065). "
        "PSNR at the true range 2 of images in [−1, 1], and, where it says so, with a peak of 1, as the paper's code.",
        "",
        f"jfbfast {about.jfbfast}, torch {about.torch}, {about.device} ({about.instruction_sets}), "
        f"{about.threads} threads, seed {plan.seed}.",
    ]
    if study is not None and study.missing:
        lines += ["", "Missing:", ""]
        lines += [f"- {LABELS[name]}: {why}." for name, why in study.missing.items()]
    for section in sections:
        data = ", ".join(f"[{name}]({name})" for name in section.data)
        lines += ["", f"## {section.title}", "", section.text, "", f"![{section.title}]({section.picture})", ""]
        lines += [f"Data: {data}."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
