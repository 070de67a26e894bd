"""`train`: what the command does, in Python, also on a torch dataset."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from torch import nn


def train(
    data: Any,
    out: str | Path,
    *,
    validation: Any = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> nn.Module:
    """Train a network that undoes blur, as `jfbfast train` does, on photographs or on any torch dataset.

    The run is as reproducible as the command's, and resumes as well: each use of an image has random numbers of its
    own, also those of the dataset's random transforms (of torch, numpy and Python).

    Args:
        data: a directory of photographs; or a dataset with ``len()`` and ``[index]``, each item of which is an image or
            a tuple that begins with one, as torchvision's have. An image is a tensor (C, H, W) or (H, W), an array
            (H, W), (H, W, C) or (C, H, W), where C is the smaller side, or a PIL image.
        out: the directory of the run, which gets the files of `jfbfast train`.
        validation: how many of the images, after those to train on, to validate on: a share below 1, or a count; or a
            dataset. None stands for a tenth.
        value_range: the values of black and white in a dataset's images of floats; the network's are −1 and 1. Images
            of uint8 and uint16 have their whole range. A directory takes (0, 1).
        resume: go on with the run in ``out``. A larger ``steps`` makes it longer: each step from there on has the
            learning rate that it has in a run of that length.
        progress: show progress bars, and sentences about the run.
        settings: the other options of the command, with _ instead of -. ``channels`` is the network's: 3 (grey
            images are repeated), 1 (colour images become grey), or the number that all images have.

    Returns:
        The trained network, in eval(). It maps measurements d (B, channels, H, W) on [−1, 1] to images.

    Raises:
        ValueError: a setting is not valid, or another run's; no such dataset; a training that cannot go on.
        ImageError: an image that cannot be used, with its number.
        KeyboardInterrupt: Ctrl-C, after the current step is saved for ``resume``.
        ModuleNotFoundError: the packages of the extra "train" are not installed.

    Example:
        >>> import tempfile, torch, jfbfast
        >>> images = torch.utils.data.TensorDataset(torch.rand(6, 1, 16, 16))
        >>> tiny = {"channels": 1, "crop": 16, "features": 4, "depth": 3, "batch_size": 2, "logger": "csv"}
        >>> with tempfile.TemporaryDirectory() as out:
        ...     model = jfbfast.train(images, out, steps=2, pretraining_steps=1, progress=False, **tiny)
        >>> model(torch.zeros(1, 1, 16, 16)).shape
        torch.Size([1, 1, 16, 16])
    """
    try:
        from rich.console import Console

        from jfbfast.experiments.processes import Interrupted, signals_interrupt
        from jfbfast.experiments.run_data import GivenDataset
        from jfbfast.experiments.runs import start_run
        from jfbfast.imaging.images import check_dataset
        from jfbfast.models.checkpoint import load_checkpoint
    except ModuleNotFoundError as error:
        told = f"{error.name} is not installed, and training needs it: pip install 'jfbfast[train]'"
        raise ModuleNotFoundError(told, name=error.name) from error

    out, dataset, held_out = Path(out), None, None
    if isinstance(data, (str, os.PathLike)):
        if value_range != (0.0, 1.0):
            raise ValueError(f"value_range is {value_range}; with a directory of photographs it takes (0, 1)")
        settings["data"] = os.fspath(data)
    else:
        check_dataset("data", data)
    if isinstance(validation, (int, float)):
        settings["validation"] = validation
    elif validation is not None:
        check_dataset("validation", validation)
        held_out = validation
    if "data" not in settings:
        dataset = GivenDataset(data, held_out, value_range)
    elif held_out is not None:
        raise ValueError("validation is a dataset; with a directory of photographs it takes a share or a count")
    try:
        with signals_interrupt():
            console = Console(quiet=not progress)
            start_run(settings, out, console, resume=resume, progress=progress, dataset=dataset)
    except Interrupted as stop:
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt(str(stop)) from stop
        raise
    return load_checkpoint(out / "model.safetensors")[0]
