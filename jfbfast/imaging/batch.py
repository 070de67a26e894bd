"""`jfbfast restore`: restore many photographs; one that cannot be restored does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from jfbfast.imaging.photographs import ImageError, check_place, check_unused
from jfbfast.imaging.restoration import Prepare, restore_file


def choose_targets(images: Sequence[Path], out: Path | None, overwrite: bool = False) -> list[Path]:
    """Choose the file for each restoration, and make the directory if it is missing.

    Args:
        images: the photographs.
        out: a file for one image, or the directory for files called NAME-restored.png (a TIFF keeps its suffix); None
            for the current directory.
        overwrite: replace existing files.

    Raises:
        ValueError: an image does not exist; a target exists already, cannot be written, or belongs to two images.
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
    for target in targets:
        check_unused(target, images, overwrite)
    if directory == out:
        directory.mkdir(parents=True, exist_ok=True)
    for target in targets:
        check_place(target)
    return list(targets)


def restore_files(
    images: Sequence[Path],
    targets: Sequence[Path],
    prepare: Prepare,
    *,
    console: Console,
    say_error: Callable[[str], object],
    **options: Any,
) -> int:
    """Restore each photograph by `restore_file`, with a progress bar.

    Args:
        images, targets: from `choose_targets`.
        prepare: from `choose_restorer`.
        say_error: called with the name of each image that cannot be restored, and why.
        options: of `restore_file`.

    Returns:
        How many could not be restored.
    """

    def restore(source: Path, target: Path) -> str:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(escape(source.name))

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            return restore_file(source, target, prepare, progress=progress, **options)

    failed = 0
    for source, target in zip(images, targets, strict=True):
        try:
            how = restore(source, target)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # torch lacks memory: RuntimeError
            say_error(str(error) if isinstance(error, ImageError) else f"{source}: {error}")
            failed += 1
        else:
            console.print(f"{source} → {target} ({how})", highlight=False, markup=False, soft_wrap=True)
    return failed
