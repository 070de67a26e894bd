"""What a training run does between its steps: it writes metrics and checkpoints, and ends when a signal asks it to."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from jfbfast import checks
from jfbfast.experiments.processes import Interrupted, handle_signals, rank
from jfbfast.files import write_whole

_METRICS = ("loss", "psnr", "evaluations", "diverged", "jacobian_penalty")
_VALIDATION = ("val_loss", "val_psnr", "val_evaluations", "val_diverged")
_COLUMNS = ("phase", "step", "seconds", *_METRICS, *_VALIDATION)
_MOST_TEXT = 1 << 30  # characters in a file


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics, without a last one that a kill cut off; ValueError if the file is damaged."""
    try:
        lines = checks.read_text(path, _MOST_TEXT).splitlines(keepends=True)
        table = list(csv.reader(line for line in lines if line.endswith("\n")))
        if not table or tuple(table[0]) != _COLUMNS:
            raise ValueError(f"it takes the columns {','.join(_COLUMNS)}")
        rows = [dict(zip(_COLUMNS, row, strict=True)) for row in table[1:]]
        for row in rows:
            int(row["step"]), [float(row[name] or 0) for name in _COLUMNS[2:]]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not the metrics of a run ({error}); mend it, or remove it") from error
    return rows


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]], mode: str = "w") -> None:
    with path.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


class Metrics(Callback):
    """Writes a row of ``metrics.csv`` every few steps and after each validation, and reports it to the loggers.

    ``step`` counts the steps of the phase. ``seconds`` is the time that all phases have trained and validated so far.
    ``loss`` and ``psnr`` are those of one batch, the PSNR from its mean squared error; ``val_loss`` and ``val_psnr``
    are means over the validation images. A resumed run first drops the rows of the steps that it repeats, and their
    time.

    Args:
        path: of the file; ValueError if it exists and does not hold the metrics of a run.
        phase: "pretraining" or "training".
        step: the step that the run starts from.
        every: steps from one row to the next.
    """

    def __init__(self, path: Path, phase: str, step: int, every: int) -> None:
        self.path, self.phase, self.every = path, phase, every
        self.seconds, self.start = 0.0, time.perf_counter()
        if rank() == 0:
            rows = _read_rows(path) if path.exists() else []
            rows = [row for row in rows if row["phase"] != phase or int(row["step"]) <= step]
            self.seconds = float(rows[-1]["seconds"] or "nan") if rows else 0.0
            write_whole(path, lambda partial: _write_rows(partial, rows))

    def _report(self, trainer: L.Trainer, names: Sequence[str]) -> None:
        if not trainer.is_global_zero:
            return
        found = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)
        row = {name: f"{value:.9g}" for name, value in found.items()}
        seconds = f"{self.seconds + time.perf_counter() - self.start:.3f}"
        _write_rows(self.path, [{"phase": self.phase, "step": trainer.global_step, "seconds": seconds, **row}], "a")

    def on_train_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._report(trainer, _METRICS)

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._report(trainer, _VALIDATION)


class Checkpoints(Callback):
    """Saves the state of a phase after every interval, and when a signal ends the run.

    The first signal lets the current step finish, and a validation that follows it; the second ends the run at once.
    This callback must come after those whose state it saves.

    Args:
        path: of the checkpoint's file.
        saved: called after each save, with the number of the saved step.

    Attributes:
        started: whether the training has started.
    """

    def __init__(self, path: Path, saved: Callable[[int], object]) -> None:
        self.path, self.saved = path, saved
        self.started = False
        self.signal: int | None = None

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise Interrupted(number)
        self.signal = number
        if rank() == 0:  # written to the descriptor itself, because the stream may be in use
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: stopping after this step; a second signal stops at once\n".encode())

    def on_train_start(self, *args: Any) -> None:
        self.started = True
        handle_signals(self._note)  # replaces Lightning's handlers; Lightning restores the previous ones

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether any of the processes was asked to stop; all of them get the same answer."""
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
