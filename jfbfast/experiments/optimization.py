"""How a network is trained: Adam with its schedule, and the penalty that makes a layer contract."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JacobianPenalty:
    """The term weight · `jacobian_penalty` of a `DEGrad`'s loss.

    Attributes:
        weight: of the term.
        bound: of `jacobian_penalty`.
        interval: the term is in every interval-th step alone, and counts that many times.
        samples: of a process's batch, those it is taken on; None for all.
    """

    weight: float
    bound: float = 0.7
    interval: int = 1
    samples: int | None = None


@dataclass(frozen=True)
class Optimization:
    """Adam, and its learning rate over a run.

    Attributes:
        learning_rate: the highest.
        schedule: "onecycle", "cosine" (to zero) or "constant".
        warmup: steps of linear warm-up of the last two.
        beta2: of Adam.
    """

    learning_rate: float
    schedule: str = "onecycle"
    warmup: int = 0
    beta2: float = 0.999
