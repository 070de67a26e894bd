"""The command line: `jfbfast info | demo | restore | train | evaluate | diagnose | bench`."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from inspect import Signature
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

_EXTRAS = "the command line needs more packages: pip install 'jfbfast[train]'"

try:
    import typer
    from rich.console import Console
    from typer.core import TyperCommand

    from jfbfast.experiments.flags import train_parameters
    from jfbfast.experiments.processes import rank
    from jfbfast.experiments.stopping import Interrupted, signals_interrupt
except ModuleNotFoundError as error:  # pragma: no cover
    sys.exit(f"{error.name} is not installed; {_EXTRAS}")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(emoji=False, quiet=rank() > 0)  # of torchrun's processes one speaks

Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]


def _say_error(error: BaseException | str, kind: str = "error") -> None:
    Console(stderr=True, emoji=False).print(f"{kind}: {error}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """A user's mistake ends the program with its message, not with a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        _say_error(f"{error.name} is not installed; {_EXTRAS}")
        raise typer.Exit(1) from error
    except (ValueError, OSError) as error:
        _say_error(error)
        raise typer.Exit(1) from error
    except Interrupted as stop:
        if rank() == 0:
            _say_error(stop)
        raise typer.Exit(128 + stop.signal) from stop


@app.callback()
def start() -> None:
    """Implicit networks that undo image blur."""
    from jfbfast.config import keep_freed_memory

    keep_freed_memory()


@app.command()
def info() -> None:
    """Print versions, the backends in use, and why another is not."""
    from jfbfast.config import show_config

    show_config()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the picture and the checkpoint.")] = Path(),
    seed: Seed = 0,
) -> None:
    """Train on two photographs and restore a third, offline, in about three minutes on two cores."""
    with _one_sentence():
        from jfbfast.demo import run

        out.mkdir(parents=True, exist_ok=True)
        run(out, seed, console)


@app.command()
def restore(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE…",
            readable=False,  # one that cannot be read is told of in its turn
            help="Blurred photographs, grey or colour, of 8 or 16 bits: JPEG, PNG, TIFF, WebP, BMP, PGM or PPM.",
        ),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What restores: a shipped model's name, a file from demo or train, or tikhonov. "
            "(default: the shipped model for this blur and noise, or for a range with them, else tikhonov)",
        ),
    ] = None,
    kernel_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the blur kernel in pixels, odd; 6σ + 1 covers a Gaussian. (default: the checkpoint's, or 5)"
        ),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the blur in pixels; a model for a range needs it. "
            "(default: the checkpoint's, or 1)"
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the noise for values in [−1, 1]; more where the photograph shows more. "
            "A checkpoint for one level takes that alone, one for a range needs it. (default: 0.01)"
        ),
    ] = None,
    padding_mode: Annotated[
        str,
        typer.Option(
            help="What the blur saw beyond the photograph's edges: zeros (mid-grey), reflect, circular or replicate, "
            "which serves where nobody knows."
        ),
    ] = "replicate",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .png, .tiff or .jpg for one image, or a directory. (default: here, as NAME-restored.png or .tiff)"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    tile: Annotated[int, typer.Option(help="Side in pixels of the tiles, which are restored one by one.")] = 512,
    overlap: Annotated[
        int | None,
        typer.Option(help="Pixels that neighbouring tiles share. (default: measured, so that no seam is seen)"),
    ] = None,
    check_tiles: Annotated[
        bool, typer.Option(help="Restore in one piece too, and print how far the tiles differ from that.")
    ] = False,
) -> None:
    """Undo a known Gaussian blur in photographs of up to 250 megapixels.

    Depth, alpha, colour profile, EXIF and resolution are kept. Nothing is restored if an IMAGE does not exist, or its
    output file does or cannot be written. If an IMAGE cannot be restored, it says why and goes on with the others.
    """
    with _one_sentence():
        from jfbfast.imaging.batch import choose_targets, restore_files
        from jfbfast.imaging.restoration import LEAST_TILE, choose_restorer

        if tile < LEAST_TILE:
            raise ValueError(f"--tile is {tile}; it takes an integer of at least {LEAST_TILE}")
        given = {"kernel_size": kernel_size, "sigma": sigma, "noise": noise, "padding_mode": padding_mode}
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        prepare = choose_restorer(checkpoint, given, say, partial(_say_error, kind="warning"))
        failed = restore_files(
            images,
            choose_targets(images, out, overwrite),
            prepare,
            console=console,
            say_error=_say_error,
            tile=tile,
            overlap=overlap,
            check_tiles=check_tiles,
            overwrite=overwrite,
        )
        if failed and len(images) > 1:
            _say_error(f"{failed} of {len(images)} photographs could not be restored")
        if failed:
            raise typer.Exit(1)


def train(
    out: Path,
    config: Path | None,
    resume: bool,
    **flags: object,
) -> None:
    """Pretrain a denoiser, then train a network that undoes blur, by JFB or another gradient method.

    OUT/ holds the settings, the metrics, the checkpoints and, at the end, model.safetensors. Several
    GPUs or machines: torchrun --nproc-per-node N -m jfbfast train …

    Ctrl-C, or a scheduler's signal, ends it with the step that it is at saved for --resume; the status is 128 + signal.
    """
    with _one_sentence(), signals_interrupt():
        from jfbfast.experiments.runs import Run
        from jfbfast.experiments.settings import read_settings

        values = {} if config is None else read_settings(config)
        values |= {name: value for name, value in flags.items() if value is not None}
        quality = Run(values, out, resume=resume).train(console)
        said = "" if quality is None else f"; validation PSNR {quality:.2f} dB at the true range"
        console.print(f"Trained: {out / 'model.safetensors'}{said}", highlight=False)


def _register_train() -> None:
    """`jfbfast train` with a flag for each setting."""
    parameters = train_parameters()
    train.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command()(train)


_register_train()


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="[NAME|FILE]… DATA_DIR", help="Networks, and a directory of sharp photographs."),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Baselines, with commas between: blurred, direct-inverse, gradient-descent, tikhonov, tv, pnp."
        ),
    ] = "blurred,direct-inverse,gradient-descent,tikhonov",
    denoiser: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="The denoiser that the baseline pnp uses.")
    ] = None,
    kernel_size: Annotated[
        int | None, typer.Option(help="Side of the blur in pixels, odd. (default: the first network's, or 5)")
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(help="Standard deviation of the blur in pixels. (default: the first network's, or 1)"),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(help="Standard deviation of the noise on [−1, 1]. (default: the first network's, or 0.01)"),
    ] = None,
    padding_mode: Annotated[
        str | None,
        typer.Option(
            help="What the blur sees beyond the edge: zeros (mid-grey), reflect, replicate or circular. "
            "(default: the first network's, or reflect)"
        ),
    ] = None,
    train: Annotated[
        float | None,
        typer.Option(
            help="Photographs to leave out, first by name: a share or a count. "
            "(default: those that a network's run in its directory trained on, or 0)"
        ),
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            help="Photographs that choose the baselines' parameters, next by name: a share or a count. "
            "(default: those that it validated on, or 0.2)"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most photographs to score, of the rest. (default: all)")] = None,
    resize: Annotated[
        int | None,
        typer.Option(help="First resize each photograph to a square of this side in pixels. (default: as it is)"),
    ] = None,
    squash: Annotated[
        bool, typer.Option(help="With --resize, stretch to that square, in place of keeping the centre.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images restored together; it changes no score.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="File to write: a .csv with the rows, or a .json with every image too.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to restore: cpu or cuda.")] = "cpu",
    seed: Seed = 0,
) -> None:
    """Compare networks and classical methods on the same measurements, in one table."""
    with _one_sentence():
        from jfbfast.experiments.comparison import compare

        compare(
            checkpoints[:-1],
            Path(checkpoints[-1]),
            methods=[name.strip() for name in methods.split(",") if name.strip()],
            denoiser=denoiser,
            given={"kernel_size": kernel_size, "sigma": sigma, "noise": noise, "padding_mode": padding_mode},
            held_out=(train, validation, limit),
            preprocessing=(resize, squash),
            batch_size=batch_size,
            out=out,
            device=device,
            seed=seed,
            console=console,
        )


@app.command()
def diagnose(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="NAME|FILE", help="A shipped model's name, or a file from demo or train.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="PHOTO…", help="Sharp photographs, to be blurred.")],
    out: Annotated[Path, typer.Option(help="Directory for the picture.")] = Path(),
    crop: Annotated[int, typer.Option(help="Side of the random crops in pixels.")] = 64,
    samples: Annotated[int, typer.Option(help="Number of crops.")] = 4,
    iterations: Annotated[int, typer.Option(help="Evaluations of the layer in the history of a solve.")] = 300,
    sigma: Annotated[
        float | None, typer.Option(help="Standard deviation of the blur in pixels; a model for a range needs it.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation of the noise on [−1, 1]; a model for a range needs it.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Measure how well conditioned a trained model is, and how exact each gradient method is for it."""
    with _one_sentence():
        from torch.utils.data import default_collate

        from jfbfast.diagnostics import report
        from jfbfast.imaging.datasets import Photographs, RandomCrops
        from jfbfast.imaging.quality import measure
        from jfbfast.models.degrad import DEGrad
        from jfbfast.models.pretrained import load_model, network_name, set_measurement

        for name, value in (("crop", crop), ("samples", samples)):
            if value < 1:
                raise ValueError(f"--{name} is {value}; it takes an integer of at least 1")
        model, config = load_model(checkpoint)
        if not isinstance(model, DEGrad):
            raise ValueError(f"{checkpoint} holds a {type(model).__name__}; diagnose takes a DE-GRAD")
        set_measurement(str(checkpoint), model, config, sigma, noise)
        crops = RandomCrops(Photographs(images), crop, samples, flips=False, seed=seed)
        x, white, _ = default_collate([crops[i] for i in range(samples)])
        if config.channels == 1:
            x, white = x.mean(1, keepdim=True), white[:, :1]
        d = measure(x, model.blur, config.noise if noise is None else noise, white)
        with console.status(f"Solving for {samples} crops of {crop} × {crop} …"):
            found = report(model, d, x, iterations=iterations, seed=seed)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{network_name(checkpoint)}-diagnosis.png"
        found.plot(path)
        console.print(found.table())
        console.print(f"Picture: {path}", highlight=False, markup=False)


class _Bench(TyperCommand):
    """`bench paper` is a command of its own, with other options."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args[:1] != ["paper"]:
            return super().make_context(info_name, args, parent, **extra)
        paper = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        paper.command()(_one_sentence()(import_module("jfbfast.benchmarks.paper.command").paper))
        return typer.main.get_command(paper).make_context(f"{info_name} paper", args[1:], parent, **extra)


@app.command(cls=_Bench)
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME…", help="Of kernels, step and paper; by default kernels.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the CSV and the picture.")] = Path(),
    quick: Annotated[bool, typer.Option(help="Few sizes, which take a minute or two.")] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Trained weights for step: a shipped model, or a file from demo or train.", metavar="NAME|FILE"
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images in a batch of step. (default: 8; with --quick 2)")] = None,
) -> None:
    """Time the kernels, or a whole training step, on this machine against PyTorch and other libraries.

    jfbfast bench paper, which has options of its own, makes the tables and figures of the paper.
    """
    with _one_sentence():
        benchmarks = import_module("jfbfast.benchmarks")
        names = names or ["kernels"]
        benchmarks.check(names)
        for name in names:
            benchmarks.run(name, out, quick, console, checkpoint=checkpoint, batch=batch)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """A thread that cannot write, as TensorBoard's on a full disk, is told of by the main thread alone, which waits."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def main() -> None:
    """The entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal, or a file name, need not know every letter
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # what it warns of is refused, or does not matter
    threading.excepthook = _thread_failed
    app()


if __name__ == "__main__":
    main()
