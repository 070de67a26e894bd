"""Networks that ship with the package: ``weights/NAME.safetensors``, each with a model card ``weights/NAME.md``.

And what sets any trained network for the measurements that it is to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from jfbfast.models.checkpoint import DEGRAD_FORMS, CheckpointError, ModelConfig, load_checkpoint, read_config
from jfbfast.models.conditional import ConditionalDEGrad, MeasurementRanges

WEIGHTS = Path(__file__).parents[1] / "weights"
SETTING = ("kernel_size", "sigma", "noise", "padding_mode")  # of measurements, as in `ModelConfig`


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
        CheckpointError: neither, and the message lists the names; not a whole checkpoint.
    """
    names = pretrained_names()
    if str(name_or_file) in names:
        return load_checkpoint(pretrained_file(str(name_or_file)))
    try:
        return load_checkpoint(name_or_file)
    except CheckpointError as error:
        if Path(name_or_file).exists():
            raise
        shipped = ", ".join(names) or "none in this installation"
        raise CheckpointError(f"{error}; the shipped models are {shipped}") from error


def network_name(name_or_file: str | Path) -> str:
    """What a network is called in tables and file names: of DIR/model.safetensors DIR, of another file its stem."""
    path = Path(name_or_file)
    return (path.parent.name if path.stem == "model" else path.stem) or path.stem


def set_measurement(name: str, model: nn.Module, config: ModelConfig, sigma: float | None, noise: float | None) -> None:
    """Set a model for these measurements; one for a single setting takes its own alone, or None for them.

    Raises:
        ValueError: a model for a range of measurements, and None or a value out of it; one for a single setting,
            and another.
    """
    if isinstance(model, ConditionalDEGrad):
        if sigma is None or noise is None:
            (s, t), (low, high) = model.ranges.sigma, model.ranges.noise
            raise ValueError(
                f"{name} is for a range of measurements; it takes sigma, from {s:g} to {t:g} pixels, and noise, "
                f"from {low:g} to {high:g}: sigma is {sigma} and noise is {noise}"
            )
        model.set_measurement(sigma, noise)
        return
    for told, value, own in (("sigma", sigma, config.sigma), ("noise", noise, config.noise)):
        if value not in (None, own):
            raise ValueError(f"{told} is {value}; {name} was trained for {told} = {own:g} alone")


def measurement_setting(given: Mapping[str, Any], configs: Sequence[ModelConfig]) -> ModelConfig:
    """The measurements to make or to restore: as given, or else as the first network's; the defaults without one."""
    base = configs[0] if configs else ModelConfig()
    values = {name: getattr(base, name) if given[name] is None else given[name] for name in SETTING}
    return ModelConfig(**values)


def set_network(name: str, model: Any, config: ModelConfig, setting: ModelConfig, say: Callable[[str], object]) -> None:
    """Have a network restore measurements of this setting; ``say`` is told where it was trained for others."""
    taken: tuple[str, ...] = ()
    if isinstance(model, ConditionalDEGrad):
        model.set_measurement(setting.sigma, setting.noise)
        taken = ("sigma", "noise")
    model.blur = setting.blur()
    other = [each for each in SETTING if each not in taken and getattr(config, each) != getattr(setting, each)]
    if other:
        told = ", ".join(f"{each} = {getattr(config, each)}" for each in other)
        say(f"{name} was trained for other measurements ({told}).")


def matching_name(kernel_size: int, sigma: float, noise: float, padding_mode: str | None) -> str | None:
    """The shipped DE-GRAD that was trained for that blur, edges and all, and that noise.

    One for that setting alone, a filtered one for choice; else one for a range of settings. With None any edges do.
    """
    found = []
    for name in pretrained_names():
        config = read_config(pretrained_file(name))
        ranges = config.ranges or MeasurementRanges((config.sigma,) * 2, (config.noise,) * 2)
        suits = config.kernel_size == kernel_size and (sigma, noise) in ranges
        suits = suits and padding_mode in (None, config.padding_mode)
        if config.form in DEGRAD_FORMS and suits:
            found.append((config.ranges is not None, config.form != "filtered", name))
    return min(found)[-1] if found else None
