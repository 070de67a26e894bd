"""Trained networks as files: tensors in safetensors, and the settings that rebuild the network in its header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.files import write_whole
from jfbfast.implicit.methods import GradientMethod, gradient_method
from jfbfast.models.conditional import CONDITIONS, ConditionalDEGrad, MeasurementRanges
from jfbfast.models.degrad import DEGrad
from jfbfast.models.denoisers import RED, DnCNN, NonexpansiveDenoiser
from jfbfast.models.feed_forward import FeedForward
from jfbfast.models.limits import DEGRAD_FORMS, FORMS, MOST_PARAMETERS, check_fields
from jfbfast.models.unet import UNet
from jfbfast.operators.blur import GaussianBlur
from jfbfast.solvers import Anderson, Broyden, FixedPointSolver, Inertial, Picard

__all__ = [
    "DEGRAD_FORMS",
    "FORMS",
    "CheckpointError",
    "ModelConfig",
    "check_tensors",
    "load_checkpoint",
    "read_config",
    "save_checkpoint",
]

_FORMAT = "jfbfast/3"
_NETWORKS: dict[str, type[nn.Module]] = {
    "DnCNN": DnCNN,
    "NonexpansiveDenoiser": NonexpansiveDenoiser,
    "UNet": UNet,
}
_SOLVERS: dict[str, type[FixedPointSolver]] = {
    "Anderson": Anderson,
    "Broyden": Broyden,
    "Inertial": Inertial,
    "Picard": Picard,
}

Description = Mapping[str, Any]


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this library, or not a whole one."""


def _safetensors() -> Any:
    """The package, imported only where a file is read or written, since the core does without."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        told = f"{error.name}, which trained networks are kept with, is not installed: pip install 'jfbfast[train]'"
        raise ModuleNotFoundError(told, name=error.name) from error
    return safetensors


def _made(name: str, description: Description, kinds: Mapping[str, type[Any]]) -> Any:
    """An instance of the class that ``kind`` names, with the description's other values as its arguments."""
    kind = str(description.get("kind"))
    if kind not in kinds:
        raise ValueError(f"{name} is of kind {kind!r}; it takes one of {', '.join(map(repr, kinds))}")
    try:
        return kinds[kind](**{key: value for key, value in description.items() if key != "kind"})
    except TypeError as error:
        raise ValueError(f"{name} is {dict(description)}, which {kind} does not take ({error})") from error


def _gradient(description: Description) -> GradientMethod:
    kind = str(description.get("kind"))
    return _made("gradient", description, {kind: type(gradient_method(kind))})


def _dncnn() -> dict[str, Any]:
    return {"kind": "DnCNN", "norm": None, "spectral_norm": False, "bias": True, "residual": True}


@dataclass(frozen=True)
class ModelConfig:
    """What rebuilds a network: its form, its denoiser, and the measurements it is for.

    Attributes:
        form: "paper" (T(x) = x − η(Aᵀ(A x − d) + R(x)), R the network itself), "preconditioned" or
            "filtered" (a `DEGrad` with `RED`), "feed-forward" (a `FeedForward`), or "denoiser" (the network alone).
        denoiser: ``kind``, "DnCNN", "UNet" or "NonexpansiveDenoiser", and its arguments.
        kernel_size, sigma, padding_mode: of the `GaussianBlur`.
        noise: standard deviation of the measurements' noise, on [−1, 1].
        weight: λ of `RED`, or of the feed-forward network's Tikhonov restoration, where training starts.
        step_size: η of the paper's form, where training starts.
        averaging: of the `DEGrad`.
        solver: ``kind``, "Anderson", "Broyden", "Inertial" or "Picard", and its arguments.
        gradient: of the `DEGrad`: ``kind``, a method's name, and its arguments.
        sigma_range, noise_range: of a filtered `ConditionalDEGrad`, the least and the largest; ``sigma`` and
            ``noise`` are where it is set when it is made. None for one setting alone.

    Raises:
        ValueError: a value of another type, or out of its bounds (`jfbfast.models.limits`).
    """

    form: Literal["paper", "preconditioned", "filtered", "feed-forward", "denoiser"] = "filtered"
    denoiser: Description = field(default_factory=_dncnn)
    kernel_size: int = 5
    sigma: float = 1.0
    padding_mode: str = "reflect"
    noise: float = 0.01
    weight: float = 0.05
    step_size: float = 1.0
    averaging: float | Literal["auto"] = 1.0
    solver: Description = field(default_factory=lambda: {"kind": "Anderson"})
    gradient: Description = field(default_factory=lambda: {"kind": "jfb"})
    sigma_range: Sequence[float] | None = None
    noise_range: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_fields(vars(self))

    @property
    def ranges(self) -> MeasurementRanges | None:
        """The measurements it is for; None for one setting alone."""
        if self.sigma_range is None or self.noise_range is None:
            return None
        return MeasurementRanges(tuple(self.sigma_range), tuple(self.noise_range))  # type: ignore[arg-type]  # checks it

    @property
    def channels(self) -> int:
        """Of the network's images."""
        return int(self.denoiser.get("channels", 3))

    def blur(self) -> GaussianBlur:
        return GaussianBlur(self.kernel_size, self.sigma, self.padding_mode)

    def model(self) -> nn.Module:
        """The network, untrained.

        Raises:
            ValueError: another kind, an argument that it does not take, or a network of more than 10⁹ numbers.
        """
        with torch.device("meta"):  # without memory
            count = sum(p.numel() for p in _made("denoiser", self.denoiser, _NETWORKS).parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(
                f"denoiser is {dict(self.denoiser)}, of {count:.1e} numbers; it takes {MOST_PARAMETERS:.0e} at most"
            )
        denoiser = _made("denoiser", self.denoiser, _NETWORKS)
        if self.denoiser.get("injection") and self.form not in ("preconditioned", "filtered"):
            raise ValueError(
                f"form is {self.form!r} with {dict(self.denoiser)}; a network with injection takes the form "
                "'preconditioned' or 'filtered'"
            )
        if self.form == "denoiser":
            return denoiser
        if self.form == "feed-forward":
            return FeedForward(self.blur(), denoiser, self.weight)
        options: dict[str, Any] = {
            "averaging": self.averaging,
            "solver": _made("solver", self.solver, _SOLVERS),
            "gradient": _gradient(self.gradient),
        }
        if self.form == "paper":
            if not isinstance(denoiser, DnCNN) or denoiser.residual:
                raise ValueError(f"denoiser is {dict(self.denoiser)}; the paper's form takes a DnCNN, not residual")
            return DEGrad(self.blur(), denoiser, step_size=self.step_size, **options)
        if (ranges := self.ranges) is not None:
            if self.form != "filtered" or getattr(denoiser, "conditions", 0) != CONDITIONS:
                raise ValueError(
                    f"form is {self.form!r} with {dict(self.denoiser)}; sigma_range and noise_range take the filtered "
                    f"form with a UNet of {CONDITIONS} conditions"
                )
            return ConditionalDEGrad(
                denoiser,
                kernel_size=self.kernel_size,
                padding_mode=self.padding_mode,
                ranges=ranges,
                sigma=self.sigma,
                noise=self.noise,
                weight=self.weight,
                **options,
            )
        regularizer = RED(denoiser, self.weight, "weight" if self.form == "filtered" else None)
        return DEGrad(self.blur(), regularizer, preconditioner="exact", **options)


def check_tensors(tensors: object, network: nn.Module) -> None:
    """Raise ValueError unless these are a network's tensors by name, with its shapes, and finite.

    A dtype is the network's, or floating point as it.
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
        _check_finite("it", name, value)


def _check_finite(owner: str, name: str, value: Tensor) -> None:
    if name.split(".")[-1] != "averaging" and not value.isfinite().all():  # which may have no estimate yet
        raise ValueError(f"{owner} has a tensor {name} with values that are not finite in {value.dtype}")


def _digest(config: str, tensors: Mapping[str, Tensor]) -> str:
    """Of all that a file says, against damage."""
    sha = hashlib.sha256(f"{_FORMAT}\n{config}\n".encode())
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def save_checkpoint(path: str | Path, model: nn.Module, config: ModelConfig, *, half: bool = False) -> None:
    """Write the network's weights and settings; a reader sees the old file or the whole new one.

    Args:
        path: of the file.
        model: of ``config.model()``.
        config: its settings.
        half: store weights in float16, in half the space; they load as float32.

    Raises:
        ValueError: a weight that is not finite, or not in float16 where that is asked for.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        kept = value.detach().cpu().contiguous()
        if half and kept.is_floating_point() and kept.dim() > 1:
            kept = kept.half()
        _check_finite("model", name, kept)
        tensors[name] = kept
    settings = json.dumps(asdict(config), allow_nan=False)
    header = {"format": _FORMAT, "config": settings, "digest": _digest(settings, tensors)}
    content = _safetensors().torch.save(tensors, header)
    write_whole(Path(path), lambda partial: partial.write_bytes(content))


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """The file and its header; whatever is wrong with them within raises CheckpointError."""
    safetensors = _safetensors()
    try:
        if not os.path.isfile(path):  # a pipe would keep it waiting
            raise ValueError("it is no file" if os.path.exists(path) else "no such file")
        with safetensors.safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
            found = header.get("format", "")
            if found != _FORMAT:
                old = found.startswith("jfbfast")
                told = f"its format is {found}, and not {_FORMAT}" if old else "it is foreign"
                raise CheckpointError(f"{path}: not a checkpoint of jfbfast that this version reads ({told})")
            yield file, header
    except CheckpointError:
        raise
    except (
        OSError,
        safetensors.SafetensorError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint of jfbfast ({checks.one_line(error)})") from error


def read_config(path: str | Path) -> ModelConfig:
    """The settings alone, which `load_checkpoint` verifies.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    with _opened(path) as (_, header):
        return ModelConfig(**json.loads(header["config"]))


def load_checkpoint(path: str | Path) -> tuple[nn.Module, ModelConfig]:
    """The network in eval(), in float32, and its settings.

    Raises:
        CheckpointError: no such file, a corrupt one, or one of another origin.
        ModuleNotFoundError: safetensors is not installed.
    """
    with _opened(path) as (file, header):
        config = ModelConfig(**json.loads(header["config"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):  # names and shapes alone
            check_tensors(tensors, config.model())
        if header["digest"] != _digest(header["config"], tensors):
            raise ValueError("its settings or its tensors are not those that were written")
        model = config.model()
        model.load_state_dict(tensors)
    return model.eval(), config
