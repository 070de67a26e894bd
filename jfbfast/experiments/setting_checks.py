"""Which values the settings of a training run may have: their bounds, their choices, and rules between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from jfbfast.experiments.training_settings import TrainingSettings, parse_kind

# The least and the largest value of these settings. The largest lies far beyond any use. `ModelConfig` checks the
# settings of the network, and `split` the numbers of photographs.
_BOUNDS = (
    (1, 16384, "resize crop"),
    (1, 64, "channels"),
    (1, 1e6, "batch_size measurements"),
    (1, 1e9, "steps interval log_every jacobian_interval jacobian_samples"),
    (1, 10_000, "training_max_iter"),
    (1, math.inf, "max_iter"),
    (0, 1e9, "pretraining_steps warmup jacobian_penalty jacobian_bound"),
    (0, 1e6, "cache"),
    (0, 256, "workers"),
    (0, 2**32 - 1, "seed"),
    (0, math.inf, "clip noise tol training_tol"),
    (-math.inf, 1e9, "train validation"),
)
_CHOICES = {
    "form": ("filtered", "preconditioned", "paper", "universal", "feed-forward", "denoiser"),
    "denoiser": ("DnCNN", "UNet", "NonexpansiveDenoiser"),
    "optimizer": ("adam", "muon"),
    "logger": ("tensorboard", "wandb", "mlflow", "csv"),
    "schedule": ("onecycle", "cosine", "linear", "constant"),
    "precision": ("32", "bf16", "fp16"),
    "solve_dtype": ("float32", "bfloat16", "float16"),
    "spectral_norm": ("matrix", "conv", "none"),
}

# Settings that have an effect only under a condition: their names, the condition, and the end of the error message.
_CONDITIONS: tuple[tuple[str, Callable[[TrainingSettings], bool], str], ...] = (
    ("squash", lambda s: s.resize is not None, "it has an effect only with resize"),
    ("sigma_range noise_range measurements", lambda s: s.universal, "it has an effect only with form=universal"),
    ("sigma noise", lambda s: not s.universal, "with form=universal, for all blurs and noise levels, it has no effect"),
    ("blocks", lambda s: s.denoiser == "UNet", "it has an effect only with denoiser=UNet"),
    (
        "freeze_statistics",
        lambda s: bool(s.resolved().batch_norm and s.implicit and (s.resolved().pretraining_steps or s.init)),
        "it has an effect only with batch_norm, an implicit form, and pretraining_steps or init",
    ),
    (
        "batch_norm spectral_norm identity_start",
        lambda s: s.denoiser == "DnCNN",
        "it has an effect only with denoiser=DnCNN",
    ),
    ("depth bias", lambda s: s.denoiser != "UNet", "with denoiser=UNet it has no effect"),
    (
        "injection",
        lambda s: s.denoiser == "UNet" and s.form in ("filtered", "preconditioned"),
        "it has an effect only with denoiser=UNet and form=filtered or preconditioned",
    ),
    ("step_size", lambda s: s.form == "paper", "it has an effect only with form=paper"),
    ("weight", lambda s: s.form not in ("paper", "denoiser"), "with form=paper or denoiser it has no effect"),
    (
        "averaging solver tol max_iter training_tol training_max_iter solve_dtype gradient jacobian_penalty",
        lambda s: s.implicit,
        "it has an effect only with form=filtered, preconditioned, paper or universal",
    ),
    (
        "solver max_iter training_max_iter training_tol solve_dtype",
        lambda s: not s.gradient.startswith("unrolled"),
        "with gradient=unrolled, which applies the layer a fixed number of times, it has no effect",
    ),
    (
        "steps learning_rate kernel_size sigma padding_mode noise",
        lambda s: s.form != "denoiser",
        "with form=denoiser, which trains by pretraining_steps and pretraining_rate, it has no effect",
    ),
    (
        "pretraining_rate pretraining_noise",
        lambda s: bool(s.resolved().pretraining_steps),
        "it has an effect only with pretraining_steps",
    ),
    ("warmup", lambda s: s.schedule != "onecycle", "with schedule=onecycle it has no effect"),
    (
        "jacobian_bound jacobian_interval jacobian_samples",
        lambda s: s.jacobian_penalty > 0,
        "it has an effect only with jacobian_penalty",
    ),
)


def check_settings(settings: TrainingSettings) -> None:
    """Raise ValueError, naming the setting, for a value out of its range or one that contradicts another setting."""
    for problems in (_wrong_values, _unused, _contradictions):
        for problem in problems(settings):
            raise ValueError(problem)


def _wrong_values(settings: TrainingSettings) -> Iterator[str]:
    values = vars(settings)
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            yield f"{name} is {value}; it takes finite numbers"
    for least, most, names in _BOUNDS:
        for name in names.split():
            value = values[name]
            if value is None or (name == "steps" and settings.form == "denoiser" and value == 0):
                continue
            if value < least:
                yield f"{name} is {value}; it takes {'an integer' if least else 'a number'} of at least {least}"
            if value > most:
                yield f"{name} is {value}; it takes {most:.0f} at most"
    for name in ("data", "init"):
        if values[name] == "" or "\0" in (values[name] or ""):
            yield f"{name} is {values[name]!r}; it takes a path"
    if settings.form == "plug-and-play":
        yield (
            "form is 'plug-and-play', which jfbfast train does not train; examples/train_denoiser.py trains its "
            "denoiser, and in Python jfbfast.PlugAndPlay(denoiser) takes any denoiser D(x, σ)"
        )
    for name, choices in _CHOICES.items():
        if values[name] is not None and values[name] not in choices:
            yield f"{name} is {values[name]!r}; it takes one of {', '.join(choices)}"
    for name in ("learning_rate", "pretraining_rate"):
        if values[name] is not None and not values[name] > 0:
            yield f"{name} is {values[name]}; it takes a positive number"
    for name in ("ema", "beta2"):
        if not 0 <= values[name] < 1:
            yield f"{name} is {values[name]}; it takes a number in [0, 1)"
    levels = "non-negative"
    for name, kind in (("sigma_range", "positive"), ("noise_range", levels), ("pretraining_noise", levels)):
        ends = values[name]
        if ends is None:
            continue
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] or (kind == "positive" and ends[0] == 0):
            yield f"{name} is {ends}; it takes two {kind} numbers, the lesser first"


def _unused(settings: TrainingSettings) -> Iterator[str]:
    """A setting without effect must have its default, so that a user does not believe it acts."""
    dependent = settings.dependent_defaults()
    for names, acts, message in _CONDITIONS:
        for name in () if acts(settings) else names.split():
            unused = (getattr(TrainingSettings, name), dependent.get(name), 0 if name == "steps" else None)
            if getattr(settings, name) not in unused:
                yield f"{name} is {getattr(settings, name)!r}; {message}"


def _contradictions(settings: TrainingSettings) -> Iterator[str]:
    s = settings
    solver, gradient = parse_kind("solver", s.solver), parse_kind("gradient", s.gradient)
    for name in ("tol", "max_iter"):
        if name in solver:
            yield f"solver is {s.solver!r}; {name} is a setting of its own"
    if s.implicit and gradient["kind"] == "shine" and solver["kind"] in ("Inertial", "Picard"):
        yield f"solver is {s.solver!r}; gradient={s.gradient} takes Anderson or Broyden"
    if s.universal and s.denoiser != "UNet":
        yield f"denoiser is {s.denoiser}; form=universal takes a UNet"
    if s.universal and s.batch_size % s.measurements:
        yield f"measurements is {s.measurements}; it takes a divisor of batch_size={s.batch_size}"
    for name, side in (("crop", s.crop), ("resize", s.resize)):
        if s.resolved().padding_mode == "valid" and side is not None and side < s.largest_kernel:
            yield f"{name} is {side}; with padding_mode=valid it takes at least the kernel's size, {s.largest_kernel}"
    for name, given in (("form=universal", s.universal), ("injection", s.injection)):
        if given and s.pretraining_steps:
            yield f"pretraining_steps is {s.pretraining_steps}; with {name} it takes 0"
    if s.form == "denoiser" and s.pretraining_steps == 0:
        yield "pretraining_steps is 0; with form=denoiser it takes an integer of at least 1"
