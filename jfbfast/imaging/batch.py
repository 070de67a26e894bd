"""`jfbfast restore`: many photographs, of which one that cannot be restored leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from jfbfast.imaging.photographs import ImageError, check_place, check_unused, file_identity
from jfbfast.imaging.restoration import Prepare, restore_file


def choose_targets(images: Sequence[Path], out: Path | None, overwrite: bool = False) -> list[Path]:
    """Where each restoration goes; a directory that is not there is made.

    Args:
        images: the photographs.
        out: a file for one image, or a directory for NAME-restored.png, or .tiff of a TIFF; None for this one.
        overwrite: replace files that are there.

    Raises:
        ValueError: an image that does not exist; a target that is taken, cannot be written, or is that of two.
    """
    if out is not None and out.suffix and not out.is_dir():
        if len(images) > 1:
            raise ValueError(f"--out is the file {out}; several images take a directory")
        directory, targets = out.parent, {out: images[0]}
    else:
        directory, targets = Path() if out is None else out, {}
        for image in images:
            suffix = image.suffix if image.suffix.lower() in (".tif", ".tiff") else ".png"
            target = directory / f"{image.stem}-restored{suffix}"
            if (other := targets.setdefault(target, image)) is not image:
                raise ValueError(f"{other} and {image} would both become {target}; restore them into two directories")
    for image in images:
        if not image.exists():
            raise ImageError(f"{image}: there is no such file")
    sources = {file_identity(image) for image in images}
    for target in targets:
        check_unused(target, sources, overwrite)
    if directory == out:
        directory.mkdir(parents=True, exist_ok=True)
    for target in targets:
        check_place(target)
    return list(targets)


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def restore_files(
    images: Sequence[Path],
    targets: Sequence[Path],
    prepare: Prepare,
    *,
    console: Console,
    say_error: Callable[[str], object],
    tile: int = 512,
    overlap: int | None = None,
    check_tiles: bool = False,
    overwrite: bool = False,
) -> int:
    """`restore_file` for each, with a bar; how many could not be restored.

    Args:
        images, targets: of `choose_targets`.
        prepare, tile, overlap, check_tiles, overwrite: of `restore_file`.
        say_error: is told of each image that cannot be restored, and why.
    """
    failed = 0
    for source, target in zip(images, targets, strict=True):
        try:
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                how = restore_file(
                    source,
                    target,
                    prepare,
                    tile=tile,
                    overlap=overlap,
                    check_tiles=check_tiles,
                    progress=partial(_advance, bar, bar.add_task(escape(source.name))),
                    overwrite=overwrite,
                )
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # the third is torch's, of memory too
            say_error(str(error) if isinstance(error, ImageError) else f"{source}: {error}")
            failed += 1
        else:
            console.print(f"{source} → {target} ({how})", highlight=False, markup=False, soft_wrap=True)
    return failed
