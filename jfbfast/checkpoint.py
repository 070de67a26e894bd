"""Trained models as files: weights in safetensors, and the settings that rebuild the model in its header."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jfbfast.degrad import DEGrad
from jfbfast.denoisers import RED, DnCNN
from jfbfast.operators import GaussianBlur

_FORMAT = "jfbfast.DEGrad/1"


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this library, or not a whole one."""


@dataclass(frozen=True)
class ModelConfig:
    """The settings of a filtered, preconditioned DE-GRAD with a DnCNN denoiser, and of its measurements.

    Attributes:
        kernel_size, sigma, padding_mode: of the `GaussianBlur`.
        noise: standard deviation of the measurements' noise, on [−1, 1].
        channels, features, depth, norm, spectral_norm, bias: of the `DnCNN`, in its residual form.
        weight, filter_damping: of the `RED`.
    """

    kernel_size: int = 5
    sigma: float = 1.0
    padding_mode: str = "reflect"
    noise: float = 0.01
    channels: int = 3
    features: int = 64
    depth: int = 17
    norm: Literal["batch"] | None = None
    spectral_norm: bool = False
    bias: bool = True
    weight: float = 0.05
    filter_damping: float | Literal["weight"] | None = "weight"

    def blur(self) -> GaussianBlur:
        return GaussianBlur(self.kernel_size, self.sigma, self.padding_mode)

    def model(self) -> DEGrad:
        """The model, untrained."""
        denoiser = DnCNN(
            self.channels, self.features, self.depth, self.norm, self.spectral_norm, self.bias, residual=True
        )
        regularizer = RED(denoiser, self.weight, self.filter_damping)
        return DEGrad(self.blur(), regularizer, preconditioner="exact")


def save_checkpoint(path: str | Path, model: DEGrad, config: ModelConfig) -> None:
    """Write the model's weights and settings; a reader sees the old file or the whole new one."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    try:
        save_file(tensors, partial, {"format": _FORMAT, "config": json.dumps(asdict(config))})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> tuple[DEGrad, ModelConfig]:
    """The model in eval(), and its settings.

    Raises:
        CheckpointError: no such file, a corrupt one, or one of another origin.
    """
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, Any] = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise CheckpointError(f"{path}: not a checkpoint of jfbfast ({_FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = _config(json.loads(header["config"]))
        model = config.model()
        model.load_state_dict(tensors)
    except CheckpointError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint of jfbfast ({error})") from error
    return model.eval(), config


def _config(values: dict[str, Any]) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in values.items() if name in known})
