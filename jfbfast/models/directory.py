"""Reading a directory that `save_pretrained` wrote: the model, and its settings for the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.models import registry
from jfbfast.models.checkpoint import DAMAGE, CheckpointError, check_tensors, digest
from jfbfast.models.config import ANY_BLUR, ModelConfig
from jfbfast.models.description import TENSOR, build_model, external_objects

M = TypeVar("M")

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT = "jfbfast-model/1"
_MOST = 10_000_000  # characters of a config.json


def load_directory(folder: Path, cls: type[M], objects: Mapping[str, Any]) -> M:
    """The model, in eval().

    Args:
        folder: the directory.
        cls: the class that the model has to be of.
        objects: those of other libraries that the model is made of, by the argument's name.

    Raises:
        CheckpointError: a damaged model, or one of another class; objects missing, or that it does not take.
    """
    try:
        config = _read_config(folder)
        node = config["model"]
        _check_objects(folder, node, objects)
        with safetensors.safe_open(folder / WEIGHTS_FILE, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("digest") not in (None, digest(FORMAT, tensors)):
            raise ValueError("its tensors are not those that were written")
        model: Any = build_model(node, tensors, objects, cls)
        check_class(str(folder), model, cls, type(model).__name__)
        weights = {name: value for name, value in tensors.items() if not name.startswith(TENSOR)}
        check_tensors(weights, model)
        _load_weights(model, weights, objects)
        if "trained_noise" in config and hasattr(model, "trained_noise"):
            checks.non_negative("trained_noise", config["trained_noise"])
            model.trained_noise = float(config["trained_noise"])
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, *DAMAGE) as error:
        raise CheckpointError(f"{folder}: not a whole model of jfbfast ({checks.one_line(error)})") from error
    return model.eval()


def read_settings(folder: Path) -> ModelConfig:
    """The settings of the model in a directory, which the command line asks for.

    Raises:
        CheckpointError: a damaged directory, or a model that no command takes.
    """
    try:
        config = _read_config(folder)
        return _settings(config["model"], config.get("trained_noise"))
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"{folder}: the commands do not take this model ({checks.one_line(error)})") from error


def _settings(node: Mapping[str, Any], trained_noise: float | None) -> ModelConfig:
    """The settings of a described model; ValueError, KeyError or TypeError if it has none."""
    values: dict[str, Any] = {"form": _form(node)}
    regularizer = node.get("regularizer", {})
    if values["form"] == "denoiser":
        network = node
    else:
        network = node.get("denoiser") or regularizer.get("denoiser") or regularizer
    values["denoiser"] = network
    if "gradient" in node:
        values["gradient"] = {"kind": node["gradient"]["kind"].lower()}  # ModelConfig has the names of `gradient=`
    noise = node.get("noise", trained_noise)
    if noise is not None:
        values["noise"] = noise
    if node.get("noise_range"):
        values["noise_range"] = node["noise_range"]
    if values["form"] in ANY_BLUR:
        values["padding_mode"] = "valid"
    elif values["form"] != "denoiser":
        values |= _measurement(node["blur"])
    return ModelConfig(**values)


def _form(node: Mapping[str, Any]) -> str:
    kind, regularizer = node["kind"], node.get("regularizer", {})
    if kind in registry.NETWORKS:
        return "denoiser"
    for form in (*ANY_BLUR, "feed-forward"):
        if registry.MODELS[form].__name__ == kind:
            return form
    if kind != "DEGrad":
        takes = "a DEGrad, a UniversalDEGrad, a PlugAndPlay, a FeedForward or a denoiser"
        raise ValueError(f"it is a {kind}; they take {takes}")
    fidelity = (node.get("data_fidelity") or {"kind": "LeastSquares"})["kind"]
    if fidelity != "LeastSquares":
        raise ValueError(f"its data_fidelity is a {fidelity}; they take LeastSquares")
    if regularizer["kind"] != "RED" or node.get("preconditioner") is None:
        return "paper"
    return "filtered" if regularizer.get("filter_damping") == "weight" else "preconditioned"


def _measurement(blur: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of A, which has to be a Gaussian with the same σ along both axes."""
    sigma, size = blur.get("sigma", ()), blur.get("kernel_size", ())
    if blur["kind"] != "GaussianBlur" or len(set(sigma)) != 1 or len(set(size)) != 1:
        raise ValueError(f"its blur is a {blur['kind']}; they take a GaussianBlur with one σ and one kernel_size")
    return {"sigma": sigma[0], "kernel_size": size[0], "padding_mode": blur["padding_mode"]}


def check_class(name: str, model: nn.Module, cls: type[Any], told: str) -> None:
    """Raise CheckpointError for a model of another class; ``told`` says what it is."""
    if not isinstance(model, cls):
        takes = "DE-GRAD" if cls.__name__ == "DEGrad" else cls.__name__
        raise CheckpointError(f"name is {name!r}, a {told}; it takes a {takes}")


def _read_config(folder: Path) -> dict[str, Any]:
    config = json.loads(checks.read_text(folder / CONFIG_FILE, _MOST))
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT or not isinstance(config.get("model"), dict):
        told = f"format is {found!r}; this version of jfbfast reads {FORMAT!r}"
        raise CheckpointError(f"{folder}: not a model of jfbfast ({CONFIG_FILE}: {told})")
    return config


def _check_objects(folder: Path, node: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
    external = external_objects(node)
    for name, (path, kind) in external.items():
        if name not in objects:
            told = f"its {path} is a {kind}, which is not of jfbfast, so pass one like it"
            raise CheckpointError(f"{folder}: {told}: {node.get('kind')}.from_pretrained(…, {name}=…)")
    for name in objects.keys() - external.keys():
        takes = ", ".join(f"{each}=" for each in external) or "no objects"
        raise CheckpointError(f"{folder}: it has no {name} to be passed; it takes {takes}")


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], objects: Mapping[str, Any]) -> None:
    """Load the weights, in the dtype that they have in the file.

    What else the model has, such as buffers that are not saved, gets that dtype too, but not what was passed.
    """
    modules = [each for each in objects.values() if isinstance(each, nn.Module)]
    theirs = {id(value) for module in modules for value in (*module.parameters(), *module.buffers())}
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        dtype = dtypes.pop()
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point() and id(value) not in theirs:
                value.data = value.data.to(dtype)
    for name, value in model.state_dict(keep_vars=True).items():
        value.data = value.data.to(weights[name].dtype)
    model.load_state_dict(weights)
