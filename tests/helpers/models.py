"""Small networks that several tests train and solve."""

import torch
from torch import nn

from jfbfast import RED, DEGrad, DnCNN, GaussianBlur, UNet


class Cell(nn.Module):
    """A small implicit network that has nothing to do with images."""

    def __init__(self, size=12):
        super().__init__()
        self.inner, self.outer = nn.Linear(size, size), nn.Linear(size, size)
        with torch.no_grad():
            self.inner.weight *= 0.3

    def forward(self, x, d):
        return torch.tanh(self.inner(x)) + self.outer(d)


def networks():
    denoiser = DnCNN(3, 6, 4, residual=True)
    return {
        "paper": DEGrad(GaussianBlur(), DnCNN(3, 6, 4), step_size=0.5),
        "red": DEGrad(GaussianBlur(), RED(denoiser, 0.1), step_size=0.5, averaging=0.8),
        "preconditioned": DEGrad(GaussianBlur(), RED(denoiser, 0.1), preconditioner="exact"),
        "filtered": DEGrad(GaussianBlur(padding_mode="reflect"), RED(denoiser, 0.1, "weight"), preconditioner="exact"),
        "own dampings": DEGrad(
            GaussianBlur(), RED(denoiser, 0.1, 0.2), preconditioner="exact", damping=0.3, averaging=0.9
        ),
        "injection": DEGrad(
            GaussianBlur(),
            RED(UNet(3, (4, 6), (1, 1), injection=True), 0.1, "weight"),
            preconditioner="exact",
        ),
    }
