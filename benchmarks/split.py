"""Where the time of jfbfast's own step goes: the step once more, with a stopwatch around its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbfast import RED, DEGrad, SeparableBlur

from .implicit_rivals import TOL, Watched, autocast
from .problem import Problem, model
from .timing import spread

_STEPS = 3
_BLUR = ("forward", "adjoint", "gradient", "gradient_step", "solve", "filter")


@dataclass(frozen=True)
class Split:
    """Shares of a step's time, which sum to 1.

    Attributes:
        denoiser: the network and RED's arithmetic, without gradients.
        data_step: the blurs, the preconditioner and the filter, without gradients.
        anderson: residuals, Gram matrices, weights and mixing.
        gradient: the one layer that is traced, the loss, and backward.
        overhead: what is left: statuses, bookkeeping, spectral norms, the solve's own tensors.
    """

    denoiser: float
    data_step: float
    anderson: float
    gradient: float
    overhead: float


class Stopwatch:
    """Seconds by part; entering a part pauses the one around it. With gradients on, every part is "gradient"."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(Split.__dataclass_fields__, 0.0)
        self.device = device
        self.parts: list[str] = []
        self.since = 0.0

    def _book(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.parts:
            self.seconds[self.parts[-1]] += now - self.since
        self.since = now

    def __call__(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._book()
            self.parts.append("gradient" if torch.is_grad_enabled() and part != "overhead" else part)
            try:
                return function(*args, **kwargs)
            finally:
                self._book()
                self.parts.pop()

        return timed


@dataclass(frozen=True)
class _Timed(Watched):
    watch: Callable[[str, Callable[..., Any]], Callable[..., Any]] = lambda part, function: function

    def start(self, x: Tensor) -> Any:
        iteration: Any = self.watch("anderson", super().start)(x)
        for name in ("measure", "advance"):
            setattr(iteration, name, self.watch("anderson", getattr(iteration, name)))
        return iteration


@contextmanager
def _instrumented(watch: Stopwatch) -> Iterator[None]:
    """The classes, and not a model, since a solve evaluates a twin of it.

    On CUDA, where the solver takes its decisions on the device, its share is within the overhead's.
    """
    parts: list[tuple[type, str, str]] = [(RED, "forward", "denoiser")]
    parts += [(SeparableBlur, name, "data_step") for name in _BLUR]
    with ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(patch.object(owner, name, watch(part, getattr(owner, name))))
        yield


def split(given: Problem, layer: str, half: bool, evaluations: int) -> Split:
    """The medians of a few steps, after one to warm up."""
    net = model(given, layer).train()
    shares: list[dict[str, float]] = []
    for _ in range(_STEPS + 1):
        watch = Stopwatch(given.d.device)
        net.solver = _Timed(tol=TOL, max_iter=evaluations, watch=watch)
        with _instrumented(watch):
            watch("overhead", _step)(net, given, half, watch)
        total = sum(watch.seconds.values())
        shares.append({part: seconds / total for part, seconds in watch.seconds.items()})
    medians = {part: spread([s[part] for s in shares[1:]]).median for part in shares[0]}
    return Split(**{part: share / sum(medians.values()) for part, share in medians.items()})


def _step(net: DEGrad, given: Problem, half: bool, watch: Stopwatch) -> None:
    net.zero_grad()
    with autocast(given.d, half):
        out = net(given.d)
    watch("gradient", lambda: F.mse_loss(out, given.x).backward())()


def as_columns(shares: Split | None) -> dict[str, float | None]:
    """By the names of the CSV's columns."""
    return {f"split_{part}": None if shares is None else asdict(shares)[part] for part in Split.__dataclass_fields__}
