"""Where jfbfast's training step spends its time: the same step with a stopwatch around its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from jfbfast import RED, SeparableBlur
from jfbfast.backends import native
from jfbfast.operators.eigenbasis import SeparableBasis
from jfbfast.solvers.anderson import _AndersonIteration

from .problem import Problem, model
from .step_sides import TOL, Counted

PARTS = {
    "denoiser": "denoiser",  # the network and RED's arithmetic, without gradients
    "data_step": "data step",  # the blurs, the preconditioner and the filter, without gradients
    "anderson": "Anderson",  # residuals, Gram matrices, weights and mixing
    "gradient": "gradient, backward",  # the one layer with its gradient, the loss, and backward
    "overhead": "overhead",  # the rest: statuses, bookkeeping, spectral norms, allocations of the solve
}
_STEPS = 3
_BLUR = ("forward", "adjoint", "gradient", "gradient_step", "solve", "filter")


class Stopwatch:
    """Seconds by part; entering a part pauses the one around it. With gradients on, every part is "gradient"."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.device = device
        self.parts: list[str] = []
        self.since = 0.0

    def _book(self) -> None:
        """Add the time since the last call to the current part."""
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


@contextmanager
def _instrumented(watch: Stopwatch) -> Iterator[None]:
    """Time the classes' methods, since a solve evaluates a copy of the model.

    On CUDA the solver decides on the device, and its share counts as overhead.
    """
    parts: list[tuple[type, str, str]] = [(RED, name, "denoiser") for name in ("forward", "denoised")]
    parts += [(SeparableBlur, name, "data_step") for name in _BLUR]
    parts += [(SeparableBasis, name, "data_step") for name in ("coefficients", "image")]
    parts += [(native.AndersonSolve, "step", "anderson")]
    parts += [(_AndersonIteration, name, "anderson") for name in ("measure", "advance")]
    with ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(patch.object(owner, name, watch(part, getattr(owner, name))))
        yield


def split(given: Problem, evaluations: int) -> dict[str, float]:
    """The share of each of `PARTS` in a step's time: medians of a few steps after a warm-up, scaled to sum to 1."""
    net = model(given).train()
    shares: list[dict[str, float]] = []
    for _ in range(_STEPS + 1):
        watch = Stopwatch(given.d.device)
        net.solver = Counted(tol=TOL, max_iter=evaluations)

        def step(watch: Stopwatch = watch) -> None:
            net.zero_grad()
            with given.autocast():
                out = net(given.d)
            watch("gradient", lambda: F.mse_loss(out, given.x).backward())()

        with _instrumented(watch):
            watch("overhead", step)()
        total = sum(watch.seconds.values())
        shares.append({part: seconds / total for part, seconds in watch.seconds.items()})
    medians = {part: median(share[part] for share in shares[1:]) for part in PARTS}
    return {part: share / sum(medians.values()) for part, share in medians.items()}
