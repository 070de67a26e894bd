"""The command line: `jfbfast info | demo | restore | train | bench`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated

_EXTRAS = "the command line needs more packages: pip install 'jfbfast[train]'"

try:
    import typer
    from rich.console import Console
    from rich.progress import Progress, TaskID
except ModuleNotFoundError as error:  # pragma: no cover
    sys.exit(f"{error.name} is not installed; {_EXTRAS}")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()

KernelSize = Annotated[int, typer.Option(help="Side of the Gaussian blur in pixels, odd.")]
Sigma = Annotated[float, typer.Option(help="Standard deviation of the blur in pixels.")]
Noise = Annotated[float, typer.Option(help="Standard deviation of the noise, for images in [−1, 1].")]
PaddingMode = Annotated[str, typer.Option(help="Beyond the edge: zeros, reflect, replicate or circular.")]
Seed = Annotated[int, typer.Option(help="Of every random number.")]


@contextmanager
def _one_sentence() -> Iterator[None]:
    """A user's mistake ends the program with its message, not with a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        console.print(f"[red]error:[/] {error.name} is not installed; {_EXTRAS}", markup=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False)
        raise typer.Exit(1) from error


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
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="8- or 16-bit, grey or colour.")],
    checkpoint: Annotated[Path | None, typer.Option(help="From demo or train; without one, Tikhonov.")] = None,
    kernel_size: Annotated[
        int | None, typer.Option(help="Side of the blur; by default the checkpoint's, or 5.")
    ] = None,
    sigma: Annotated[float | None, typer.Option(help="Of the blur; by default the checkpoint's, or 1.")] = None,
    noise: Annotated[float | None, typer.Option(help="Its standard deviation on [−1, 1]; by default 0.01.")] = None,
    padding_mode: PaddingMode = "reflect",
    out: Annotated[Path | None, typer.Option(help="A file for one image, or a directory.")] = None,
    tile: Annotated[int, typer.Option(help="Side of the tiles, which are restored one by one, in pixels.")] = 512,
) -> None:
    """Undo a known Gaussian blur in photographs of any size; depth and alpha are kept."""
    with _one_sentence():
        from jfbfast.checkpoint import ModelConfig, load_checkpoint
        from jfbfast.data import read_photograph, write_photograph
        from jfbfast.operators import GaussianBlur
        from jfbfast.restoration import network_restorer, restore_tiled, tikhonov_restorer
        from jfbfast.solvers import ConvergenceWarning

        model, config = (None, ModelConfig()) if checkpoint is None else load_checkpoint(checkpoint)
        size = config.kernel_size if kernel_size is None else kernel_size
        width = config.sigma if sigma is None else sigma
        level = config.noise if noise is None else noise
        blur = GaussianBlur(size, width, padding_mode)
        if model is not None and noise is not None:
            raise ValueError(f"--noise is {noise}; with a checkpoint, which was trained for its own, it is of no use")
        if model is None:
            console.print("No checkpoint: restoring by Tikhonov regularisation, λ by the discrepancy principle.")
        else:
            model.blur = blur
            if (size, width) != (config.kernel_size, config.sigma):
                console.print(
                    f"The checkpoint was trained for kernel size {config.kernel_size} and σ = {config.sigma:g}; "
                    f"it is used for {size} and {width:g}."
                )
        targets = _targets(images, out)
        for source, target in zip(images, targets, strict=True):
            photograph = read_photograph(source)
            d = 2 * photograph.pixels - 1
            with (
                Progress(console=console, transient=True) as bar,
                warnings.catch_warnings(record=True) as caught,
            ):
                warnings.simplefilter("always", ConvergenceWarning)
                task = bar.add_task(source.name)
                if model is None:
                    restorer, damping = tikhonov_restorer(blur, d, level)
                    how = f"Tikhonov, λ = {damping:.2g}"
                else:
                    restorer, how = network_restorer(model, config.channels), "DE-GRAD"
                restored = restore_tiled(
                    restorer, d, tile=tile, overlap=min(96, tile // 4), progress=partial(_advance, bar, task)
                )
            write_photograph(target, photograph._replace(pixels=(restored + 1) / 2))
            late = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
            said = f"; {late} tiles did not converge" if late else ""
            console.print(f"{source} → {target} ({how}{said})", highlight=False, markup=False)


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def _targets(images: list[Path], out: Path | None) -> list[Path]:
    """Where each restoration goes: a file for one image, else NAME-restored.SUFFIX in a directory."""
    if out is not None and out.suffix and not out.is_dir():
        if len(images) > 1:
            raise ValueError(f"--out is the file {out}; several images take a directory")
        return [out]
    directory = Path() if out is None else out
    directory.mkdir(parents=True, exist_ok=True)
    targets = [
        directory / f"{p.stem}-restored{'.png' if p.suffix.lower() in ('.jpg', '.jpeg') else p.suffix}" for p in images
    ]
    if len(set(targets)) < len(targets):
        raise ValueError("two of the images have the same name; restore them into different directories")
    return targets


@app.command()
def train(
    data_dir: Annotated[Path, typer.Argument(help="A directory of photographs, searched with its subdirectories.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")] = Path("jfbfast.safetensors"),
    kernel_size: KernelSize = 5,
    sigma: Sigma = 1.0,
    noise: Noise = 0.01,
    padding_mode: PaddingMode = "reflect",
    features: Annotated[int, typer.Option(help="Channels of the denoiser's hidden layers.")] = 64,
    depth: Annotated[int, typer.Option(help="Convolutions of the denoiser.")] = 17,
    pretraining_steps: Annotated[int, typer.Option(help="Batches of denoising first.")] = 1000,
    steps: Annotated[int, typer.Option(help="Batches of JFB training.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Crops a batch.")] = 16,
    crop: Annotated[int, typer.Option(help="Side of the random crops in pixels.")] = 64,
    resize: Annotated[int | None, typer.Option(help="First resize each photograph to this square.")] = None,
    validation: Annotated[
        float, typer.Option(help="Share of the photographs, last by name, kept for validation.")
    ] = 0.1,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16 where it is safe; for machines fast at it.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    seed: Seed = 0,
) -> None:
    """Pretrain a denoiser, then train a filtered DE-GRAD by JFB, on your photographs."""
    with _one_sentence():
        import lightning as L

        from jfbfast.checkpoint import ModelConfig, save_checkpoint
        from jfbfast.data import RandomCrops, image_files
        from jfbfast.training import DeblurTask, DenoiserTask, fit

        if not 0 <= validation < 1:
            raise ValueError(f"--validation is {validation}; it takes a share in [0, 1)")
        config = ModelConfig(kernel_size, sigma, padding_mode, noise, features=features, depth=depth)
        model = config.model()
        files = image_files(data_dir)
        held_out = round(validation * len(files))
        kept = len(files) - held_out
        if kept < 1:
            raise ValueError(
                f"--validation is {validation}, which leaves none of the {len(files)} photographs to train on"
            )
        if out.is_dir():
            raise ValueError(f"--out is the directory {out}; it takes a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        L.seed_everything(seed, verbose=False)
        crops = RandomCrops(files[:kept], crop, length=batch_size * max(steps, pretraining_steps), resize=resize)
        val = RandomCrops(files[kept:], crop, resize=resize) if held_out else None
        console.print(f"{kept} photographs to train on, {held_out} to validate on.")
        run = partial(fit, batch_size=batch_size, bf16=bf16, workers=workers)
        if pretraining_steps:
            run(DenoiserTask(model.regularizer.denoiser), crops, steps=pretraining_steps)
        runner = run(DeblurTask(model, config.blur(), noise), crops, steps=steps, val=val)
        save_checkpoint(out, model, config)
        quality = runner.callback_metrics.get("val_psnr")
        said = "" if quality is None else f"; validation PSNR {float(quality):.2f} dB at the true range"
        console.print(f"Checkpoint: {out}{said}", highlight=False)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="What to run; by default kernels.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for the CSV and the picture.")] = Path(),
    quick: Annotated[bool, typer.Option(help="Few sizes, a minute or two.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Trained weights for step.", metavar="FILE")] = None,
) -> None:
    """Time the kernels, or a whole training step, on this machine against PyTorch and other libraries."""
    with _one_sentence():
        benchmarks = import_module("jfbfast.benchmarks")
        for name in names or ["kernels"]:
            benchmarks.run(name, out, quick, console, checkpoint)


def main() -> None:
    """The entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
