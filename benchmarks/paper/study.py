"""The photographs, the measurements and the methods that both tables share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import nn

from jfbfast.experiments.comparison import unseen_photographs
from jfbfast.experiments.evaluation import Choice, baseline_methods, choose, network_method
from jfbfast.imaging.datasets import Images, Photographs
from jfbfast.models.config import DEGRAD_FORMS, SETTING, ModelConfig
from jfbfast.models.pretrained import load_model, measurement_setting, set_network

from ..machine import default_device
from .plan import Plan


@dataclass(frozen=True)
class Role:
    """What a network stands for in the comparison: the label of its row, and which checkpoints it takes."""

    label: str
    takes: str
    accepts: Callable[[ModelConfig], bool]


def _trained_by(kind: str, *forms: str) -> Callable[[ModelConfig], bool]:
    return lambda config: config.form in forms and config.gradient.get("kind") == kind


ROLES = {
    "denoiser": Role("plug-and-play", "a denoiser", lambda config: config.form == "denoiser"),
    "feed-forward": Role("feed-forward network", "a feed-forward network", lambda c: c.form == "feed-forward"),
    "unrolled": Role("deep unrolling", "a DE-GRAD with the gradient unrolled", _trained_by("unrolled", *DEGRAD_FORMS)),
    "implicit": Role(
        "DEQ, exact gradient", "a DE-GRAD with the gradient implicit", _trained_by("implicit", *DEGRAD_FORMS)
    ),
    "paper": Role("DE-GRAD by JFB, the paper's", "a DE-GRAD of the form paper by JFB", _trained_by("jfb", "paper")),
    "ours": Role("ours by JFB", "a DE-GRAD by JFB", _trained_by("jfb", *DEGRAD_FORMS)),
}
LABELS = {
    "blurred": "blurred",
    "direct-inverse": "direct inverse",
    "gradient-descent": "gradient descent, stopped early",
    "tikhonov": "Tikhonov",
    "tv": "total variation",
    "pnp": ROLES["denoiser"].label,
    **{name: role.label for name, role in ROLES.items() if name != "denoiser"},
}

Networks = dict[str, tuple[nn.Module, ModelConfig]]


def free_photographs(directory: Path, size: int | None) -> Path:
    """Write the centre squares of three of scikit-image's photographs, which anyone may use, as PNG files."""
    from skimage import data
    from torchvision.transforms import v2

    directory.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("coffee", "astronaut", "chelsea")):
        pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)
        square = v2.functional.center_crop(pixels, [min(pixels.shape[-2:])] * 2)
        if size is not None:
            square = v2.functional.resize(square, [size, size], antialias=True)
        Image.fromarray(square.permute(1, 2, 0).numpy()).save(directory / f"{i}-{name}.png")
    return directory


def load_networks(plan: Plan) -> Networks:
    """The plan's networks by role; raises ValueError for an unknown role, or one that takes another network."""
    networks = {}
    for role, given in plan.checkpoints.items():
        if role not in ROLES:
            raise ValueError(f"checkpoints has the role {role!r}; it takes {', '.join(ROLES)}")
        networks[role] = load_model(given)
        config = networks[role][1]
        if not ROLES[role].accepts(config):
            gradient = "" if config.form in ("denoiser", "feed-forward") else f", gradient {config.gradient['kind']}"
            raise ValueError(f"--{role} is {given}, of the form {config.form}{gradient}; it takes {ROLES[role].takes}")
    return networks


def measurement(plan: Plan, networks: Networks) -> ModelConfig:
    """The measurements of all parts: the plan's, or else those of "ours", of "paper", or of the first network."""
    configs = [networks[role][1] for role in ("ours", "paper", *networks) if role in networks]
    given = {name: getattr(plan, name) for name in SETTING}
    setting = measurement_setting(given, [config for config in configs if config.form != "denoiser"])
    if setting.padding_mode == "valid":
        raise ValueError("padding_mode is 'valid'; the paper's tables take images and measurements of one size")
    return setting


class Study:
    """What the tables restore: ``images`` to score, ``validation`` to choose parameters, and the ``methods``.

    Methods have their names in `LABELS`; ``missing`` says why one has no network.
    """

    def __init__(self, plan: Plan, console: Console) -> None:
        assert plan.data is not None
        self.plan, self.console = plan, console
        self.say: Callable[..., Any] = partial(console.print, highlight=False, markup=False)
        device = default_device()
        self.options: dict[str, Any] = {"batch_size": plan.batch_size, "device": device}
        networks = load_networks(plan)
        self.setting = measurement(plan, networks)
        self.blur = self.setting.blur()

        self.missing: dict[str, str] = {}
        self.checkpoints: dict[str, str] = {}
        denoiser = networks["denoiser"][0].to(device) if "denoiser" in networks else None
        self.methods = baseline_methods(self.blur, denoiser)
        for role in ROLES:
            name = "pnp" if role == "denoiser" else role
            if role not in networks:
                self.missing[name] = f"no --{role} is given, which takes {ROLES[role].takes}"
                self.say(f"{LABELS[name]}: missing, since {self.missing[name]}.")
                continue
            self.checkpoints[name] = plan.checkpoints[role]
            model, config = networks[role]
            if role != "denoiser":
                set_network(f"--{role}", model, config, self.setting, self.say)
                self.methods[name] = network_method(name, model.to(device))

        checkpoints = list(plan.checkpoints.values())
        validation, files = unseen_photographs(plan.data, checkpoints, plan.train, plan.validation, self.say)
        self.files, self.validation_files = files[: plan.limit], validation
        options: dict[str, Any] = {"resize": plan.resize, "squash": plan.squash}
        self.images = Images(Photographs(self.files, **options), seed=plan.seed)
        self.validation = Images(Photographs(validation, **options), seed=plan.seed + 1)
        self._choices: dict[str, Choice] = {}

    def choice(self, name: str) -> Choice:
        """A method's parameter, chosen once on the validation images; raises ValueError without such images."""
        if name not in self._choices:
            with self.console.status(f"choosing the parameter of {LABELS[name]}"):
                method, noise = self.methods[name], self.setting.noise
                self._choices[name] = choose(method, self.validation, self.blur, noise, **self.options)
        return self._choices[name]

    def about(self) -> str:
        """What was measured, as one sentence."""
        s = self.setting
        return (
            f"{len(self.files)} images; blur {s.kernel_size} × {s.kernel_size}, σ = {s.sigma:g}, {s.padding_mode} "
            f"beyond the edge; noise {s.noise:g} on [−1, 1]; parameters chosen on {len(self.validation_files)} "
            "other images."
        )
