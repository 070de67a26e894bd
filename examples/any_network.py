"""`fixed_point` turns any layer into an implicit network: here a deep equilibrium model that classifies two moons.

python examples/any_network.py [STEPS]
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import jfbfast


class Equilibrium(nn.Module):
    """Solves z* = tanh(0.9 W z* + U x + b) with ‖W‖₂ ≤ 1, which always is a contraction, and reads z* out linearly."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.hidden = spectral_norm(nn.Linear(features, features, bias=False))
        self.input = nn.Linear(2, features)
        self.output = nn.Linear(features, 1)
        self.solver = jfbfast.Anderson(tol=1e-4, max_iter=100)

    def layer(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.9 * self.hidden(z) + self.input(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x.new_zeros(len(x), self.features)
        fixed = jfbfast.fixed_point(self.layer, start, inputs=(x,), solver=self.solver, gradient="jfb")
        return self.output(fixed)[:, 0]


def moons(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy points (count, 2) on two interlocking half circles, and the half circle of each, 0 or 1: (count,)."""
    angle, label = torch.pi * torch.rand(count), torch.randint(2, (count,)).float()
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    return torch.where(label[:, None] == 0, upper, lower) + 0.1 * torch.randn(count, 2), label


def main(steps: int) -> None:
    torch.manual_seed(0)
    model = Equilibrium(features=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        x, label = moons(128)
        score = model(x)
        loss = F.binary_cross_entropy_with_logits(score, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            accuracy = ((score > 0) == (label > 0)).float().mean()
            print(f"step {step}: loss {loss.detach():.3f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
