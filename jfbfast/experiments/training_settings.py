"""`TrainingSettings`: what a training run is asked to do. Each field is a flag of `jfbfast train`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import MISSING, dataclass, field, replace
from typing import Any

from jfbfast.models.config import ModelConfig
from jfbfast.models.universal import CONDITIONS, injected_channels
from jfbfast.operators.blur import GaussianBlur


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
    channels: int = _option(
        "Channels of the network's images: 3 for colour (grey files are repeated), 1 for grey (colour files become "
        "grey), or the number that all files have.",
        3,
    )
    train: float | None = _option(
        "How many photographs to train on, by name: a share below 1, or a count. (default: all others)",
        None,
    )
    validation: float = _option("How many of the next photographs to validate on: a share below 1, or a count.", 0.1)
    resize: int | None = _option("Resize to a square of this side in pixels. (default: keep the size)", None)
    squash: bool = _option("With --resize: stretch to the square instead of cropping the centre.", False)
    crop: int = _option("Side of the random crops in pixels.", 64)
    flips: bool = _option("Mirror half of the crops, left to right.", True)

    kernel_size: int | None = _option(
        "Side of the Gaussian blur kernel in pixels, odd. (default: 5; with --form universal it follows from σ)", None
    )
    sigma: float = _option("Standard deviation of the blur in pixels.", 1.0)
    padding_mode: str | None = _option(
        "What the blur sees beyond the edges: zeros (mid-grey), reflect, replicate or circular; or valid, where the "
        "measurement leaves out the margin that depends on it. (default: reflect; with --form universal valid)",
        None,
    )
    noise: float = _option("Standard deviation of the noise, for images in [−1, 1].", 0.01)

    sigma_range: tuple[float, ...] | None = _option(
        "With --form universal: the smallest and the largest σ of the blurs to train on. (default: 0.3,5)", None
    )
    noise_range: tuple[float, ...] | None = _option(
        "With --form universal: the smallest and the largest noise level. (default: 0,0.1)", None
    )
    measurements: int = _option("With --form universal: how many pairs of σ and noise share a batch equally.", 4)

    form: str = _option(
        "What to train: the filtered, preconditioned or paper form of DE-GRAD; universal, one filtered DE-GRAD for all "
        "blurs and noise levels; feed-forward, the network applied once to Tikhonov's restoration; or denoiser, the "
        "network alone.",
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
    identity_start: bool = _option(
        "Start a DnCNN's hidden convolutions near the identity, so that a deep one with batch norm learns early.", False
    )
    freeze_statistics: bool = _option(
        "Keep the running statistics of the batch norms after pretraining, or those of --init. If they followed the "
        "fixed points, the paper's form would diverge.",
        False,
    )
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
        "Start from the weights of a shipped model or a file, whose network must be the same, the same without "
        "--injection, or its denoiser; all else may differ, such as the blur, the solver or the photographs. "
        "(default: random weights)",
        None,
    )
    pretraining_steps: int | None = _option(
        "Batches of denoising before the training. (default: 1000; 0 with --init, --injection or --form universal, "
        "except for --form denoiser)",
        None,
    )
    pretraining_rate: float | None = _option(
        "Highest learning rate of pretraining. (default: 1e-3; with --optimizer muon 0.01)", None
    )
    pretraining_noise: tuple[float, ...] = _option(
        "Smallest and largest noise level of pretraining, for images in [−1, 1].", (0.01, 0.12)
    )
    steps: int = _option("Batches of training the network itself; --resume takes more than the run had.", 500)
    batch_size: int = _option("Crops in a batch, over all processes together.", 16)
    optimizer: str = _option(
        "adam; or muon, which makes the updates of the inner convolutions orthogonal, and leaves the rest to Adam with "
        "a tenth of the learning rate.",
        "adam",
    )
    learning_rate: float | None = _option("Highest learning rate. (default: 3e-4; with --optimizer muon 0.01)", None)
    schedule: str = _option(
        "Schedule of the learning rate: onecycle, cosine, linear (down to zero over the last half) or constant.",
        "onecycle",
    )
    warmup: int = _option("Steps of linear warm-up, with all schedules but onecycle.", 0)
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
    logger: str = _option(
        "Where metrics go: tensorboard (files in OUT/tensorboard), wandb or mlflow (install that package; its "
        "environment variables choose the project and the server), or csv, the metrics.csv of every run alone.",
        "tensorboard",
    )

    @property
    def universal(self) -> bool:
        """Whether the network is for all blurs and noise levels."""
        return self.form == "universal"

    @property
    def largest_kernel(self) -> int:
        """The longest side of the blurs' kernels, in pixels."""
        settings = self.resolved()
        sigma = max(settings.sigma_range or (settings.sigma,))
        return max(GaussianBlur(settings.kernel_size, sigma).kernel_size)

    @property
    def extendable(self) -> str:
        """The setting that a resumed run may raise, the steps of its last phase."""
        return "pretraining_steps" if self.form == "denoiser" else "steps"

    @property
    def implicit(self) -> bool:
        """Whether the network's output is a fixed point."""
        return self.form not in ("feed-forward", "denoiser")

    def dependent_defaults(self) -> dict[str, Any]:
        """The values that None stands for, where they depend on other settings."""
        paper, muon = self.form == "paper", self.optimizer == "muon"
        pretrained = self.universal or self.injection or (self.init is not None and self.form != "denoiser")
        return {
            "kernel_size": None if self.universal else 5,
            "padding_mode": "valid" if self.universal else "reflect",
            "sigma_range": (0.3, 5.0) if self.universal else None,
            "noise_range": (0.0, 0.1) if self.universal else None,
            "features": (64, 96, 128) if self.denoiser == "UNet" else (64,),
            "batch_norm": paper,
            "spectral_norm": "matrix" if paper else "none",
            "bias": not paper,
            "training_tol": self.tol,
            "training_max_iter": self.max_iter,
            "pretraining_steps": 0 if pretrained else 1000,
            "pretraining_rate": 0.01 if muon else 1e-3,
            "learning_rate": 0.01 if muon else 3e-4,
        }

    def resolved(self) -> TrainingSettings:
        """The same settings with the dependent defaults filled in."""
        defaults = self.dependent_defaults()
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def model_config(self) -> ModelConfig:
        """The description of the network.

        A universal network starts at σ = 1 and noise 0.01, or at the nearest end of the range.

        Raises:
            ValueError: several numbers of features for a network that takes one, or a value that `ModelConfig` refuses.
        """
        settings = self.resolved()
        assert settings.features is not None
        network: dict[str, Any] = {"kind": self.denoiser}
        network |= {"channels": self.channels} if self.channels != 3 else {}  # older files of networks have none
        if self.denoiser == "UNet":
            network |= {"features": list(settings.features), "blocks": list(self.blocks)}
            network |= {"injection": True} if self.injection else {}
            if self.universal:
                network |= {"conditions": CONDITIONS, "injection": injected_channels(self.channels)}
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
            network |= {"identity_start": True} if self.identity_start else {}
        sigmas, noises = settings.sigma_range or (self.sigma,) * 2, settings.noise_range or (self.noise,) * 2
        same = ("form", "kernel_size", "padding_mode", "weight", "step_size", "averaging")
        return ModelConfig(
            **{name: getattr(settings, name) for name in same},
            denoiser=network,
            sigma=min(max(self.sigma, sigmas[0]), sigmas[-1]),
            noise=min(max(self.noise, noises[0]), noises[-1]),
            solver={**parse_kind("solver", self.solver), "tol": self.tol, "max_iter": self.max_iter},
            gradient=parse_kind("gradient", self.gradient),
            sigma_range=None if settings.sigma_range is None else list(settings.sigma_range),
            noise_range=None if settings.noise_range is None else list(settings.noise_range),
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
