"""Networks that ship with the package: ``weights/NAME.safetensors``, each with a model card ``weights/NAME.md``."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from jfbfast.checkpoint import ModelConfig, load_checkpoint, read_config

WEIGHTS = Path(__file__).parent / "weights"


def pretrained_names() -> list[str]:
    """The shipped networks, by name."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def pretrained_file(name: str) -> Path:
    """The file of a shipped network.

    Raises:
        ValueError: no network of that name.
    """
    names = pretrained_names()
    if name not in names:
        raise ValueError(f"name is {name!r}; the shipped models are {', '.join(names) or 'none in this installation'}")
    return WEIGHTS / f"{name}.safetensors"


def load_model(name_or_file: str | Path) -> tuple[nn.Module, ModelConfig]:
    """A checkpoint's network and settings, by its file or by a shipped network's name.

    Raises:
        CheckpointError: neither, or not a whole checkpoint.
    """
    shipped = str(name_or_file) in pretrained_names()
    return load_checkpoint(pretrained_file(str(name_or_file)) if shipped else name_or_file)


def matching_name(kernel_size: int, sigma: float, noise: float, padding_mode: str) -> str | None:
    """The shipped DE-GRAD that was trained for that blur, edges and all, and that noise; a filtered one for choice."""
    wanted = kernel_size, sigma, noise, padding_mode
    found = []
    for name in pretrained_names():
        config = read_config(pretrained_file(name))
        trained_for = config.kernel_size, config.sigma, config.noise, config.padding_mode
        if config.form in ("paper", "preconditioned", "filtered") and trained_for == wanted:
            found.append((config.form != "filtered", name))
    return min(found)[-1] if found else None
