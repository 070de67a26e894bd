"""The page that shows all parts: their tables as Markdown, and their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import machine


@dataclass(frozen=True)
class Section:
    """One part: its heading, its Markdown, and the names of its picture and its CSV files."""

    title: str
    text: str
    picture: str
    data: tuple[str, ...]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with text in the first column and numbers in the others."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path, sections: Sequence[Section], seed: int, missing: Mapping[str, str]) -> None:
    """Write the page; ``missing`` tells why a method is not in the tables."""
    about = machine.describe(machine.default_device())
    blocks = [
        "# The paper's tables and figures, measured here",
        "By `jfbfast bench paper`, after Liu, Tong and Zhao (2024), "
        "[arXiv 2402.02065](https://arxiv.org/abs/2402.02065). "
        "PSNR at the true range 2 of images in [−1, 1] and, where marked, with a peak of 1, as in the paper's code.",
        f"jfbfast {about.jfbfast}, torch {about.torch}, {about.device} ({about.instruction_sets}), "
        f"{about.threads} threads, seed {seed}.",
    ]
    if missing:
        blocks += ["Missing:", "\n".join(f"- {label}: {why}." for label, why in missing.items())]
    for section in sections:
        data = ", ".join(f"[{name}]({name})" for name in section.data)
        blocks += [f"## {section.title}", section.text, f"![{section.title}]({section.picture})", f"Data: {data}."]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
