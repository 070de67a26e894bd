"""`TrainingSettings`: what a training run is asked to do. Each field is a flag of `jfbfast train`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import MISSING, dataclass, field, replace
from typing import Any

from jfbfast.models.conditional import CONDITIONS
from jfbfast.models.config import ModelConfig


def _option(text: str, default: Any = MISSING) -> Any:
    """A setting with its help text, to which the default is added."""
    if default not in (None, MISSING):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else shown
        text = f"{text} (default: {shown})"
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training run, each with its help text.

    None stands for the default that the help text describes. Build it with
    `jfbfast.experiments.settings.make_settings`, which checks the values.
    """

    data: str = _option("Directory of photographs; its subdirectories are searched too.")
    train: float | None = _option(
        "How many photographs to train on, by name: a share below 1, or a count. (default: all others)",
        None,
    )
    validation: float = _option("How many of the next photographs to validate on: a share below 1, or a count.", 0.1)
    resize: int | None = _option("Resize to a square of this side in pixels. (default: keep the size)", None)
    squash: bool = _option("With --resize: stretch to the square instead of cropping the centre.", False)
    crop: int = _option("Side of the random crops in pixels.", 64)
    flips: bool = _option("Mirror half of the crops, left to right.", True)

    kernel_size: int = _option("Side of the Gaussian blur kernel in pixels, odd.", 5)
    sigma: float = _option("Standard deviation of the blur in pixels.", 1.0)
    padding_mode: str = _option(
        "What the blur sees beyond the edges: zeros (mid-grey), reflect, replicate or circular; or valid, where the "
        "measurement leaves out the margin that depends on it.",
        "reflect",
    )
    noise: float = _option("Standard deviation of the noise, for images in [−1, 1].", 0.01)

    sigma_range: tuple[float, ...] | None = _option(
        "Train one filtered UNet for blurs from the smaller to the larger σ, as in 0.5,5. (default: --sigma alone)",
        None,
    )
    noise_range: tuple[float, ...] | None = _option(
        "With --sigma-range: the noise levels, from the smaller to the larger, as in 0,0.1.", None
    )
    measurements: int = _option("With --sigma-range: how many pairs of σ and noise share a batch equally.", 4)

    form: str = _option(
        "What to train: the filtered, preconditioned or paper form of DE-GRAD; feed-forward, the network applied once "
        "to Tikhonov's restoration; or denoiser, the network alone.",
        "filtered",
    )
    denoiser: str = _option("The trained network: DnCNN, UNet or NonexpansiveDenoiser.", "DnCNN")
    features: tuple[int, ...] | None = _option(
        "Channels of the network; for a UNet at each scale. (default: 64; for a UNet 64,96,128)", None
    )
    blocks: tuple[int, ...] = _option("Residual blocks of a UNet at each scale.", (2, 2, 2))
    injection: bool = _option("Give a filtered or preconditioned layer's UNet Tikhonov's restoration too.", False)
    depth: int = _option("Number of convolutions in a DnCNN or NonexpansiveDenoiser.", 17)
    batch_norm: bool | None = _option("Use batch norm in a DnCNN. (default: only in the paper's form)", None)
    spectral_norm: str | None = _option(
        "Spectral normalisation in a DnCNN: matrix, as in the paper; conv, which bounds the convolution's norm; or "
        "none. (default: matrix in the paper's form, else none)",
        None,
    )
    bias: bool | None = _option("Use biases in the convolutions. (default: except in the paper's form)", None)
    weight: float = _option("λ, the weight of the regulariser, at the start of training.", 0.05)
    step_size: float = _option("η, the step size of the paper's form, at the start of training.", 1.0)
    averaging: float = _option("α of the averaged layer (1 − α)x + αT(x); 1 means T itself.", 1.0)
    solver: str = _option(
        "Fixed-point solver, with arguments as in Anderson:memory=3: Anderson, Broyden, Inertial or Picard.", "Anderson"
    )
    tol: float = _option("Relative residual at which a solve stops.", 1e-3)
    max_iter: int = _option("Largest number of evaluations of the layer in a solve.", 50)
    training_tol: float | None = _option("--tol during training. (default: --tol)", None)
    training_max_iter: int | None = _option("--max-iter during training. (default: --max-iter)", None)
    solve_dtype: str = _option(
        "Number format of a solve's first evaluations in training: float32, bfloat16 or float16.", "float32"
    )
    gradient: str = _option(
        "Gradient method, with arguments as in unrolled:steps=10: jfb, neumann, phantom, implicit, shine or unrolled.",
        "jfb",
    )

    init: str | None = _option(
        "Start from a shipped model or a file: the same network, the same without --injection or for one setting, or "
        "its denoiser. (default: random weights)",
        None,
    )
    pretraining_steps: int | None = _option(
        "Batches of denoising before the training. (default: 1000; 0 with --init, --sigma-range or --injection, except "
        "for --form denoiser)",
        None,
    )
    pretraining_rate: float = _option("Highest learning rate of pretraining.", 1e-3)
    pretraining_noise: tuple[float, ...] = _option(
        "Smallest and largest noise level of pretraining, for images in [−1, 1].", (0.01, 0.12)
    )
    steps: int = _option("Batches of training the network itself.", 500)
    batch_size: int = _option("Crops in a batch, over all processes together.", 16)
    learning_rate: float = _option("Highest learning rate.", 3e-4)
    schedule: str = _option("Schedule of the learning rate: onecycle, cosine or constant.", "onecycle")
    warmup: int = _option("Steps of linear warm-up, with the schedules cosine and constant.", 0)
    beta2: float = _option("β₂ of Adam.", 0.999)
    clip: float = _option("Scale a gradient of a larger norm down to this norm; 0 means never.", 1.0)
    jacobian_penalty: float = _option("Weight of the penalty on ∂T/∂x that trains T to contract; 0 means none.", 0.0)
    jacobian_bound: float = _option("With --jacobian-penalty: the penalty is 0 up to this norm of vᵀ∂T/∂x.", 0.7)
    jacobian_interval: int = _option(
        "With --jacobian-penalty: compute it in every N-th step, with N times the weight.", 1
    )
    jacobian_samples: int | None = _option("With --jacobian-penalty: samples of a batch to use. (default: all)", None)
    ema: float = _option("Decay of the exponential moving average of the weights; 0 means no average.", 0.0)
    precision: str = _option("Number format of training: 32 (float32), or autocast to bf16 or fp16.", "32")
    half: bool = _option("Store the trained weights in float16.", False)

    seed: int = _option("Seed of all random numbers.", 0)
    interval: int = _option("Steps between two checkpoints, each with a validation.", 200)
    log_every: int = _option("Steps between two rows of metrics.csv.", 10)
    workers: int = _option("Processes that load images; 0 loads them in the training process.", 0)
    cache: float = _option("GiB of memory for decoded photographs; if that is too little, each use decodes them.", 2.0)
    tensorboard: bool = _option("Write TensorBoard files too.", True)

    @property
    def conditional(self) -> bool:
        """Whether the network is for a range of blurs and noise levels."""
        return self.sigma_range is not None

    @property
    def implicit(self) -> bool:
        """Whether the network's output is a fixed point."""
        return self.form not in ("feed-forward", "denoiser")

    def dependent_defaults(self) -> dict[str, Any]:
        """The values that None stands for, where they depend on other settings."""
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
        """The same settings with the dependent defaults filled in."""
        defaults = self.dependent_defaults()
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def model_config(self) -> ModelConfig:
        """The description of the network.

        A network for a range starts at ``sigma`` and ``noise``; their defaults move to the nearest end of the range.

        Raises:
            ValueError: several numbers of features for a network that takes one, or a value that `ModelConfig` refuses.
        """
        settings = self.resolved()
        assert settings.features is not None
        network: dict[str, Any] = {"kind": self.denoiser}
        if self.denoiser == "UNet":
            network |= {"features": list(settings.features), "blocks": list(self.blocks)}
            network |= {"injection": True} if self.injection else {}
            network |= {"conditions": CONDITIONS} if self.conditional else {}
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
        sigma, noise = self.sigma, self.noise
        if self.sigma_range and sigma == TrainingSettings.sigma:
            sigma = min(max(sigma, self.sigma_range[0]), self.sigma_range[-1])
        if self.noise_range and noise == TrainingSettings.noise:
            noise = min(max(noise, self.noise_range[0]), self.noise_range[-1])
        same = ("form", "kernel_size", "padding_mode", "weight", "step_size", "averaging")
        return ModelConfig(
            **{name: getattr(self, name) for name in same},
            denoiser=network,
            sigma=sigma,
            noise=noise,
            solver={**parse_kind("solver", self.solver), "tol": self.tol, "max_iter": self.max_iter},
            gradient=parse_kind("gradient", self.gradient),
            sigma_range=None if self.sigma_range is None else list(self.sigma_range),
            noise_range=None if self.noise_range is None else list(self.noise_range),
        )


def parse_kind(name: str, text: str) -> dict[str, Any]:
    """Parse the setting ``name``, such as "unrolled:steps=10", into {"kind": "unrolled", "steps": 10}.

    Raises:
        ValueError: an argument without a value.
    """
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
        with suppress(ValueError):
            return kind(text)
    return text
