"""Trained networks as files: safetensors, with the settings that rebuild the network in the file's header.

This module only knows `ModelConfig`. The classes that a file can name are in jfbfast.models.registry.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.files import write_whole
from jfbfast.models.config import ModelConfig

_FORMAT = "jfbfast/3"
# What a damaged file raises.
DAMAGE = (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this library, or a damaged one."""


def check_tensors(tensors: object, network: nn.Module) -> None:
    """Raise ValueError unless ``tensors`` has finite values, and the names and shapes of the network's state_dict.

    Floating-point tensors may be of any floating-point dtype; others must have the network's dtype.
    """
    if not isinstance(tensors, Mapping):
        raise ValueError("it holds no tensors")
    own = network.state_dict()
    for name in sorted(own.keys() ^ tensors.keys(), key=str):
        raise ValueError(f"its network {'has a' if name in own else 'has no'} tensor {name}")
    for name, like in own.items():
        value = tensors[name]
        if not isinstance(value, Tensor) or value.shape != like.shape:
            raise ValueError(f"its tensor {name} is not of shape {tuple(like.shape)}, as its network's")
        if value.dtype != like.dtype and not (value.is_floating_point() and like.is_floating_point()):
            raise ValueError(f"its tensor {name} is {value.dtype}; its network's is {like.dtype}")
        check_finite("it", name, value)


def check_finite(owner: str, name: str, value: Tensor) -> None:
    if name.split(".")[-1] != "averaging" and not value.isfinite().all():  # averaging is NaN before its first estimate
        raise ValueError(f"{owner} has a tensor {name} with values that are not finite in {value.dtype}")


def digest(config: str, tensors: Mapping[str, Tensor]) -> str:
    """A hash of all that the file holds, to detect damage."""
    sha = hashlib.sha256(f"{_FORMAT}\n{config}\n".encode())
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def save_checkpoint(path: str | Path, model: nn.Module, config: ModelConfig, *, half: bool = False) -> None:
    """Write the network's weights and settings. A reader sees the old file or the whole new one.

    Args:
        path: of the file.
        model: a network that ``config.model()`` made.
        config: its settings.
        half: store weights in float16, in half the space; they load as float32.

    Raises:
        ValueError: a weight that is not finite, or that overflows float16 with ``half``.

    Example:
        >>> import tempfile
        >>> from jfbfast.models.checkpoint import load_checkpoint, save_checkpoint
        >>> from jfbfast.models.config import ModelConfig
        >>> config = ModelConfig(denoiser={"kind": "DnCNN", "features": 4, "depth": 3, "residual": True})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/model.safetensors", config.model(), config)
        ...     model, found = load_checkpoint(f"{folder}/model.safetensors")
        >>> found == config, model.training
        (True, False)
    """
    tensors = {}
    for name, value in model.state_dict().items():
        kept = value.detach().cpu().contiguous()
        if half and kept.is_floating_point() and kept.dim() > 1:
            kept = kept.half()
        check_finite("model", name, kept)
        tensors[name] = kept
    settings = json.dumps(asdict(config), allow_nan=False)
    header = {"format": _FORMAT, "config": settings, "digest": digest(settings, tensors)}
    content = safetensors.torch.save(tensors, header)
    write_whole(Path(path), lambda partial: partial.write_bytes(content))


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, str], ModelConfig]]:
    """The open file, its header and its settings. Any error within the block becomes a CheckpointError."""
    try:
        if not os.path.isfile(path):  # reading a pipe would wait
            raise CheckpointError(f"{path}: {'it is no file' if os.path.exists(path) else 'there is no such file'}")
        with safetensors.safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
            found = header.get("format", "")
            if found != _FORMAT:
                old = found.startswith("jfbfast")
                told = f"its format is {found}, and not {_FORMAT}" if old else "it is foreign"
                raise CheckpointError(f"{path}: not a checkpoint of jfbfast that this version reads ({told})")
            yield file, header, ModelConfig(**json.loads(header["config"]))
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, *DAMAGE) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint of jfbfast ({checks.one_line(error)})") from error


def read_config(path: str | Path) -> ModelConfig:
    """Read only the settings, without checking the whole file as `load_checkpoint` does.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    with _opened(path) as (_, _, config):
        return config


def load_checkpoint(path: str | Path) -> tuple[nn.Module, ModelConfig]:
    """Load a network, in eval() and float32, and its settings. `save_checkpoint` has an example.

    Raises:
        CheckpointError: no such file, a damaged one, or one that `save_checkpoint` did not write.
    """
    with _opened(path) as (file, header, config):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):  # has names and shapes only
            check_tensors(tensors, config.model())
        if header["digest"] != digest(header["config"], tensors):
            raise ValueError("its settings or its tensors are not those that were written")
        model = config.model()
        model.load_state_dict(tensors)
        if hasattr(model, "trained_noise"):
            model.trained_noise = config.noise  # type: ignore[assignment]
    return model.eval(), config
