"""`jfbfast evaluate`: networks and baselines on the same photographs, in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from jfbfast.backends.tensors import usable_device
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
from jfbfast.imaging.images import SUFFIXES, read_image
from jfbfast.imaging.photographs import ImageError, image_files
from jfbfast.imaging.quality import LEAST_SIDE, PAPER_OFFSET
from jfbfast.models.config import SETTING, ModelConfig
from jfbfast.models.pretrained import load_model, measurement_setting, network_name, set_network
from jfbfast.operators.blur import GaussianBlur


def _seen_by(checkpoint: str, data: Path, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files of ``data`` that the run of a checkpoint trained on, and those that it validated on.

    The run is described by the ``config.yaml`` beside the checkpoint's file, and its photographs by
    ``photographs.json``; runs of older versions have none, and are split anew. Both lists are empty if there is no run,
    or if it used another directory.

    Raises:
        ValueError: one of the two files is damaged.
    """
    path = Path(checkpoint)
    config, names = ((path if path.is_dir() else path.parent) / name for name in ("config.yaml", "photographs.json"))
    if not (path.exists() and config.is_file()):
        return [], []
    try:
        settings = read_run_settings(config)
    except ValueError:
        if names.is_file():
            raise
        return [], []  # another program's config.yaml
    if Path(settings.data).resolve() != data.resolve():
        return [], []
    if not names.is_file():
        kept, held_out, _ = split(files, settings.train, settings.validation)
        return kept, held_out
    found = read_photographs(names)
    trained, validated = set(found["training"]), set(found["validation"])
    named = [(file.relative_to(data).as_posix(), file) for file in files]
    return [file for name, file in named if name in trained], [file for name, file in named if name in validated]


def _is_usable(file: Path) -> bool:
    try:
        return min(read_image(file).shape[1:]) >= LEAST_SIDE
    except ImageError:
        return False


def unseen_photographs(
    data: Path,
    checkpoints: Sequence[str],
    train: float | None,
    validation: float | None,
    say: Callable[[str], object],
) -> tuple[list[Path], list[Path]]:
    """The photographs of a directory that choose the parameters, and those to score.

    If a network was trained on photographs of the directory, these are left out, and those that it validated on choose
    the parameters; if no others remain to score, half of those choose and the other half is scored. If several networks
    were, only the one that trained on the most photographs counts.

    Args:
        data: the directory.
        checkpoints: the networks, as names of shipped models or as files.
        train: how many photographs to leave out instead, in the order of their names: a share, or a count.
        validation: how many of the next photographs choose instead: a share, or a count. It is 0.2 by default if no
            network was trained on the directory.
        say: called with a sentence about the photographs that a network was trained on.

    Raises:
        ValueError: no photographs remain to score.
    """
    files = image_files(data, SUFFIXES)
    runs = [(*_seen_by(checkpoint, data, files), checkpoint) for checkpoint in checkpoints]
    kept, held_out, checkpoint = max(runs, key=lambda run: len(run[0]), default=([], [], ""))
    seen = set(kept)
    if kept and train is None:
        others = [file for file in files if file not in seen.union(held_out)]
        rest = [*held_out, *others]
        if validation is None and held_out:
            validation = len(held_out) if any(map(_is_usable, others)) else len(held_out) // 2
        say(f"{checkpoint} was trained on {len(kept)} of these photographs: they are left out.")
        left_out = len(kept)
    else:
        trained, _, rest = split(files, train or 0, 0)
        left_out = len(trained)
    count = len(split(files, left_out, 0.2 if validation is None else validation)[1])
    chosen, scored = rest[:count], rest[count:]
    if not scored:
        raise ValueError(f"--train and --validation leave no photograph of {data} to score")
    if again := len(seen.intersection(rest)):
        say(f"{checkpoint} was trained on {again} of the photographs that choose or are scored.")
    return chosen, scored


def _networks(checkpoints: Sequence[str]) -> list[tuple[str, nn.Module, ModelConfig]]:
    found = []
    for checkpoint in checkpoints:
        model, config = load_model(checkpoint)
        if config.form == "denoiser":
            raise ValueError(f"{checkpoint} is a denoiser alone, which --denoiser takes; give networks that undo blur")
        found.append((network_name(checkpoint), model, config))
    return found


def _channels(networks: Sequence[tuple[str, ModelConfig]]) -> int:
    """The number of channels of all these networks; 3 without any."""
    if len({config.channels for _, config in networks}) > 1:
        told = " and ".join(f"{name} of {config.channels}" for name, config in networks)
        raise ValueError(f"the networks take images of different numbers of channels ({told}); evaluate them apart")
    return networks[0][1].channels if networks else 3


def _denoiser(checkpoint: str) -> tuple[nn.Module, ModelConfig]:
    model, config = load_model(checkpoint)
    if config.form != "denoiser":
        raise ValueError(f"--denoiser is {checkpoint}, a {config.form} network; it takes one trained as a denoiser")
    return model, config


def _baselines(names: Sequence[str], blur: GaussianBlur, network: nn.Module | None) -> list[Method]:
    if network is None and "pnp" in names:
        raise ValueError("--methods has pnp, which takes a --denoiser")
    known = baseline_methods(blur, nn.Identity() if network is None else network)
    for name in names:
        if name not in known:
            raise ValueError(f"--methods has {name!r}; it takes {', '.join(known)}")
    return [known[name] for name in names]


def score_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A `Scores.summary` as the cells of a table: PSNR and SSIM with their intervals, evaluations, failed solves."""
    cells = {}
    for name, digits in (("psnr", 2), ("ssim", 4)):
        half = row[f"{name}_ci95"]
        cells[name] = f"{row[name]:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")
    evaluations, late = row["evaluations_max"], row["not_converged"]
    cells["evaluations"] = "" if evaluations is None else f"{row['evaluations_median']:g} ({evaluations})"
    cells["not_converged"] = "" if late is None else f"{late + row['diverged']} of {row['images']}"
    return cells


def results_table(scores: Sequence[Scores], title: str) -> Table:
    """The scores as a table for a terminal of 80 columns."""
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
    """For each method with a parameter: the chosen value, the grid, and whether the value is at an end of the grid."""
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
    """`evaluate` each method, with a progress bar; a method that fails does not stop the others.

    ``say`` gets the name of such a method and the reason; ``choices`` are parameters by the names of the methods, where
    they are known; ``options`` are ``batch_size`` and ``device`` of `evaluate`.
    """
    scores = []
    with Progress(console=console, transient=True) as bar:
        for method in methods:
            step = partial(bar.advance, bar.add_task(method.name, total=len(images)))
            choice = (choices or {}).get(method.name)
            try:
                found = evaluate(method, images, validation, blur, noise, choice=choice, progress=step, **options)
            except ValueError as error:
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
    train: float | None,
    validation: float | None,
    limit: int | None,
    resize: int | None,
    squash: bool,
    batch_size: int,
    out: Path | None,
    device: str,
    seed: int,
    console: Console,
) -> list[Scores]:
    """Score networks and baselines on the photographs of a directory that no network was trained on.

    The arguments are the options of `jfbfast evaluate`; ``given`` has its kernel_size, sigma, noise and padding_mode.

    Raises:
        ValueError: no images to score, an unknown name, or options that contradict each other.
    """
    if not data.is_dir():
        raise ValueError(f"{data} is no directory; the last argument takes the one of the photographs")
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"--out is {out}; it takes a .csv or a .json")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError("--batch-size and --limit take integers of at least 1")
    if squash and resize is None:
        raise ValueError("--squash has an effect only with --resize")
    if not methods and not checkpoints:
        known = ", ".join(baseline_methods(GaussianBlur(), nn.Identity()))
        raise ValueError(f"--methods is empty; without networks it takes one or more of {known}")
    if denoiser is not None and "pnp" not in methods:
        raise ValueError(f"--denoiser is {denoiser}; it is for pnp, which --methods does not have")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    where = usable_device(device)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    networks = _networks(checkpoints)
    setting = measurement_setting(given, [config for _, _, config in networks])
    blur = setting.blur()
    own, configs = None, [(name, config) for name, _, config in networks]
    if denoiser is not None:
        own, config = _denoiser(denoiser)
        own = own.to(where)
        configs.append((denoiser, config))
    channels = _channels(configs)
    chosen = _baselines(methods, blur, own)
    for name, model, config in networks:
        set_network(name, model, config, setting, tell)
        chosen.append(network_method(name, model.to(where)))
    trained = [*checkpoints, *([] if denoiser is None else [denoiser])]
    choosing, rest = unseen_photographs(data, trained, train, validation, tell)
    least = max(LEAST_SIDE + 2 * max(blur.margin), setting.least_side)
    usable = partial(
        usable_photographs,
        say=tell,
        resize=resize,
        squash=squash,
        channels=channels,
        least=least,
        purpose="scoring",
    )
    scored, tuned = usable(rest[:limit]), usable(choosing, needed=False)

    def say(name: str, why: str) -> None:
        tell(f"{name} is not in the table: {why}")

    images, validation_images = Images(scored, seed=seed), Images(tuned, seed=seed + 1)
    options: dict[str, Any] = {"batch_size": batch_size, "device": where}
    scores = evaluate_all(chosen, images, validation_images, blur, setting.noise, console=console, say=say, **options)
    if not scores:
        raise ValueError("no method could be scored")
    title = (
        f"{len(scored)} images; blur {blur.kernel_size[0]} × {blur.kernel_size[1]}, σ = {setting.sigma:g}, "
        f"{setting.padding_mode}; noise {setting.noise:g}; parameters chosen on {len(tuned)} other images"
    )
    console.print(results_table(scores, title))
    for name, text in tuning(scores).items():
        tell(f"{name}: {text}")
    if out is not None:
        about = {
            **{name: getattr(setting, name) for name in SETTING},
            "seed": seed,
            "images": [str(f.relative_to(data)) for f in scored.files],
            "validation": [str(f.relative_to(data)) for f in tuned.files],
        }
        write_scores(out, scores, about)
    return scores
