"""The command line: `jfbfast info | demo | restore | app | train | evaluate | diagnose | bench`."""

from __future__ import annotations

import sys
import threading
import warnings
from importlib import import_module
from inspect import Parameter, Signature
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import jfbfast
from jfbfast.commands.app import app as app_page
from jfbfast.commands.common import console
from jfbfast.commands.common import one_sentence as _one_sentence
from jfbfast.commands.restore import restore
from jfbfast.config import keep_freed_memory, show_config
from jfbfast.experiments.processes import signals_interrupt
from jfbfast.experiments.settings import setting_types
from jfbfast.experiments.training_settings import TrainingSettings

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

_SIDE = "Side of the blur kernel in pixels, odd; 6σ + 1 holds a Gaussian. (default: the network's, or 5)"
_SIGMA = "Standard deviation of the blur in pixels; a network for a range needs it. (default: the network's, or 1)"
_NOISE = "Standard deviation of the noise on [−1, 1]; a network for a range needs it. (default: the network's, or 0.01)"
KernelSize = Annotated[int | None, typer.Option(help=_SIDE)]
Sigma = Annotated[float | None, typer.Option(help=_SIGMA)]
Noise = Annotated[float | None, typer.Option(help=_NOISE)]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"jfbfast {jfbfast.__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Implicit networks that undo image blur."""
    keep_freed_memory()


@app.command()
def info() -> None:
    """Print versions, the backends in use, and why the others are not."""
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


app.command()(restore)
app.command("app")(app_page)


def train(out: Path, config: Path | None, resume: bool, **flags: object) -> None:
    """Pretrain a denoiser, then train a network that undoes blur, by JFB or another gradient method.

    OUT/ gets the settings, the metrics, the checkpoints and, at the end, model.safetensors. For several GPUs or
    machines use torchrun --nproc-per-node N -m jfbfast train …

    Ctrl-C, or a scheduler's signal, saves the current step for --resume; the exit status is 128 + the signal's number.
    """
    with _one_sentence(), signals_interrupt():
        from jfbfast.experiments.runs import start_run
        from jfbfast.experiments.settings import read_settings

        values = {} if config is None else read_settings(config)
        values |= {name: value for name, value in flags.items() if value is not None}
        quality = start_run(values, out, console, resume=resume)
        reached = "" if quality is None else f"; validation PSNR {quality:.2f} dB at the true range"
        console.print(f"Trained: {out / 'model.safetensors'}{reached}", highlight=False)


def _train_parameters() -> list[Parameter]:
    """The parameters of `train` for typer: its own, and one for each setting, which is None unless it is given."""
    text = "YAML file of settings, with the names of these flags (_ instead of -). A flag overrides the file."
    own = (
        ("out", Path, Path("jfbfast-run"), typer.Option(help="Directory of the run.")),
        ("config", Path | None, None, typer.Option(help=text)),
        ("resume", bool, False, typer.Option(help="Go on with the run in OUT, from its last checkpoint.")),
    )
    found = [(name, Annotated[kind, info], default) for name, kind, default, info in own]
    for name, setting in setting_types().items():
        text = TrainingSettings.__dataclass_fields__[name].metadata["help"]
        info = typer.Argument(help=text) if name == "data" else typer.Option(help=text)
        found.append((name, Annotated[(str if setting.several else setting.kind) | None, info], None))
    return [Parameter(name, Parameter.KEYWORD_ONLY, default=d, annotation=a) for name, a, d in found]


train.__signature__ = Signature(_train_parameters())  # type: ignore[attr-defined]
train.__annotations__ = {parameter.name: parameter.annotation for parameter in _train_parameters()}
app.command()(train)


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="[NAME|FILE|DIR]… DATA_DIR", help="Networks, and a directory of sharp photographs."),
    ],
    methods: Annotated[
        str,
        typer.Option(help="Baselines: blurred, direct-inverse, gradient-descent, tikhonov, tv, pnp; commas between."),
    ] = "blurred,direct-inverse,gradient-descent,tikhonov",
    denoiser: Annotated[
        str | None, typer.Option(metavar="NAME|FILE|DIR", help="The denoiser of the baseline pnp.")
    ] = None,
    kernel_size: KernelSize = None,
    sigma: Sigma = None,
    noise: Noise = None,
    padding_mode: Annotated[
        str | None,
        typer.Option(
            help="What the blur sees beyond the edges: zeros (mid-grey), reflect, replicate or circular; or valid, "
            "where the measurement leaves out the margin that depends on it. (default: the network's, or reflect)"
        ),
    ] = None,
    train: Annotated[
        float | None,
        typer.Option(
            help="How many photographs to leave out, in the order of their names: a share below 1, or a count. "
            "(default: those that a network's run trained on, or 0)"
        ),
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            help="How many of the next photographs choose the baselines' parameters: a share below 1, or a count. "
            "(default: those that the run validated on, or 0.2)"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most photographs to score. (default: all that are left)")] = None,
    resize: Annotated[
        int | None, typer.Option(help="Resize to squares of this side in pixels. (default: keep the size)")
    ] = None,
    squash: Annotated[bool, typer.Option(help="With --resize: stretch instead of cropping the centre.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images restored together; it changes no score.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Write the table to a .csv, or every image to a .json.")] = None,
    device: Annotated[str, typer.Option(help="Where to restore: cpu or cuda.")] = "cpu",
    seed: Seed = 0,
) -> None:
    """Compare networks and classical methods on the same measurements, in one table.

    The blur and the noise are those of the first network by default.
    """
    with _one_sentence():
        from jfbfast.experiments.comparison import compare

        compare(
            checkpoints[:-1],
            Path(checkpoints[-1]),
            methods=[name.strip() for name in methods.split(",") if name.strip()],
            denoiser=denoiser,
            given={"kernel_size": kernel_size, "sigma": sigma, "noise": noise, "padding_mode": padding_mode},
            train=train,
            validation=validation,
            limit=limit,
            resize=resize,
            squash=squash,
            batch_size=batch_size,
            out=out,
            device=device,
            seed=seed,
            console=console,
        )


@app.command()
def diagnose(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="NAME|FILE|DIR", help="A shipped model, or a file or directory from train or save_pretrained."
        ),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="PHOTO…", help="Sharp photographs, which are blurred here.")],
    out: Annotated[Path, typer.Option(help="Directory for the picture.")] = Path(),
    crop: Annotated[int, typer.Option(help="Side of the random crops in pixels.")] = 64,
    samples: Annotated[int, typer.Option(help="Number of crops.")] = 4,
    iterations: Annotated[int, typer.Option(help="Evaluations of the layer in the history of a solve.")] = 300,
    sigma: Sigma = None,
    noise: Noise = None,
    seed: Seed = 0,
) -> None:
    """Measure how well conditioned a trained model is, and how exact each gradient method is for it."""
    with _one_sentence():
        from torch.utils.data import default_collate

        from jfbfast.diagnostics import report
        from jfbfast.imaging.datasets import Photographs, RandomCrops
        from jfbfast.imaging.quality import measure
        from jfbfast.models.degrad import DEGrad
        from jfbfast.models.pretrained import load_model, network_name, set_gaussian

        for name, value in (("crop", crop), ("samples", samples)):
            if value < 1:
                raise ValueError(f"--{name} is {value}; it takes an integer of at least 1")
        model, config = load_model(checkpoint)
        if not isinstance(model, DEGrad):
            raise ValueError(f"{checkpoint} holds a {type(model).__name__}; diagnose takes a DE-GRAD")
        set_gaussian(str(checkpoint), model, config, sigma, noise)
        crops = RandomCrops(Photographs(images, channels=config.channels), crop, samples, flips=False, seed=seed)
        x, white, _ = default_collate([crops[i] for i in range(samples)])
        d = measure(x, model.blur, config.noise if noise is None else noise, white)
        with console.status(f"Solving for {samples} crops of {crop} × {crop} …"):
            found = report(model, d, x, iterations=iterations, seed=seed)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{network_name(checkpoint)}-diagnosis.png"
        found.plot(path)
        console.print(found.table())
        console.print(f"Picture: {path}", highlight=False, markup=False)


class _Bench(TyperCommand):
    """Passes `bench paper` on to a command with other options, which is imported only then."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args[:1] != ["paper"]:
            return super().make_context(info_name, args, parent, **extra)
        paper = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        paper.command()(_one_sentence()(import_module("jfbfast.benchmarks.paper.command").paper))
        return typer.main.get_command(paper).make_context(f"{info_name} paper", args[1:], parent, **extra)


@app.command(cls=_Bench)
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME…", help="kernels, step, gpu or paper. (default: kernels)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the CSV and the picture.")] = Path(),
    quick: Annotated[bool, typer.Option(help="Few sizes, which take a minute or two.")] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|DIR", help="Weights for step: a shipped model, or a file or directory from train."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images in a batch of step. (default: 8; with --quick 2)")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side of step's images. (default: 64)")] = None,
) -> None:
    """Time the kernels, or a whole training step, on this machine against PyTorch and other libraries.

    jfbfast bench gpu checks and times everything on this machine's GPU, and writes gpu.json and gpu.png.

    jfbfast bench paper makes the tables and figures of the paper; it has its own options.
    """
    with _one_sentence():
        benchmarks = import_module("jfbfast.benchmarks")
        names = names or ["kernels"]
        benchmarks.check(names)
        for name in names:
            benchmarks.run(name, out, quick, console, checkpoint=checkpoint, batch=batch, size=size)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """Ignore a failed write in another thread, such as TensorBoard's on a full disk; the main thread reports it."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def main() -> None:
    """The entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # some terminals and file names are not Unicode
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # such files are refused, or the warning does not matter
    threading.excepthook = _thread_failed
    app()


if __name__ == "__main__":
    main()
