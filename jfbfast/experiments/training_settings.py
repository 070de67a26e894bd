"""The settings of a training run: one dataclass, from which come the flags of `jfbfast train` and its YAML file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from jfbfast.models.config import ModelConfig

# The most of a setting that has none by its nature, far beyond any use; `jfbfast.models.config` has the network's.
_MOST: dict[str, float] = {
    **dict.fromkeys(("train", "validation", "steps", "pretraining_steps", "warmup", "interval", "log_every"), 1e9),
    **dict.fromkeys(("jacobian_interval", "jacobian_samples", "jacobian_penalty", "jacobian_bound"), 1e9),
    **dict.fromkeys(("resize", "crop"), 16384),
    **dict.fromkeys(("batch_size", "measurements"), 1e6),
    **dict.fromkeys(("training_max_iter",), 10_000),
    "seed": 2**32 - 1,
    "workers": 256,
    "cache": 1e6,
}


@dataclass(frozen=True)
class TrainingSettings:
    """Every setting of `jfbfast train`, each with its help; None stands for what the help calls the default."""

    data: Annotated[str, "Directory of photographs, searched with its subdirectories."]
    train: Annotated[
        float | None, "Photographs to train on, first by name: a share or a count. (default: the rest)"
    ] = None
    validation: Annotated[float, "Photographs to validate on, next by name: a share or a count."] = 0.1
    resize: Annotated[
        int | None, "First resize each photograph to a square of this side in pixels. (default: as it is)"
    ] = None
    squash: Annotated[bool, "With --resize, stretch to that square, in place of keeping the centre."] = False
    crop: Annotated[int, "Side of the random crops in pixels."] = 64
    flips: Annotated[bool, "Mirror every other crop."] = True

    kernel_size: Annotated[int, "Side of the Gaussian blur in pixels, odd."] = 5
    sigma: Annotated[float, "Standard deviation of the blur in pixels."] = 1.0
    padding_mode: Annotated[
        str, "What the blur sees beyond the edge: zeros (mid-grey), reflect, replicate or circular."
    ] = "reflect"
    noise: Annotated[float, "Standard deviation of the noise, for images in [−1, 1]."] = 0.01

    sigma_range: Annotated[
        tuple[float, ...] | None,
        "Blurs to train one filtered UNet for, least and largest σ, as in 0.5,5; goes with --noise-range.",
    ] = None
    noise_range: Annotated[
        tuple[float, ...] | None, "Noise levels to train for, least and largest, on [−1, 1]; goes with --sigma-range."
    ] = None
    measurements: Annotated[
        int, "With --sigma-range: pairs of σ and noise in each batch, which they share out equally."
    ] = 4

    form: Annotated[
        str, "Form of the network: filtered, preconditioned, paper, feed-forward, or denoiser, which is that alone."
    ] = "filtered"
    denoiser: Annotated[str, "The trained network within: DnCNN, UNet or NonexpansiveDenoiser."] = "DnCNN"
    features: Annotated[
        tuple[int, ...] | None, "Channels of the denoiser, of a UNet at each scale. (default: 64; of a UNet 64,96,128)"
    ] = None
    blocks: Annotated[tuple[int, ...], "Residual blocks of a UNet at each scale."] = (2, 2, 2)
    injection: Annotated[
        bool, "Give the UNet of a filtered or preconditioned layer the measurement too, as Tikhonov's restoration."
    ] = False
    depth: Annotated[int, "Convolutions of a DnCNN or NonexpansiveDenoiser."] = 17
    batch_norm: Annotated[bool | None, "Batch norms in a DnCNN. (default: only in the paper's form)"] = None
    spectral_norm: Annotated[
        str | None,
        "Spectral norms in a DnCNN: matrix, as the paper; conv, which bounds the convolution's norm; none. "
        "(default: matrix in the paper's form, else none)",
    ] = None
    bias: Annotated[bool | None, "Biases in the convolutions. (default: except in the paper's form)"] = None
    weight: Annotated[float, "λ, the weight of the regulariser, at the start of training."] = 0.05
    step_size: Annotated[float, "η, the step size of the paper's form, at the start of training."] = 1.0
    averaging: Annotated[float, "α of the averaged layer (1 − α)x + αT(x); 1 is T itself."] = 1.0
    solver: Annotated[
        str,
        "Solver of the fixed point: Anderson, Broyden, Inertial or Picard, and arguments, as in Anderson:memory=3.",
    ] = "Anderson"
    tol: Annotated[float, "Relative residual at which a solve stops."] = 1e-3
    max_iter: Annotated[int, "Evaluations of the layer in a solve at most."] = 50
    training_tol: Annotated[float | None, "--tol in training. (default: that of --tol)"] = None
    training_max_iter: Annotated[int | None, "--max-iter in training. (default: that of --max-iter)"] = None
    solve_dtype: Annotated[
        str, "What a solve in training computes its first evaluations in: float32, bfloat16 or float16."
    ] = "float32"
    gradient: Annotated[
        str,
        "Gradient method: jfb, neumann, phantom, implicit, shine or unrolled, and arguments, as in unrolled:steps=10.",
    ] = "jfb"

    init: Annotated[
        str | None,
        "A shipped model or a file to start from: the same network, also one without injection or for one "
        "setting, or its denoiser.",
    ] = None
    pretraining_steps: Annotated[
        int | None,
        "Batches of denoising before the training. "
        "(default: 1000; 0 with --init, --sigma-range or --injection, but for a denoiser alone)",
    ] = None
    pretraining_rate: Annotated[float, "Highest learning rate of pretraining."] = 1e-3
    pretraining_noise: Annotated[tuple[float, ...], "Noise levels to pretrain on, least and largest, on [−1, 1]."] = (
        0.01,
        0.12,
    )
    steps: Annotated[int, "Batches of training the network itself."] = 500
    batch_size: Annotated[int, "Crops in a batch, over all processes together."] = 16
    learning_rate: Annotated[float, "Highest learning rate."] = 3e-4
    schedule: Annotated[str, "Schedule of the learning rate: onecycle, cosine or constant."] = "onecycle"
    warmup: Annotated[int, "Steps of linear warm-up, of the schedules cosine and constant."] = 0
    beta2: Annotated[float, "β₂ of Adam."] = 0.999
    clip: Annotated[float, "Largest norm of a gradient, which a larger one is scaled to; 0 for any."] = 1.0
    jacobian_penalty: Annotated[
        float, "Weight of the penalty on ∂T/∂x that trains the layer T to contract; 0 for none."
    ] = 0.0
    jacobian_bound: Annotated[float, "Norm of vᵀ∂T/∂x up to which --jacobian-penalty is zero."] = 0.7
    jacobian_interval: Annotated[int, "Steps between two penalties on ∂T/∂x, each counted that many times."] = 1
    jacobian_samples: Annotated[
        int | None, "Samples of a batch that --jacobian-penalty is taken on. (default: all)"
    ] = None
    ema: Annotated[float, "Decay of the weights' exponential moving average; 0 for none."] = 0.0
    precision: Annotated[str, "Precision of training: 32 bits, or bf16 or fp16 under autocast."] = "32"
    half: Annotated[bool, "Store the trained weights in float16."] = False

    seed: Annotated[int, "Seed of all random numbers."] = 0
    interval: Annotated[int, "Steps between two checkpoints, each with a validation."] = 200
    log_every: Annotated[int, "Steps between two rows of metrics."] = 10
    workers: Annotated[int, "Processes that load images; 0 for the one that trains."] = 0
    cache: Annotated[float, "GiB of memory for decoded images; more are decoded at each use."] = 2.0
    tensorboard: Annotated[bool, "Write TensorBoard files too."] = True

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{name} is {value}; it takes finite numbers")
        for name in (
            "crop",
            "batch_size",
            "interval",
            "log_every",
            "steps",
            "jacobian_interval",
            "jacobian_samples",
            "max_iter",
            "training_max_iter",
        ):
            least = self.form != "denoiser" or name != "steps"
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes an integer of at least 1")
        for name in (
            "seed",
            "workers",
            "warmup",
            "pretraining_steps",
            "clip",
            "cache",
            "jacobian_penalty",
            "jacobian_bound",
            "noise",
            "tol",
            "training_tol",
        ):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a number of at least 0")
        for name, most in _MOST.items():
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes {most:.0f} at most")
        for name in ("data", "init"):
            if getattr(self, name) == "" or "\0" in (getattr(self, name) or ""):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it takes a path")
        for name, choices in (
            ("denoiser", ("DnCNN", "UNet", "NonexpansiveDenoiser")),
            ("schedule", ("onecycle", "cosine", "constant")),
            ("precision", ("32", "bf16", "fp16")),
            ("solve_dtype", ("float32", "bfloat16", "float16")),
            ("spectral_norm", (None, "matrix", "conv", "none")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it takes one of {', '.join(filter(None, choices))}"
                )
        for name in ("learning_rate", "pretraining_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a positive number")
        for name in ("ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a number in [0, 1)")
        levels = self.pretraining_noise
        if len(levels) != 2 or not 0 <= levels[0] <= levels[1]:
            raise ValueError(f"pretraining_noise is {levels}; it takes two non-negative numbers, the lesser first")
        self._check_idle()
        solver, gradient = _description("solver", self.solver), _description("gradient", self.gradient)
        for name in ("tol", "max_iter"):
            if name in solver:
                raise ValueError(f"solver is {self.solver!r}; {name} is a setting of its own")
        if self.implicit and gradient["kind"] == "shine" and solver["kind"] in ("Inertial", "Picard"):
            raise ValueError(f"solver is {self.solver!r}; gradient={self.gradient} takes Anderson or Broyden")
        if (self.sigma_range is None) != (self.noise_range is None):
            raise ValueError("sigma_range and noise_range are for one network; it takes both, or neither")
        if self.conditional and (self.form, self.denoiser) != ("filtered", "UNet"):
            raise ValueError(f"form is {self.form} with a {self.denoiser}; sigma_range takes filtered with a UNet")
        if self.conditional and (self.measurements < 1 or self.batch_size % self.measurements):
            raise ValueError(f"measurements is {self.measurements}; it takes a divisor of batch_size={self.batch_size}")
        for name, given in (("sigma_range", self.conditional), ("injection", self.injection)):
            if given and self.pretraining_steps:
                raise ValueError(f"pretraining_steps is {self.pretraining_steps}; with {name} it takes 0")
        if self.form == "denoiser" and self.pretraining_steps == 0:
            raise ValueError("pretraining_steps is 0; with form=denoiser it takes an integer of at least 1")

    def _check_idle(self) -> None:
        """A setting that has no effect beside the others must have its default."""
        default, chosen = TrainingSettings.__dataclass_fields__, self._dependent_defaults()
        for told, acts, names in _CONDITIONS:
            for name in () if acts(self) else names:
                idle = (default[name].default, chosen.get(name), 0 if name == "steps" else None)
                if getattr(self, name) not in idle:
                    raise ValueError(f"{name} is {getattr(self, name)!r}; {told}")

    @property
    def conditional(self) -> bool:
        """Whether the network is for a range of measurements."""
        return self.sigma_range is not None

    @property
    def implicit(self) -> bool:
        """Whether the network is a fixed point."""
        return self.form not in ("feed-forward", "denoiser")

    @property
    def pretrains(self) -> bool:
        """Whether the denoiser is trained first."""
        steps = self.pretraining_steps
        return bool(self._dependent_defaults()["pretraining_steps"] if steps is None else steps)

    def _dependent_defaults(self) -> dict[str, Any]:
        """What None stands for where that depends on other settings."""
        paper = self.form == "paper"
        pretrained = self.conditional or self.injection or (self.init is not None and self.form != "denoiser")
        return {
            "features": (64, 96, 128) if self.denoiser == "UNet" else (64,),
            "batch_norm": paper,
            "spectral_norm": "matrix" if paper else "none",
            "bias": not paper,
            "training_tol": self.tol,
            "training_max_iter": self.max_iter,
            "pretraining_steps": 0 if pretrained else 1000,
        }

    def resolved(self) -> TrainingSettings:
        """With each default that depends on another setting in its place."""
        chosen = self._dependent_defaults()
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})

    def _within(self, name: str, limits: tuple[float, ...] | None) -> float:
        """σ or ν; of a network for a range, a default that lies beyond its range is the end that is next to it."""
        value: float = getattr(self, name)
        if limits is None or value != TrainingSettings.__dataclass_fields__[name].default:
            return value
        return min(max(value, limits[0]), limits[-1])

    def model_config(self) -> ModelConfig:
        """The network's description."""
        from jfbfast.models.conditional import CONDITIONS
        from jfbfast.models.config import ModelConfig

        settings = self.resolved()
        assert settings.features is not None
        network: dict[str, Any] = {"kind": self.denoiser}
        if self.denoiser == "UNet":
            network |= {"features": list(settings.features), "blocks": list(self.blocks)}
            if self.injection:
                network["injection"] = True
            if self.conditional:
                network["conditions"] = CONDITIONS
        elif len(settings.features) != 1:
            raise ValueError(f"features is {settings.features}; a {self.denoiser} takes one number")
        else:
            network |= {"features": settings.features[0], "depth": self.depth, "bias": settings.bias}
        if self.denoiser == "DnCNN":
            network |= {
                "norm": "batch" if settings.batch_norm else None,
                "spectral_norm": {"matrix": True, "conv": "conv", "none": False}[str(settings.spectral_norm)],
                "residual": self.form != "paper",
            }
        return ModelConfig(
            form=self.form,  # type: ignore[arg-type]  # checked where the model is made
            denoiser=network,
            kernel_size=self.kernel_size,
            sigma=self._within("sigma", self.sigma_range),
            padding_mode=self.padding_mode,
            noise=self._within("noise", self.noise_range),
            weight=self.weight,
            step_size=self.step_size,
            averaging=self.averaging,
            solver={**_description("solver", self.solver), "tol": self.tol, "max_iter": self.max_iter},
            gradient=_description("gradient", self.gradient),
            sigma_range=None if self.sigma_range is None else list(self.sigma_range),
            noise_range=None if self.noise_range is None else list(self.noise_range),
        )


# Settings that act beside certain others alone: what is said where they do not, whether they do, and their names.
_CONDITIONS: tuple[tuple[str, Callable[[TrainingSettings], bool], tuple[str, ...]], ...] = (
    ("it acts with resize alone", lambda s: s.resize is not None, ("squash",)),
    ("it acts with sigma_range alone", lambda s: s.conditional, ("measurements",)),
    ("it acts with denoiser=UNet alone", lambda s: s.denoiser == "UNet", ("blocks",)),
    ("it acts with denoiser=DnCNN alone", lambda s: s.denoiser == "DnCNN", ("batch_norm", "spectral_norm")),
    ("with denoiser=UNet it has no effect", lambda s: s.denoiser != "UNet", ("depth", "bias")),
    (
        "it acts with denoiser=UNet and form=filtered or preconditioned alone",
        lambda s: s.denoiser == "UNet" and s.form in ("filtered", "preconditioned"),
        ("injection",),
    ),
    ("it acts with form=paper alone", lambda s: s.form == "paper", ("step_size",)),
    ("with form=paper or denoiser it has no effect", lambda s: s.form not in ("paper", "denoiser"), ("weight",)),
    (
        "it acts with form=filtered, preconditioned or paper alone",
        lambda s: s.implicit,
        (
            "averaging",
            "solver",
            "tol",
            "max_iter",
            "training_tol",
            "training_max_iter",
            "solve_dtype",
            "gradient",
            "jacobian_penalty",
        ),
    ),
    (
        "with gradient=unrolled, which applies the layer a fixed number of times, it has no effect",
        lambda s: not s.gradient.startswith("unrolled"),
        ("solver", "max_iter", "training_max_iter", "training_tol", "solve_dtype"),
    ),
    (
        "with form=denoiser, which trains by pretraining_steps and pretraining_rate, it has no effect",
        lambda s: s.form != "denoiser",
        ("steps", "learning_rate", "kernel_size", "sigma", "padding_mode", "noise"),
    ),
    (
        "it acts with pretraining_steps alone",
        lambda s: s.pretrains,
        ("pretraining_rate", "pretraining_noise"),
    ),
    ("it acts with schedule=cosine or constant alone", lambda s: s.schedule != "onecycle", ("warmup",)),
    (
        "it acts with jacobian_penalty alone",
        lambda s: s.jacobian_penalty > 0,
        ("jacobian_bound", "jacobian_interval", "jacobian_samples"),
    ),
)


def _description(name: str, text: str) -> dict[str, Any]:
    """{"kind": "unrolled", "steps": 10} from unrolled:steps=10."""
    kind, _, arguments = text.partition(":")
    found: dict[str, Any] = {"kind": kind}
    for argument in filter(None, arguments.split(",")):
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{name} is {text!r}; it takes NAME or NAME:KEY=VALUE,KEY=VALUE")
        found[key.strip()] = _number(value.strip())
    return found


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
