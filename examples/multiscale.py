"""A multiscale deep equilibrium model, whose state is several images at several resolutions (Bai et al., 2020, "MDEQ").

It learns to tell filled squares from hollow ones.

python examples/multiscale.py [STEPS]
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import jfbfast

State = dict[str, torch.Tensor]


class Multiscale(nn.Module):
    """Solves for images at two resolutions that depend on each other, and classifies by both."""

    def __init__(self, fine: int = 8, coarse: int = 12) -> None:
        super().__init__()
        self.features = {"fine": fine, "coarse": coarse}
        self.input = nn.Conv2d(1, fine, 3, padding=1)
        self.within_fine = spectral_norm(nn.Conv2d(fine, fine, 3, padding=1))  # so that the layer contracts
        self.within_coarse = spectral_norm(nn.Conv2d(coarse, coarse, 3, padding=1))
        self.down = spectral_norm(nn.Conv2d(fine, coarse, 3, stride=2, padding=1))
        self.up = spectral_norm(nn.Conv2d(coarse, fine, 1))
        self.output = nn.Linear(fine + coarse, 2)
        self.solver = jfbfast.Anderson(tol=1e-3, max_iter=100)

    def layer(self, z: State, image: torch.Tensor) -> State:
        from_coarse = F.interpolate(self.up(z["coarse"]), scale_factor=2)
        return {
            "fine": torch.tanh(0.3 * self.within_fine(z["fine"]) + 0.2 * from_coarse + self.input(image)),
            "coarse": torch.tanh(0.3 * self.within_coarse(z["coarse"]) + 0.5 * self.down(z["fine"])),
        }

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        count, _, height, width = image.shape
        start = {
            "fine": image.new_zeros(count, self.features["fine"], height, width),
            "coarse": image.new_zeros(count, self.features["coarse"], height // 2, width // 2),
        }
        z, self.solution = jfbfast.solve_fixed_point(self.layer, start, inputs=(image,), solver=self.solver)
        return self.output(torch.cat([z["fine"].amax((2, 3)), z["coarse"].amax((2, 3))], 1))


def shapes(count: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images (count, 1, side, side) of a square of 7 × 7 pixels somewhere, filled (1) or hollow (0): (count,)."""
    label, image = torch.randint(2, (count,)), torch.zeros(count, 1, side, side)
    corners = torch.randint(side - 7, (count, 2))
    for each, filled, (y, x) in zip(image[:, 0], label.tolist(), corners.tolist(), strict=True):
        each[y : y + 7, x : x + 7] = 0.6 if filled else 1.225  # as bright on average: 49 · 0.6 = 24 · 1.225
        if not filled:
            each[y + 1 : y + 6, x + 1 : x + 6] = 0
    return image + 0.1 * torch.randn_like(image), label


def main(steps: int) -> None:
    torch.manual_seed(0)
    model = Multiscale()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(1, steps + 1):
        image, label = shapes(16)
        score = model(image)
        loss = F.cross_entropy(score, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps:
            accuracy = (score.argmax(1) == label).float().mean()
            evaluations = model.solution.iterations.float().mean()
            print(f"step {step}: loss {loss.detach():.3f}, accuracy {accuracy:.3f}, {evaluations:.0f} evaluations")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
