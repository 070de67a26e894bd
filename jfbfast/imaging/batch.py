"""Restore files and directories of photographs; one that cannot be restored does not stop the others."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from jfbfast.files import check_writable, write_whole
from jfbfast.imaging.photographs import (
    MOST_PIXELS,
    ImageError,
    check_place,
    check_target,
    check_unused,
    image_files,
    read_photograph,
    write_photograph,
)
from jfbfast.imaging.restoration import Restoration

RESTORED, COMPARISON, TRIALS = "-restored", "-compared", "-trials"  # endings of the names of what is written
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)  # of one photograph; torch lacks memory: RuntimeError
TRIAL_SIDE = 640  # pixels of the middle of a photograph, on which several blurs are tried


class Job(NamedTuple):
    """A photograph, where its restoration goes, and where the picture beside it goes, if there is one."""

    source: Path
    target: Path
    picture: Path


def find_photographs(images: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Find the photographs that files, directories and patterns such as ``'*.jpg'`` stand for.

    In a directory, what an earlier call wrote there is left out: names that end in -restored, -compared or -trials.

    Returns:
        Each photograph, and its place below the directory that was given; for a file, its name.

    Raises:
        ImageError: a file that does not exist, a directory or a pattern without photographs.
    """
    found = []
    for image in images:
        if image.is_dir():
            files = [file for file in image_files(image) if not file.stem.endswith((RESTORED, COMPARISON, TRIALS))]
            if not files:
                raise ImageError(f"{image}: no image files there that are not restored ones")
            found += [(file, file.relative_to(image)) for file in files]
        elif not os.path.lexists(image) and glob.has_magic(str(image)):
            files = [Path(name) for name in sorted(glob.glob(str(image), recursive=True))]
            if not files:
                raise ImageError(f"{image}: no file has such a name")
            found += [(file, Path(file.name)) for file in files]
        else:
            if not image.exists():
                raise ImageError(f"{image}: there is no such file")
            found.append((image, Path(image.name)))
    return found


def plan_jobs(
    images: Sequence[Path], out: Path | None, overwrite: bool = False, restores: bool = True, picture: str = ""
) -> list[Job]:
    """Choose the files for each restoration, and make the directories that are missing.

    Args:
        images: photographs, directories, and patterns.
        out: a file for one photograph; a pattern with {name}, which stands for a photograph's name without its suffix;
            or the directory for files called NAME-restored.png (a TIFF keeps its suffix), with the subdirectories of
            the directories that are given. None for the current directory.
        overwrite: replace existing files.
        restores: whether the restorations are written.
        picture: the ending of the name of the picture beside it, COMPARISON or TRIALS; "" for none.

    Raises:
        ValueError: an image does not exist; a target exists already, cannot be written, or belongs to two images.
    """
    photographs = find_photographs(images)
    pattern = out is not None and "{name}" in out.name
    if out is not None and out.suffix and not out.is_dir() and not pattern and len(photographs) > 1:
        raise ValueError(f"--out is the file {out}; several images take a directory, or a name with {{name}} in it")
    jobs, sources = [], [source for source, _ in photographs]
    owners: dict[Path, Path] = {}
    for source, place in photographs:
        suffix = source.suffix if source.suffix.lower() in (".tif", ".tiff") else ".png"
        if pattern:
            assert out is not None
            target = out.with_name(out.name.replace("{name}", source.stem))
        elif out is not None and out.suffix and not out.is_dir():
            target = out
        else:
            target = (Path() if out is None else out) / place.parent / f"{source.stem}{RESTORED}{suffix}"
        if (other := owners.setdefault(target, source)) is not source:
            raise ValueError(f"{other} and {source} would both become {target}; restore them into two directories")
        beside = target.with_name(f"{target.stem.removesuffix(RESTORED)}{picture}.png")
        jobs.append(Job(source, target, beside))
    written = [job.target for job in jobs if restores] + [job.picture for job in jobs if picture]
    for path in written:
        check_unused(path, sources, overwrite)
    if out is None or not out.suffix or pattern or out.is_dir():
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
    for path in written:
        check_place(path)
    return jobs


def restore_file(
    job: Job,
    restoration: Restoration,
    *,
    compare: bool = False,
    overwrite: bool = False,
    most_pixels: int = MOST_PIXELS,
    **options: Any,
) -> tuple[str, dict[str, Any]]:
    """Restore a photograph into another file; its depth, alpha, colour profile, EXIF and resolution are kept.

    Args:
        job: from `plan_jobs`.
        restoration: what restores it.
        compare: also write a picture of the photograph and its restoration.
        overwrite: replace existing files.
        most_pixels: a larger photograph is refused before it is decoded.
        options: of `Restoration.__call__`.

    Returns:
        How it was restored, in words, and for the report.

    Raises:
        ImageError: a file that cannot be read or written, or that exists already.
        ValueError: as `restore_tiled`.
    """
    photograph = read_photograph(job.source, most_pixels=most_pixels)
    for path in (job.target, job.picture) if compare else (job.target,):
        check_unused(path, [job.source], overwrite)
    check_target(job.target, photograph)
    d = 2 * photograph.pixels - 1
    image, report = restoration(d, str(job.source), **options)
    write_photograph(job.target, photograph._replace(pixels=(image + 1) / 2), overwrite=overwrite)
    values = {"restored": str(job.target), **report.values()}
    if compare:
        _write_picture(job, {"before": d, "after": image}, overwrite)
        values["compared"] = str(job.picture)
    return f"{job.target} ({report})", values


def try_file(
    job: Job, restorations: Sequence[Restoration], *, overwrite: bool = False, **options: Any
) -> tuple[str, dict[str, Any]]:
    """Restore the middle of a photograph for several blurs, and write one picture of them side by side.

    Args and returns as `restore_file`.
    """
    check_unused(job.picture, [job.source], overwrite)
    d = 2 * read_photograph(job.source).pixels - 1
    top, left = (max(0, (side - TRIAL_SIDE) // 2) for side in d.shape[-2:])
    middle = d[:, top : top + TRIAL_SIDE, left : left + TRIAL_SIDE].contiguous()
    images, trials = {"as it is": middle}, []
    for restoration in restorations:
        image, report = restoration(middle, str(job.source), **options)
        images[str(restoration.blur).removeprefix("a Gaussian of ")] = image
        trials.append(report.values())
    _write_picture(job, images, overwrite)
    return str(job.picture), {"compared": str(job.picture), "trials": trials}


def _write_picture(job: Job, images: dict[str, torch.Tensor], overwrite: bool) -> None:
    from jfbfast.imaging.plots import side_by_side

    height, width = next(iter(images.values())).shape[-2:]
    side = max(1, min(height, width, max(96, min(height, width) // 4), 256))
    detail = ((height - side) // 2, (width - side) // 2, side)
    title = job.source.name
    write_whole(job.picture, lambda partial: side_by_side(images, partial, detail, title), overwrite=overwrite)


def failure(job: Job, error: Exception) -> str:
    """Say in one sentence why a photograph could not be restored."""
    return str(error) if isinstance(error, ImageError) else f"{job.source}: {error}"


def restore_files(
    jobs: Sequence[Job],
    restorations: Sequence[Restoration],
    *,
    console: Console,
    say_error: Callable[[str], object],
    report: Path | None = None,
    compare: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> int:
    """Restore each photograph by `restore_file`, or by `try_file` if there are several restorations, with progress.

    Args:
        jobs: from `plan_jobs`.
        restorations: one, or several to be compared.
        say_error: called with the name of each photograph that cannot be restored, and why.
        report: a JSON file that gets, for each photograph, how it was restored.
        compare, overwrite, options: of `restore_file`.

    Returns:
        How many could not be restored.
    """
    if report is not None:
        check_writable(report)

    def restore(job: Job, bar: Progress) -> tuple[str, dict[str, Any]]:
        task = bar.add_task(escape(job.source.name))

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if len(restorations) > 1:
            return try_file(job, restorations, overwrite=overwrite, progress=progress, **options)
        return restore_file(job, restorations[0], compare=compare, overwrite=overwrite, progress=progress, **options)

    rows: list[dict[str, Any]] = []
    for number, job in enumerate(jobs, 1):
        row: dict[str, Any] = {"photograph": str(job.source)}
        rows.append(row)
        try:
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                how, values = restore(job, bar)
        except FAILURES as error:
            row["error"] = failure(job, error)
            say_error(row["error"])
        else:
            row |= values
            count = f"[{number}/{len(jobs)}] " if len(jobs) > 1 else ""
            console.print(f"{count}{job.source} → {how}", highlight=False, markup=False, soft_wrap=True)
    if report is not None:
        text = json.dumps(rows, indent=2, ensure_ascii=True) + "\n"
        write_whole(report, lambda partial: partial.write_text(text, encoding="utf-8"))
    return sum("error" in row for row in rows)
