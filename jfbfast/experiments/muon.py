"""Muon: momentum whose update of each convolution's weight is made orthogonal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration, from Jordan et al.
_ITERATIONS = 5


def orthogonalized(update: Tensor) -> Tensor:
    """An approximation of U Vᵀ for the matrix update = U S Vᵀ; the singular values come out between 0.7 and 1.2."""
    x = update / (update.norm() + 1e-12)
    x = x.T if len(update) > update.shape[1] else x
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(update) > update.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the weights of a network's inner convolutions, and Adam for all other parameters.

    A weight (out, in, k, k) counts as the matrix (out, in·k·k). torch.optim.Muon takes matrices only. The first and
    the last convolution are left to Adam, as their authors advise for the first and last layers. Training by Muon goes
    further in as many steps than by Adam. But an implicit network contracts less then, so its solves are longer.

    Args:
        modules: the networks to train.
        learning_rate: of Muon; a weight's update has a norm of about learning_rate · √out. Adam's is a tenth of it.
        momentum: of Muon, with Nesterov's form.
        betas: of Adam.

    Example:
        >>> import torch
        >>> from jfbfast.experiments.muon import Muon
        >>> network = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
        >>> optimizer = Muon(network, learning_rate=0.01)
        >>> network(torch.rand(1, 4, 8, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [1, 5]
    """

    def __init__(
        self,
        *modules: nn.Module,
        learning_rate: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        named = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
        convolutions = [layer.weight for module in modules for layer in module.modules() if _is_convolution(layer)]
        inner = {id(weight) for weight in convolutions[1:-1] if weight.requires_grad}
        by_muon = {"params": [p for p in named if id(p) in inner], "lr": learning_rate, "momentum": momentum}
        by_adam = {"params": [p for p in named if id(p) not in inner], "lr": learning_rate / 10, "betas": betas}
        super().__init__([group for group in (by_muon, by_adam) if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if "momentum" in group else self._adam
            update([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _muon(self, parameters: Iterable[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            mean = state.setdefault("mean", torch.zeros_like(gradient))
            mean.lerp_(gradient, 1 - group["momentum"])
            matrix = gradient.lerp(mean, group["momentum"]).flatten(1)
            scale = group["lr"] * max(1, len(matrix) / matrix.shape[1]) ** 0.5
            parameter.sub_(orthogonalized(matrix).view_as(parameter), alpha=scale)

    def _adam(self, parameters: Iterable[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            if not state:
                state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
            state["step"] += 1
            state["mean"].lerp_(gradient, 1 - first)
            state["square"].lerp_(gradient.square(), 1 - second)
            mean = state["mean"] / (1 - first ** state["step"])
            square = state["square"] / (1 - second ** state["step"])
            parameter.sub_(mean / (square.sqrt() + 1e-8), alpha=group["lr"])


def _is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
