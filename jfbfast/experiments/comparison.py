"""`jfbfast evaluate`: networks and baselines on the same photographs, in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from jfbfast.experiments.evaluation import (
    Choice,
    Method,
    Scores,
    baseline_methods,
    evaluate,
    network_method,
    write_scores,
)
from jfbfast.experiments.settings import read_photographs, read_run_settings
from jfbfast.imaging.datasets import Images, split, usable_photographs
from jfbfast.imaging.photographs import ImageError, image_files, read_photograph
from jfbfast.imaging.quality import LEAST_SIDE, PAPER_OFFSET
from jfbfast.models.config import SETTING, ModelConfig
from jfbfast.models.pretrained import load_model, measurement_setting, network_name, set_network
from jfbfast.operators.blur import GaussianBlur


def _networks(checkpoints: Sequence[str]) -> list[tuple[str, nn.Module, ModelConfig]]:
    found = []
    for checkpoint in checkpoints:
        model, config = load_model(checkpoint)
        if config.form == "denoiser":
            raise ValueError(f"{checkpoint} is a denoiser alone, which --denoiser takes; give networks that undo blur")
        if config.channels != 3:
            raise ValueError(f"{checkpoint} takes images of {config.channels} channels; the photographs here have 3")
        found.append((network_name(checkpoint), model, config))
    return found


def _seen_by(checkpoint: str, data: Path, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Of a directory's files, those that a run trained on and those that it validated on; none of no run on it.

    The run is that of the ``config.yaml`` beside the checkpoint; its ``photographs.json`` has the names, which
    the split of the files that are there now may not give.

    Raises:
        ValueError: either is damaged.
    """
    config, names = (Path(checkpoint).parent / name for name in ("config.yaml", "photographs.json"))
    if not (Path(checkpoint).is_file() and config.is_file()):
        return [], []
    try:
        settings = read_run_settings(config)
    except ValueError:
        if names.is_file():
            raise
        return [], []  # the settings of something else
    if Path(settings.data).resolve() != data.resolve():
        return [], []
    if not names.is_file():
        kept, held_out, _ = split(files, settings.train, settings.validation)
        return kept, held_out
    seen = read_photographs(names)
    trained, validated = set(seen["training"]), set(seen["validation"])
    named = [(file.relative_to(data).as_posix(), file) for file in files]
    return [file for name, file in named if name in trained], [file for name, file in named if name in validated]


def _is_usable(file: Path) -> bool:
    try:
        return min(read_photograph(file).pixels.shape[1:]) >= LEAST_SIDE
    except ImageError:
        return False


def unseen_photographs(
    data: Path,
    checkpoints: Sequence[str],
    train: float | None,
    validation: float | None,
    say: Callable[[str], object],
) -> tuple[list[Path], list[Path]]:
    """The photographs of a directory that choose parameters, and those to score.

    Args:
        data: the directory.
        checkpoints: of the networks, shipped names or files.
        train, validation: of `split`. None for those of the run on this directory that trained on most of it, as
            the files beside its checkpoint tell; where it leaves none to score, one half of those that
            it validated on chooses and the other is scored. Without such a run, or one that validated on none,
            0 and 0.2.
        say: is told of a run's split, taken or not.

    Raises:
        ValueError: no photographs to score.
    """
    files = image_files(data)
    runs = [(*_seen_by(checkpoint, data, files), checkpoint) for checkpoint in checkpoints]
    kept, held_out, checkpoint = max(runs, key=lambda run: len(run[0]), default=([], [], ""))
    seen = set(kept)
    if kept and train is None:
        trained = kept
        others = [file for file in files if file not in seen.union(held_out)]
        rest = [*held_out, *others]
        if validation is None and held_out:
            validation = len(held_out) if any(map(_is_usable, others)) else len(held_out) // 2
        say(f"{checkpoint} was trained on {len(kept)} of these photographs: they are left out.")
    else:
        trained, _, rest = split(files, train or 0, 0)
    count = len(split(files, len(trained), 0.2 if validation is None else validation)[1])
    chosen, scored = rest[:count], rest[count:]
    if not scored:
        raise ValueError(f"--train and --validation leave no photograph of {data} to score")
    if again := len(seen.intersection(rest)):
        say(f"{checkpoint} was trained on {again} of the photographs that choose or are scored.")
    return chosen, scored


def _device(name: str) -> torch.device:
    """The device; ValueError where torch does not reach one of that name."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"--device is {name}; it takes cpu or cuda ({str(error).splitlines()[0]})") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name}; it takes cpu or cuda")
    return device


def _methods(names: Sequence[str], blur: GaussianBlur, denoiser: str | None, device: torch.device) -> list[Method]:
    network = None
    if denoiser is not None:
        network, config = load_model(denoiser)
        if config.form != "denoiser":
            raise ValueError(f"--denoiser is {denoiser}, a {config.form} network; it takes one trained as a denoiser")
        network = network.to(device)
    known = baseline_methods(blur, network)
    if "pnp" in names and network is None:
        raise ValueError("--methods has pnp, which takes a --denoiser")
    for name in names:
        if name not in known:
            raise ValueError(f"--methods has {name!r}; it takes {', '.join(baseline_methods(blur, nn.Identity()))}")
    return [known[name] for name in names]


def score_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a `Scores.summary` as text: psnr and ssim with their intervals, evaluations, and late solves."""
    cells = {}
    for name, digits in (("psnr", 2), ("ssim", 4)):
        half = row[f"{name}_ci95"]
        cells[name] = f"{row[name]:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")
    evaluations, late = row["evaluations_max"], row["not_converged"]
    cells["evaluations"] = "" if evaluations is None else f"{row['evaluations_median']:g} ({evaluations})"
    cells["not_converged"] = "" if late is None else f"{late + row['diverged']} of {row['images']}"
    return cells


def results_table(scores: Sequence[Scores], title: str) -> Table:
    """The rows as people read them, in 80 columns."""
    caption = (
        "Means over all images, ± half of the 95% confidence interval. PSNR at the true range, 2: with a peak of 1, "
        f"as in the paper's code, it reads {PAPER_OFFSET:.2f} dB lower."
    )
    table = Table(title=title, caption=caption, pad_edge=False)
    table.add_column("method", overflow="fold")
    for heading in ("PSNR, dB", "SSIM", "evaluations\nmedian\n(largest)", "not\nconverged"):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in scores:
        table.add_row(found.method, *score_cells(found.summary()).values())
    return table


def tuning(scores: Sequence[Scores]) -> dict[str, str]:
    """What was chosen for each method with a parameter, of which grid, and whether at an end of it."""
    found = {}
    for each in scores:
        for name, value in each.parameter.items():
            grid = list(each.trials)
            end = ", at an end of its grid" if each.at_end else ""
            found[each.method] = f"{name} = {value:.3g}, of {len(grid)} from {min(grid):.3g} to {max(grid):.3g}{end}"
    return found


def evaluate_all(
    methods: Sequence[Method],
    images: Images,
    validation: Images,
    blur: GaussianBlur,
    noise: float,
    *,
    console: Console,
    say: Callable[[str, str], None],
    choices: Mapping[str, Choice] | None = None,
    **options: Any,
) -> list[Scores]:
    """`evaluate` for each method, with a bar.

    Args:
        methods, images, validation, blur, noise: as there.
        say: is told the name of a method that cannot be scored, and why.
        choices: of parameters, by name, where they are known.
        options: batch_size and device of `evaluate`.
    """
    scores = []
    with Progress(console=console, transient=True) as bar:
        for method in methods:
            task = bar.add_task(method.name, total=len(images))
            choice = (choices or {}).get(method.name)
            step = partial(bar.advance, task)
            try:
                found = evaluate(method, images, validation, blur, noise, choice=choice, progress=step, **options)
            except ValueError as error:  # one method's; the others' results are wanted all the same
                say(method.name, str(error))
            else:
                scores.append(found)
    return scores


def compare(
    checkpoints: Sequence[str],
    data: Path,
    *,
    methods: Sequence[str],
    denoiser: str | None,
    given: Mapping[str, Any],
    held_out: tuple[float | None, float | None, int | None],
    preprocessing: tuple[int | None, bool],
    batch_size: int,
    out: Path | None,
    device: str,
    seed: int,
    console: Console,
) -> list[Scores]:
    """Score networks and baselines on the photographs that are left after training's and validation's.

    Args:
        checkpoints: shipped names or files.
        data: directory of photographs.
        methods: names of baselines.
        denoiser: checkpoint for "pnp".
        given: kernel_size, sigma, noise and padding_mode; None for the first network's.
        held_out: of `unseen_photographs`, train and validation, and the most images to score.
        preprocessing: resize and squash, of `Photographs`.
        out: .csv or .json to write, or None.

    Raises:
        ValueError: no images to score; a name that is none; options that contradict each other.
    """
    if not data.is_dir():
        raise ValueError(f"{data} is no directory; the last argument takes the one of the photographs")
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"--out is {out}; it takes a .csv or a .json")
    if batch_size < 1 or (held_out[2] is not None and held_out[2] < 1):
        raise ValueError("--batch-size and --limit take integers of at least 1")
    if preprocessing[1] and preprocessing[0] is None:
        raise ValueError("--squash acts with --resize alone")
    if not methods and not checkpoints:
        known = ", ".join(baseline_methods(GaussianBlur(), nn.Identity()))
        raise ValueError(f"--methods is empty; without networks it takes one or more of {known}")
    if denoiser is not None and "pnp" not in methods:
        raise ValueError(f"--denoiser is {denoiser}; it is for pnp, which --methods does not have")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    where = _device(device)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    networks = _networks(checkpoints)
    setting = measurement_setting(given, [config for _, _, config in networks])
    blur = setting.blur()
    chosen = _methods(methods, blur, denoiser, where)
    for name, model, config in networks:
        set_network(name, model, config, setting, tell)
        chosen.append(network_method(name, model.to(where)))
    trained = [*checkpoints, *([] if denoiser is None else [denoiser])]
    validation_files, files = unseen_photographs(data, trained, held_out[0], held_out[1], tell)
    usable = partial(
        usable_photographs,
        say=tell,
        resize=preprocessing[0],
        squash=preprocessing[1],
        least=max(LEAST_SIDE, setting.kernel_size // 2 + 1),
        purpose="scoring",
    )
    scored, choosing = usable(files[: held_out[2]]), usable(validation_files, needed=False)
    images, validation = Images(scored, seed=seed), Images(choosing, seed=seed + 1)

    def say(name: str, why: str) -> None:
        tell(f"{name} is not in the table: {why}")

    scores = evaluate_all(
        chosen, images, validation, blur, setting.noise, batch_size=batch_size, device=where, console=console, say=say
    )
    if not scores:
        raise ValueError("no method could be scored")
    title = (
        f"{len(images)} images; blur {setting.kernel_size} × {setting.kernel_size}, σ = {setting.sigma:g}, "
        f"{setting.padding_mode}; noise {setting.noise:g}; parameters chosen on {len(validation)} other images"
    )
    console.print(results_table(scores, title))
    for name, told in tuning(scores).items():
        tell(f"{name}: {told}")
    if out is not None:
        about = {
            **{name: getattr(setting, name) for name in SETTING},
            "seed": seed,
            "images": [str(f.relative_to(data)) for f in scored.files],
            "validation": [str(f.relative_to(data)) for f in choosing.files],
        }
        write_scores(out, scores, about)
    return scores
