"""Restore files and directories of photographs; one that cannot be restored does not stop the others."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from jfbfast.files import write_whole
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
    """A photograph, where its restoration goes, and where the picture beside it goes, if there is one.

    Attributes:
        written: those of the two files that are written.
    """

    source: Path
    target: Path
    picture: Path | None
    written: tuple[Path, ...]

    def done(self) -> bool:
        """Whether all is written; each file appears only when it is whole."""
        return all(path.is_file() for path in self.written)


def find_photographs(images: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Find the photographs that files, directories and patterns such as ``'*.jpg'`` stand for.

    In a directory, and for a pattern, what an earlier call wrote is left out: names that end in -restored, -compared or
    -trials.

    Returns:
        Each photograph, and its place below the directory that was given; for a file, its name.

    Raises:
        ImageError: a file that does not exist, a directory or a pattern without photographs.
    """

    def given(files: Sequence[Path]) -> list[Path]:
        return [file for file in files if not file.stem.endswith((RESTORED, COMPARISON, TRIALS))]

    found = []
    for image in images:
        if image.is_dir():
            files = given(image_files(image))
            if not files:
                raise ImageError(f"{image}: no image files there that are not restored ones")
            found += [(file, file.relative_to(image)) for file in files]
        elif not os.path.lexists(image) and glob.has_magic(str(image)):
            files = given([Path(name) for name in sorted(glob.glob(str(image), recursive=True))])
            if not files:
                raise ImageError(f"{image}: no file has such a name that is not a restored one")
            found += [(file, Path(file.name)) for file in files]
        else:
            if not image.exists():
                raise ImageError(f"{image}: there is no such file")
            found.append((image, Path(image.name)))
    return found


def plan_jobs(
    images: Sequence[Path],
    out: Path | None,
    overwrite: bool = False,
    restores: bool = True,
    picture: str = "",
    skip_existing: bool = False,
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
        skip_existing: allow for existing files, which are kept.

    Raises:
        ValueError: an image does not exist; a target exists already, cannot be written, or belongs to two images.
    """
    if overwrite and skip_existing:
        raise ValueError("--overwrite and --skip-existing are given; restore takes one of them")
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
        beside = target.with_name(f"{target.stem.removesuffix(RESTORED)}{picture}.png") if picture else None
        job = Job(source, target, beside, (target,) * restores + (() if beside is None else (beside,)))
        for path in (target, *job.written):
            if (other := owners.setdefault(path, source)) is not source:
                raise ValueError(f"{other} and {source} would both become {path}; restore them into two directories")
        jobs.append(job)
    if skip_existing:  # an earlier call may have put its files among the photographs
        made = {path: job.source for job in jobs for path in job.written}
        jobs = [job for job in jobs if made.get(job.source, job.source) is job.source]
        sources = [job.source for job in jobs]
    written = [path for job in jobs for path in job.written]
    for path in written:
        check_unused(path, sources, overwrite or skip_existing)
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
    overwrite: bool = False,
    skip_existing: bool = False,
    most_pixels: int = MOST_PIXELS,
    **options: Any,
) -> tuple[str, dict[str, Any]]:
    """Restore a photograph into another file; its depth, alpha, colour profile, EXIF and resolution are kept.

    Args:
        job: from `plan_jobs`.
        restoration: what restores it.
        overwrite: replace existing files.
        skip_existing: keep existing files, and write the others.
        most_pixels: a larger photograph is refused before it is decoded.
        options: of `Restoration.__call__`.

    Returns:
        How it was restored, in words, and for the report.

    Raises:
        ImageError: a file that cannot be read or written, or that exists already.
        ValueError: as `restore_tiled`.
    """
    photograph = read_photograph(job.source, most_pixels=most_pixels)
    missing = [path for path in job.written if not (skip_existing and path.is_file())]
    for path in missing:
        check_unused(path, [job.source], overwrite)
    check_target(job.target, photograph)
    d = 2 * photograph.pixels - 1
    image, report = restoration(d, str(job.source), **options)
    if job.target in missing:
        write_photograph(job.target, photograph._replace(pixels=(image + 1) / 2), overwrite=overwrite)
    values = {"restored": str(job.target), **report.values()}
    if job.picture is not None:
        if job.picture in missing:
            _write_picture(job.picture, job.source.name, {"before": d, "after": image}, overwrite)
        values["compared"] = str(job.picture)
    return f"{job.target} ({report})", values


def try_file(
    job: Job, restorations: Sequence[Restoration], *, overwrite: bool = False, **options: Any
) -> tuple[str, dict[str, Any]]:
    """Restore the middle of a photograph for several blurs, and write one picture of them side by side.

    Args and returns as `restore_file`.
    """
    assert job.picture is not None
    check_unused(job.picture, [job.source], overwrite)
    d = 2 * read_photograph(job.source).pixels - 1
    top, left = (max(0, (side - TRIAL_SIDE) // 2) for side in d.shape[-2:])
    middle = d[:, top : top + TRIAL_SIDE, left : left + TRIAL_SIDE].contiguous()
    images, trials = {"as it is": middle}, []
    for restoration in restorations:
        image, report = restoration(middle, str(job.source), **options)
        images[str(restoration.blur).removeprefix("a Gaussian of ")] = image
        trials.append(report.values())
    _write_picture(job.picture, job.source.name, images, overwrite)
    return str(job.picture), {"compared": str(job.picture), "trials": trials}


def _write_picture(path: Path, title: str, images: dict[str, torch.Tensor], overwrite: bool) -> None:
    from jfbfast.imaging.plots import side_by_side

    height, width = next(iter(images.values())).shape[-2:]
    side = max(1, min(height, width, max(96, min(height, width) // 4), 256))
    detail = ((height - side) // 2, (width - side) // 2, side)
    write_whole(path, lambda partial: side_by_side(images, partial, detail, title), overwrite=overwrite)


def failure(job: Job, error: Exception) -> str:
    """Say in one sentence why a photograph could not be restored."""
    return str(error) if isinstance(error, ImageError) else f"{job.source}: {error}"


def restore_files(
    jobs: Sequence[Job],
    restorations: Sequence[Restoration],
    *,
    console: Console,
    say_error: Callable[[str], object],
    numbers: Iterable[int] | None = None,
    report: Path | None = None,
    overwrite: bool = False,
    skip_existing: bool = False,
    **options: Any,
) -> int:
    """Restore each photograph by `restore_file`, or by `try_file` if there are several restorations, with progress.

    Args:
        jobs: from `plan_jobs`.
        restorations: one, or several to be compared.
        say_error: called with the name of each photograph that cannot be restored, and why.
        numbers: the indices of the jobs that this process does, which may depend on what others do; None for all.
        report: a JSON file for which `write_report` will find, for each photograph, how it was restored.
        overwrite, options: of `restore_file`.
        skip_existing: leave out photographs whose files are all there.

    Returns:
        How many could not be restored.
    """

    def restore(job: Job, bar: Progress) -> tuple[str, dict[str, Any]]:
        task = bar.add_task(escape(job.source.name))

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if len(restorations) > 1:
            return try_file(job, restorations, overwrite=overwrite, progress=progress, **options)
        kept: dict[str, Any] = {"overwrite": overwrite, "skip_existing": skip_existing}
        return restore_file(job, restorations[0], progress=progress, **kept, **options)

    failed = 0
    for number in range(len(jobs)) if numbers is None else numbers:
        job = jobs[number]
        if skip_existing and job.done():
            continue
        row: dict[str, Any] = {"photograph": str(job.source)}
        try:
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                how, values = restore(job, bar)
        except FAILURES as error:
            row["error"] = failure(job, error)
            say_error(row["error"])
            failed += 1
        else:
            row |= values
            count = f"[{number + 1}/{len(jobs)}] " if len(jobs) > 1 else ""
            console.print(f"{count}{job.source} → {how}", highlight=False, markup=False, soft_wrap=True)
        if report is not None:
            _write_json(_part(report, job), row)
    return failed


def _part(report: Path, job: Job) -> Path:
    """The file that keeps a photograph's part of the report until `write_report`, also if the program is killed."""
    name = hashlib.sha256(os.fsencode(job.source)).hexdigest()[:32]
    return report.with_name(f"{report.name}.parts") / f"{name}.json"


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, ensure_ascii=True) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # as if it were not there


def write_report(report: Path, jobs: Sequence[Job]) -> None:
    """Write how each photograph was restored, after all of them have been: by this call, or by an earlier one.

    Raises:
        OSError: the file cannot be written, or other processes wrote their parts of it to another machine.
    """
    earlier = _read_json(report)
    known = {}
    for row in earlier if isinstance(earlier, list) else ():
        if isinstance(row, dict) and "error" not in row:
            known[row.get("photograph")] = row
    rows, lost = [], []
    for job in jobs:
        name = str(job.source)
        row = _read_json(_part(report, job)) or known.get(name)
        if row is None and job.done():
            row = {"photograph": name, "kept": [str(path) for path in job.written]}  # made by a call without a report
        if row is None:
            lost.append(name)
        else:
            rows.append(row)
    _write_json(report, rows)
    for job in jobs:
        _part(report, job).unlink(missing_ok=True)
    with suppress(OSError):
        report.with_name(f"{report.name}.parts").rmdir()
    if lost:
        told = f"{report} lacks {len(lost)} photographs, such as {lost[0]}"
        raise OSError(f"{told}; it takes a folder that all machines share, and so do the restored photographs")
