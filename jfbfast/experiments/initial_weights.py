"""The weights that a run starts from, which another network has."""

from __future__ import annotations

from rich.console import Console
from torch import Tensor, nn

from jfbfast.experiments.training_settings import TrainingSettings
from jfbfast.models.config import ModelConfig
from jfbfast.models.degrad import DEGrad
from jfbfast.models.pretrained import load_model
from jfbfast.models.red import RED
from jfbfast.models.unet import UNet


class _Residual(nn.Module):
    """y − R(y): the paper's regulariser R seen as a denoiser."""

    def __init__(self, regularizer: nn.Module) -> None:
        super().__init__()
        self.regularizer = regularizer

    def forward(self, y: Tensor) -> Tensor:
        return y - self.regularizer(y)


def denoiser_of(model: nn.Module) -> nn.Module:
    """The denoiser inside a network of this library."""
    if isinstance(model, DEGrad):
        regularizer: nn.Module = model.regularizer
        return regularizer.denoiser if isinstance(regularizer, RED) else _Residual(regularizer)
    inner = getattr(model, "denoiser", model)
    assert isinstance(inner, nn.Module)
    return inner


def _take_weights(model: nn.Module, source: nn.Module) -> None:
    """Copy the weights of ``source``: the same network, one without injection, or one for a single setting.

    Raises RuntimeError for any other network.
    """
    weights, inner, given = source.state_dict(), denoiser_of(model), denoiser_of(source)
    if type(inner) is not type(given) or getattr(inner, "residual", None) != getattr(given, "residual", None):
        raise RuntimeError("it computes something else from the same weights")
    if isinstance(inner, UNet) and isinstance(given, UNet):
        head = next(name for name in weights if name.endswith("head.weight"))
        weights[head] = inner.widened_head(given)
    model.load_state_dict(dict(weights))  # a plain dict has no metadata, which describes the source's blur


def start_from(model: nn.Module, config: ModelConfig, settings: TrainingSettings, console: Console) -> None:
    """Copy the weights of ``settings.init``: a shipped model or a file with a network of the same form or a denoiser.

    Only the network has to be the same. λ and η are among its weights; those of a denoiser have none.

    Raises:
        ValueError: another network, or a λ or η that the copied one would replace.
    """
    path = settings.init
    assert path is not None
    source, found = load_model(path)
    alone = found.form == "denoiser"
    try:
        if not alone and found.form != config.form:
            raise RuntimeError(f"its form is {found.form}")
        _take_weights(denoiser_of(model) if alone else model, source)
    except RuntimeError as error:
        raise ValueError(
            f"init is {path}, a {found.form} network with {dict(found.denoiser)}; this run takes a {config.form} "
            f"network or a denoiser, with {dict(config.denoiser)}"
        ) from error
    for name in () if alone else ("weight", "step_size"):
        if getattr(settings, name) != getattr(TrainingSettings, name):
            raise ValueError(f"{name} is {getattr(settings, name)}; with init={path} it is the one of that network")
    new = ", ".join(name for name in config.denoiser if name not in found.denoiser)
    console.print(f"Starting from {path}" + (f". Its denoiser has no {new}." if new else "."), highlight=False)
