"""Networks that have a name: ``weights/NAME.safetensors``, or on the Hugging Face hub; ``weights/NAME.md`` is the card.

Also: loading any trained network, and setting it for the measurements to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from jfbfast.models import hub
from jfbfast.models.checkpoint import CheckpointError, load_checkpoint, read_config
from jfbfast.models.config import ANY_BLUR, DEGRAD_FORMS, SETTING, ModelConfig
from jfbfast.models.directory import CONFIG_FILE, WEIGHTS_FILE, load_directory, read_settings
from jfbfast.operators.blur import GaussianBlur

WEIGHTS = Path(__file__).parents[1] / "weights"
UNIVERSAL = "universal"  # the network for any blur


def pretrained_names() -> list[str]:
    """The names of the published networks, for the ``from_pretrained`` of their class.

    Those that are not in this installation are fetched from the Hugging Face hub when they are first loaded.

    Example:
        >>> import jfbfast
        >>> jfbfast.pretrained_names()
        ['gaussian5-sigma1', 'gaussian5-sigma5', 'plug-and-play', 'universal']
    """
    return sorted({*installed_names(), *hub.SHA256})


def installed_names() -> list[str]:
    """The names of the networks that this installation holds."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def pretrained_file(name: str, options: Mapping[str, Any] | None = None) -> Path:
    """The file of the network of that name: in this installation, or as `hub.fetched` with these options."""
    file = WEIGHTS / f"{name}.safetensors"
    return file if file.is_file() or name not in hub.SHA256 else hub.fetched(name, options or {})


def load_model(name_or_file: str | Path, options: Mapping[str, Any] | None = None) -> tuple[Any, ModelConfig]:
    """Load a network, in eval(), and its settings: a published one by name, or any other by its file or directory.

    The directory is one that `save_pretrained` wrote, or that of a run of `jfbfast train`. ``options`` are those of
    `hub.fetched`.

    Raises:
        CheckpointError: neither a name nor a file or directory (the message lists the names); a damaged network; one
            that is not in this installation and cannot be fetched.
    """
    names = pretrained_names()
    if str(name_or_file) in names:
        return load_checkpoint(pretrained_file(str(name_or_file), options))
    path = Path(name_or_file)
    if (path / CONFIG_FILE).is_file():
        config = read_settings(path)
        return load_directory(path, nn.Module, {}), config
    try:
        return load_checkpoint(path / WEIGHTS_FILE if (path / WEIGHTS_FILE).is_file() else path)
    except CheckpointError as error:
        if path.is_dir():
            told = f"it has neither {CONFIG_FILE} nor {WEIGHTS_FILE}"
            raise CheckpointError(f"{path}: not the directory of a network ({told})") from error
        if path.exists():
            raise
        raise CheckpointError(f"{error}; the published models are {', '.join(names)}") from error


def network_name(name_or_file: str | Path) -> str:
    """A network's name in tables and file names.

    It is DIR for the directory DIR and for the file DIR/model.safetensors, and the stem of another file.
    """
    path = Path(name_or_file)
    if path.is_dir():
        return path.resolve().name
    return (path.parent.name if path.stem == "model" else path.stem) or path.stem


def measurement_setting(given: Mapping[str, Any], configs: Sequence[ModelConfig]) -> ModelConfig:
    """The measurements to make or to restore.

    Args:
        given: a value or None for each name in `SETTING`.
        configs: the first one's values replace None; without one, the defaults of `ModelConfig` do.
    """
    base = configs[0] if configs else ModelConfig()
    return ModelConfig(**{name: getattr(base, name) if given[name] is None else given[name] for name in SETTING})


def set_network(name: str, model: Any, config: ModelConfig, setting: ModelConfig, say: Callable[[str], object]) -> None:
    """Set a network for these measurements, and call ``say`` with a sentence if it was trained for others."""
    model.set_measurement(setting.blur(), setting.noise)
    other = [each for each in SETTING if getattr(config, each) != getattr(setting, each)]
    if other and config.form not in ANY_BLUR:
        told = ", ".join(f"{each} = {getattr(config, each)}" for each in other)
        say(f"{name} was trained for other measurements ({told}).")


def set_gaussian(name: str, model: Any, config: ModelConfig | None, sigma: float | None, noise: float | None) -> None:
    """Set a loaded DE-GRAD for a Gaussian blur of this σ and this noise level; None stands for its own value.

    A universal one is set for a whole Gaussian and unknown surroundings. Raises ValueError if one for a single setting
    is for another σ or noise level.

    Args:
        name: of the model, for the message.
        model: the DE-GRAD.
        config: its settings, if it ships or `jfbfast train` wrote it.
        sigma, noise: the setting.
    """
    if (sigma, noise) == (None, None):
        return
    if config is None:
        if not hasattr(model, "noise_range"):
            raise ValueError(f"sigma is {sigma} and noise {noise}; {name} takes neither, since it is for {model.blur}")
        own: Any = getattr(model.blur, "sigma", None) if sigma is None else sigma
        if own is None:
            raise ValueError(f"sigma is None; {name} takes a number, since its own blur is {model.blur}")
        blur = GaussianBlur(None, own, "valid")
        model.set_measurement(blur, model.noise if noise is None else noise)
    elif config.form not in ANY_BLUR:
        for told, value, own in (("sigma", sigma, config.sigma), ("noise", noise, config.noise)):
            if value not in (None, own):
                raise ValueError(f"{told} is {value}; {name} was trained for {told} = {own:g} alone")
    else:
        blur = GaussianBlur(None, config.sigma if sigma is None else sigma, "valid")
        model.set_measurement(blur, config.noise if noise is None else noise)


def matching_name(kernel_size: int, sigma: float, noise: float, padding_mode: str | None) -> str | None:
    """The name of the installed DE-GRAD that was trained for this blur and noise alone, or None.

    A filtered model is preferred to one of another form. With ``padding_mode=None``, any padding mode matches.
    """
    found = []
    for name in installed_names():
        config = read_config(pretrained_file(name))
        own = (config.kernel_size, config.sigma, config.noise) == (kernel_size, sigma, noise)
        one_setting = config.form in DEGRAD_FORMS and config.form not in ANY_BLUR
        if one_setting and own and padding_mode in (None, config.padding_mode):
            found.append((config.form != "filtered", name))
    return min(found)[-1] if found else None
