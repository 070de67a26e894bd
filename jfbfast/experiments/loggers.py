"""The logger of a run: Lightning's for TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers
from lightning.pytorch.loggers.logger import Logger

from jfbfast import checks
from jfbfast.experiments.processes import rank
from jfbfast.files import write_whole

_PROJECT = "jfbfast"
_MOST_TEXT = 1 << 20  # characters in the file of numbers


def check_logger(name: str) -> None:
    """Raise ValueError if the package of a logger is not installed."""
    if name in ("wandb", "mlflow") and find_spec(name) is None:
        raise ValueError(f"logger is {name}; its package is not installed: pip install {name}")


def _make(name: str, out: Path, phase: str, version: str | None) -> Logger:
    if name == "tensorboard":
        return loggers.TensorBoardLogger(out, "tensorboard", phase)
    told = f"{out.resolve().name}-{phase}"
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        return loggers.WandbLogger(told, out, version, project=project, group=out.resolve().name)
    server = import_module("mlflow").get_tracking_uri()
    return loggers.MLFlowLogger(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT), told, server, run_id=version)


@contextmanager
def run_logger(name: str, out: Path, phase: str, settings: Mapping[str, Any]) -> Iterator[Logger | None]:
    """The logger of one phase of a run; None for "csv".

    A resumed run goes on in the same run of W&B or MLflow, whose number is in ``logger.json``. Their own environment
    variables, such as WANDB_PROJECT, WANDB_MODE and MLFLOW_TRACKING_URI, say where they log to.

    Args:
        name: "tensorboard", "wandb", "mlflow" or "csv".
        out: the run's directory.
        phase: "pretraining" or "training".
        settings: which W&B and MLflow show with the run.
    """
    if name == "csv":
        yield None
        return
    file, key = out / "logger.json", f"{name} {phase}"
    numbers: dict[str, str] = {}
    if file.exists():
        try:
            numbers = {
                str(each): str(number) for each, number in json.loads(checks.read_text(file, _MOST_TEXT)).items()
            }
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: not the numbers of a run's loggers ({checks.one_line(error)})") from error
    logger = _make(name, out, phase, numbers.get(key))
    if name != "tensorboard" and rank() == 0 and key not in numbers:
        logger.log_hyperparams(dict(settings))  # begins the logger's run, which has a number from then on
        text = json.dumps({**numbers, key: str(logger.version)}, indent=1)
        write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8"))
    try:
        yield logger
    finally:
        if isinstance(logger, loggers.WandbLogger) and rank() == 0:
            logger.experiment.finish()  # otherwise the next phase would go on in this run
