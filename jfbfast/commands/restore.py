"""`jfbfast restore`: undo a known blur in photographs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from jfbfast.commands.common import make_console, one_sentence, say_error
from jfbfast.experiments.processes import check_launch, rank
from jfbfast.imaging.blurs import AUTO, SIGMAS, BlurChoice, numbers
from jfbfast.imaging.plausibility import TOLERANCE

_PATIENCE = 7200.0  # seconds that a process waits for the others' last photographs


def _blurs(
    sigmas: list[str], psf: Path | None, motion: str | None, defocus: float | None, kernel_size: int | None, known: bool
) -> list[BlurChoice | None]:
    """The blur that the options give; several for several --sigma; None if none is, and the network knows its own."""
    if known and not sigmas and (psf, motion, defocus, kernel_size) == (None,) * 4:
        return [None]
    moved = None if motion is None else numbers("--motion", motion, (2,), "a length in pixels and an angle in degrees")
    found: list[BlurChoice | None] = []
    for text in sigmas:
        if text == AUTO:
            found.append(BlurChoice(AUTO, psf, moved, defocus, kernel_size))
            continue
        values = numbers("--sigma", text, (1, 2), SIGMAS)
        found.append(BlurChoice(values[0] if len(values) == 1 else values, psf, moved, defocus, kernel_size))
    return found or [BlurChoice(None, psf, moved, defocus, kernel_size)]


def restore(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE…",
            readable=False,  # a file that cannot be read is reported in its turn
            help="Blurred photographs, directories of them, or patterns such as '*.jpg'; grey or colour, of 8 or 16 "
            "bits: JPEG, PNG, TIFF, WebP, BMP, PGM or PPM.",
        ),
    ],
    sigma: Annotated[
        list[str] | None,
        typer.Option(
            metavar="σ|σy,σx|auto",
            help="The blur: a Gaussian with this standard deviation in pixels, or two of them, down and across; or "
            "auto, to estimate it. "
            "Several --sigma are tried on the middle of each photograph, and shown side by side in NAME-trials.png.",
        ),
    ] = None,
    psf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The blur: its image of a point, as .png, .tif or .npy.")
    ] = None,
    motion: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTH,ANGLE",
            help="The blur: a straight motion, its length in pixels and its angle in degrees, "
            "counter-clockwise from the x axis.",
        ),
    ] = None,
    defocus: Annotated[
        float | None, typer.Option(metavar="RADIUS", help="The blur: a disc with this radius in pixels.")
    ] = None,
    kernel_size: Annotated[
        int | None, typer.Option(help="Side of the Gaussian's kernel in pixels, odd. (default: 2⌈3σ⌉ + 1)")
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            metavar="ν|auto",
            help="Standard deviation of the noise on [−1, 1], as the file encodes the values; rounding to 8 bits alone "
            "is 0.0023. auto estimates it. (default: auto, or that of a network that was trained for one)",
        ),
    ] = None,
    light: Annotated[
        str,
        typer.Option(
            help="What the blur acted on: linear light, as a lens or a motion does, or the encoded values of the file, "
            "as most image editors do."
        ),
    ] = "linear",
    tolerance: Annotated[
        float, typer.Option(help="By which share the size of the blur may be wrong; 0 if it is exact.")
    ] = TOLERANCE,
    padding_mode: Annotated[
        str,
        typer.Option(
            help="What the blur saw beyond the photograph's edges: valid, if that is unknown; or replicate, reflect, "
            "circular, or, with --light encoded, zeros (mid-grey)."
        ),
    ] = "valid",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|DIR",
            help="What restores: a shipped model, a file or directory from train or save_pretrained, or tikhonov. "
            "(default: the shipped model universal; with --kernel-size, a shipped one that was trained for it)",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A directory; or a .png, .tiff or .jpg, with {name} in its name for several photographs. "
            "(default: here, as NAME-restored.png or .tiff)"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output files.")] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Leave out photographs whose output files are there, and so go on with a call that was interrupted.",
        ),
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also write NAME-compared.png, with the photograph before and after.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Write how each photograph was restored; it replaces an older report, but with --skip-existing keeps "
            "what that says of photographs that are left out.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to restore: cpu or cuda.")] = "cpu",
    tile: Annotated[int, typer.Option(help="Side of the tiles in pixels, which are restored one by one.")] = 768,
    overlap: Annotated[int | None, typer.Option(help="Pixels that tiles share. (default: enough for no seam)")] = None,
    check_tiles: Annotated[bool, typer.Option(help="Also restore in one piece, and print the difference.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Undo a known blur in photographs of up to 250 megapixels.

    Give the blur by one of --sigma, --psf, --motion and --defocus; --sigma auto estimates a Gaussian one.

    The restored files keep depth, alpha, colour profile, EXIF and resolution. Nothing is restored if an IMAGE is
    missing, or if an output file exists or cannot be written. If one IMAGE cannot be restored, the others still are.
    In a directory, and for a pattern, names that end in -restored, -compared or -trials are left out.

    For several GPUs or machines use torchrun --nproc-per-node N -m jfbfast restore … --out DIR --skip-existing. The
    processes share the photographs, and each takes a GPU of its own with --device cuda.
    """
    with one_sentence():
        from jfbfast.backends.tensors import usable_device
        from jfbfast.experiments.team import agreed, gathered, local_device, shared, team
        from jfbfast.files import check_writable
        from jfbfast.imaging.batch import COMPARISON, TRIALS, Job, plan_jobs, restore_files, write_report
        from jfbfast.imaging.restoration import Restoration
        from jfbfast.imaging.tiling import LEAST_TILE

        console = make_console(quiet=quiet or rank() > 0)
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)

        def plan() -> tuple[tuple[list[Job], list[Restoration]], list[str]]:
            """The photographs and what restores them; and their names, which must be those of every process."""
            if tile < LEAST_TILE:
                raise ValueError(f"--tile is {tile}; it takes an integer of at least {LEAST_TILE}")
            if report is not None and report.suffix != ".json":
                raise ValueError(f"--report is {report}; it takes a name that ends in .json")
            level = noise if noise in (None, AUTO) else numbers("--noise", noise, (1,), "a number, or auto")[0]
            choices = _blurs(sigma or [], psf, motion, defocus, kernel_size, checkpoint not in (None, "tikhonov"))
            trials = len(choices) > 1
            if trials and compare:
                raise ValueError("--compare is given; it takes one --sigma, since several are compared anyway")
            restorations = [
                Restoration(
                    choice,
                    noise=level,
                    light=light,
                    padding_mode=padding_mode,
                    checkpoint=checkpoint,
                    tolerance=tolerance,
                    device=usable_device(local_device(device)),
                    say=say,
                    warn=partial(say_error, kind="warning"),
                )
                for choice in choices
            ]
            picture = TRIALS if trials else COMPARISON if compare else ""
            if picture:
                import jfbfast.imaging.plots  # noqa: F401  # says which extra it lacks, before anything is restored
            jobs = plan_jobs(images, out, overwrite, not trials, picture, skip_existing)
            if report is not None:
                check_writable(report)
            return (jobs, restorations), [str(job.source) for job in jobs]

        check_launch("restore")
        try:
            with team(_PATIENCE):
                jobs, restorations = agreed(plan, "the processes find different photographs; they take the same folder")
                if done := sum(job.done() for job in jobs) if skip_existing else 0:
                    say(f"{done} of {len(jobs)} photographs are restored already.")
                console.quiet = quiet  # from here on, each process tells about its own photographs
                failed = restore_files(
                    jobs,
                    restorations,
                    console=console,
                    say_error=say_error,
                    numbers=shared(len(jobs)),
                    report=report,
                    overwrite=overwrite,
                    skip_existing=skip_existing,
                    tile=tile,
                    overlap=overlap,
                    check_tiles=check_tiles,
                )
                failed = sum(gathered(failed))

                def end() -> tuple[None, None]:
                    if report is not None and rank() == 0:
                        write_report(report, jobs)
                    if failed and len(jobs) > 1 and rank() == 0:
                        say_error(f"{failed} of {len(jobs)} photographs could not be restored")
                    return None, None

                agreed(end)  # torchrun kills the first process when another one ends before it with an error
        except ConnectionError as error:
            raise ConnectionError(f"{error}; the same command with --skip-existing restores the rest") from error
        if failed:
            raise typer.Exit(1)
