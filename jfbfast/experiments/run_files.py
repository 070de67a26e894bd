"""The lock and the checkpoints of a run's directory; all that is read from them is checked."""

from __future__ import annotations

import io
import reprlib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn

from jfbfast import checks
from jfbfast.files import write_whole
from jfbfast.models.checkpoint import CheckpointError, check_tensors

_FORMAT = "run/3"
_PATIENCE = 10.0  # seconds to wait for the image-loading processes of a killed run to end


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Within this context, no other process trains in the directory; ValueError if one does."""
    lock = FileLock(directory / "train.lock")
    try:
        lock.acquire(timeout=_PATIENCE, poll_interval=0.1)
    except Timeout as error:
        raise ValueError(f"{directory} is in use: another process trains there; choose another directory") from error
    try:
        yield
    finally:
        lock.release()


class CheckpointFiles(TorchCheckpointIO):
    """Writes the checkpoints of one phase of a run whole or not at all, and reads them as plain tensors and numbers.

    Args:
        phase: "pretraining" or "training".
        settings: those that a resumed run must share.
        extendable: the one of them that it may have raised.
    """

    def __init__(self, phase: str, settings: Mapping[str, Any], extendable: str = "") -> None:
        super().__init__()
        self.extendable = extendable
        self.run = {"jfbfast": _FORMAT, "phase": phase, **settings}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        content = io.BytesIO()  # torch.save raises no OSError when it writes to a full disk
        torch.save({**checkpoint, "run": self.run}, content)
        write_whole(Path(path), lambda partial: partial.write_bytes(content.getbuffer()))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            if not Path(path).is_file():  # reading a pipe would never end
                raise ValueError("it is no file")
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type for part in archive.infolist()):  # a small file could hold any amount
                    raise ValueError("its parts are compressed; torch stores them as they are")
                if damaged := archive.testzip():  # compares the checksums, as torch.load does not
                    raise ValueError(f"its part {damaged} is damaged")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken pickle raises nearly anything
            raise CheckpointError(f"{path}: not a whole checkpoint of a run ({checks.one_line(error)})") from error
        run = checkpoint.pop("run", None) if isinstance(checkpoint, dict) else None
        if not isinstance(run, dict) or run.get("jfbfast") != _FORMAT:
            raise CheckpointError(f"{path}: not a checkpoint of a run of jfbfast that this version reads")
        for name in (self.run.keys() | run.keys()) - {self.extendable}:
            mine, other = self.run.get(name), run.get(name)
            if isinstance(other, torch.Tensor) or mine != other:
                difference = f"its {name!s:.40} is {reprlib.repr(other)}; here it is {reprlib.repr(mine)}"
                raise CheckpointError(f"{path}: belongs to another run: {difference}")
        return dict(checkpoint)

    def step(self, path: Path, task: nn.Module, steps: int) -> int:
        """Check a checkpoint, and return the number of steps after which it was written, at most ``steps``.

        Raises:
            CheckpointError: it is damaged, or belongs to another phase, run or network than ``task``'s.
        """
        checkpoint = self.load_checkpoint(path)
        try:
            step = checkpoint.get("global_step")
            checks.integer("global_step", step, 0, steps)
            check_tensors(checkpoint.get("state_dict"), task)
        except ValueError as error:
            raise CheckpointError(f"{path}: not a whole checkpoint of a run ({error})") from error
        assert isinstance(step, int)
        return step
