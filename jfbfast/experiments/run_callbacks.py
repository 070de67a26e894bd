"""What a training run does beside the steps: its metrics, its checkpoints, and when it has to end."""

from __future__ import annotations

import csv
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from jfbfast import checks
from jfbfast.experiments.processes import rank
from jfbfast.experiments.stopping import Interrupted, handle_signals
from jfbfast.files import write_whole

METRICS = ("loss", "psnr", "evaluations", "diverged", "jacobian_penalty")
VALIDATION = ("val_loss", "val_psnr", "val_evaluations", "val_diverged")
_MOST_TEXT = 1 << 30  # characters of a file
_COLUMNS = ("phase", "step", "seconds", *METRICS, *VALIDATION)


class TrainingError(ValueError):
    """A run that cannot learn any more."""


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics; the last one, which a kill can have cut off, only where it is whole.

    Raises:
        ValueError: another file.
    """
    try:
        lines = checks.read_text(path, _MOST_TEXT).splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        table = list(csv.reader(whole))
        if not table or tuple(table[0]) != _COLUMNS:
            raise ValueError(f"it takes the columns {','.join(_COLUMNS)}")
        rows = [dict(zip(_COLUMNS, row, strict=True)) for row in table[1:]]
        for row in rows:
            int(row["step"]), [float(row[name] or 0) for name in _COLUMNS[2:]]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not the metrics of a run ({error}); mend it, or remove it") from error
    return rows


class Metrics(Callback):
    """A row of ``metrics.csv`` every few steps, and after each validation; the trainer's loggers get the same.

    A row's step is the number of steps done in the phase, its seconds those of fitting since the run began, all
    phases and validations together. ``loss`` and ``psnr`` are of one batch, the latter of its mean squared error;
    ``val_loss`` and ``val_psnr`` are means over the validation's images. Rows of steps that a resumed run repeats are
    dropped first, their time too.

    Args:
        path: of the file.
        phase: the first column.
        step: the step the run goes on from.
        every: steps between two rows.

    Raises:
        ValueError: the file is another's.
    """

    def __init__(self, path: Path, phase: str, step: int, every: int) -> None:
        self.path, self.phase, self.every = path, phase, every
        self.seconds, self.start = 0.0, time.perf_counter()
        if rank() == 0:
            self._begin(step)

    def _begin(self, step: int) -> None:
        found = _rows(self.path) if self.path.exists() else []
        rows = [row for row in found if row["phase"] != self.phase or int(row["step"]) <= step]
        if rows:
            self.seconds = float(rows[-1]["seconds"] or "nan")

        def write(partial: Path) -> None:
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, _COLUMNS)
                writer.writeheader()
                writer.writerows(rows)

        write_whole(self.path, write)

    def _report(self, trainer: L.Trainer, names: Sequence[str]) -> None:
        if not trainer.is_global_zero:
            return
        found = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)
        row = {name: f"{value:.9g}" for name, value in found.items()}
        row["seconds"] = f"{self.seconds + time.perf_counter() - self.start:.3f}"
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, _COLUMNS).writerow({"phase": self.phase, "step": trainer.global_step, **row})

    def on_train_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._report(trainer, METRICS)

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._report(trainer, VALIDATION)


class Checkpoints(Callback):
    """The state of a phase in a file: after every interval, and where a signal ends the run.

    The first signal lets the step end, after an interval's last its validation too; the second ends the run at once.
    Comes after the callbacks whose state it saves.

    Args:
        path: of the file.
        saved: is told each step that the file holds.

    Attributes:
        started: whether training has.
    """

    def __init__(self, path: Path, saved: Callable[[int], object]) -> None:
        self.path, self.saved = path, saved
        self.started = False
        self.signal: int | None = None

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise Interrupted(number)
        self.signal = number
        if rank() == 0:  # to the file itself: the stream may be in use
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: stopping after this step; a second signal stops at once\n".encode())

    def on_train_start(self, *args: Any) -> None:
        self.started = True
        handle_signals(self._note)  # in place of Lightning's, which puts back those of before

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether any process was asked to stop, as all of them see it."""
        return bool(trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False))

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self._asked(trainer) and not trainer.is_last_batch:
            self._save(trainer)
            raise Interrupted(self.signal or signal.SIGTERM)

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save(trainer)
        if self._asked(trainer):
            raise Interrupted(self.signal or signal.SIGTERM)


class SoundSteps(Callback):
    """Ends a run that cannot learn any more, before a step that would spoil its weights.

    That is where the loss or the gradient is not finite (with float16, whose scaling leaves such steps out, 20 times in
    a row), and where the gradient is 0 20 times in a row.

    Args:
        phase: of the run, for the message.

    Raises:
        TrainingError: so it is.
    """

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.loss = torch.zeros(())
        self.count = 0

    def on_before_backward(self, trainer: L.Trainer, task: L.LightningModule, loss: Tensor) -> None:
        self.loss = loss.detach()

    def on_before_optimizer_step(self, trainer: L.Trainer, task: L.LightningModule, *args: Any) -> None:
        loss = float(self.loss)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None]))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not trainer.strategy.reduce_boolean_decision(not finite or norm == 0, all=False):
            self.count = 0
            return
        self.count += 1
        patient = trainer.precision == "16-mixed" or (finite and norm == 0)
        if self.count == 20 or not patient:
            if not finite:
                told = f"the loss is {loss:g} and the gradient's norm {norm:g}"
            elif norm == 0:
                told = "the gradient was 0 20 times in a row, as where every solve diverges,"
            else:
                told = "the loss of another process is not finite"
            raise TrainingError(f"{told} at step {trainer.global_step + 1} of {self.phase}")
