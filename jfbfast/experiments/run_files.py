"""The files of a training run's directory, beside its settings and its networks: what is read of them is checked."""

from __future__ import annotations

import hashlib
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

_FORMAT = "run/2"
_PATIENCE = 10.0  # seconds, in which the processes that load images for a killed run end


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Within, no other process trains in a directory; the lock of a process that was killed is none.

    Raises:
        ValueError: another does.
    """
    lock = FileLock(directory / "train.lock")
    try:
        lock.acquire(timeout=_PATIENCE, poll_interval=0.1)
    except Timeout as error:
        raise ValueError(f"{directory} is in use: another process trains there; choose another directory") from error
    try:
        yield
    finally:
        lock.release()


def _packed(value: dict[str, Any]) -> bytes:
    """What `torch.save` makes of it; in memory, since to a full disk it raises no OSError."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints of one phase of a run as files that are whole or absent, read as plain tensors and numbers.

    Args:
        phase: of the run.
        settings: of the run, which one that resumes must have.
    """

    def __init__(self, phase: str, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.run = {"jfbfast": _FORMAT, "phase": phase, **settings}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        state = _packed(checkpoint)
        whole = {"run": self.run, "digest": hashlib.sha256(state).hexdigest(), "state": state}
        content = _packed({**whole, "state": torch.frombuffer(bytearray(state), dtype=torch.uint8)})
        write_whole(Path(path), lambda partial: partial.write_bytes(content))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            if not (Path(path).is_file() and zipfile.is_zipfile(path)):  # a pipe would keep it waiting
                raise ValueError("it is no archive as torch writes them")
            whole = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken pickle raises nearly anything
            raise CheckpointError(f"{path}: not a whole checkpoint of a run ({checks.one_line(error)})") from error
        run = whole.get("run") if isinstance(whole, dict) else None
        if not isinstance(run, dict) or run.get("jfbfast") != _FORMAT:
            raise CheckpointError(f"{path}: not a checkpoint of a run of jfbfast that this version reads")
        for name in self.run.keys() | run.keys():
            mine, other = self.run.get(name), run.get(name)
            if isinstance(other, torch.Tensor) or mine != other:
                told = f"whose {name!s:.40} is {reprlib.repr(other)}; here it is {reprlib.repr(mine)}"
                raise CheckpointError(f"{path}: of another run, {told}")
        try:
            if not whole["state"].is_contiguous():
                raise ValueError("its state is no row of bytes")
            state = whole["state"].numpy().tobytes()
            if hashlib.sha256(state).hexdigest() != whole["digest"]:
                raise ValueError("its state is not the one that was written")
            checkpoint: dict[str, Any] = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
            if not isinstance(checkpoint, dict):
                raise ValueError(f"its state is a {type(checkpoint).__name__}")
        except Exception as error:
            raise CheckpointError(f"{path}: not a whole checkpoint of a run ({checks.one_line(error)})") from error
        return checkpoint

    def step(self, path: Path, task: nn.Module, steps: int) -> int:
        """The steps that a checkpoint has behind it, of ``steps``.

        Raises:
            CheckpointError: not a whole checkpoint of this phase of this run and of this task's network.
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
