"""What a training step computes besides the evaluations of its layer does not grow with the number of layers."""

import pytest
import torch

from helpers.operations import operations
from jfbfast import RED, DEGrad, DnCNN, GaussianBlur, Picard, UNet


def dncnn(depth):
    return DnCNN(3, 4, depth, residual=True)


def unet(blocks):
    return UNet(3, (4, 6, 8), (blocks, blocks, blocks))


def outside(denoiser):
    """The operations of a forward in train() and of its backward, without those of the solve's iterations."""
    model = DEGrad(GaussianBlur(), RED(denoiser, 0.1, "weight"), preconditioner="exact").train()
    d = torch.rand(2, 3, 16, 16)
    forward = []
    for evaluations in (3, 4):
        model.solver = Picard(tol=0.0, max_iter=evaluations)
        model(d)
        forward.append(operations(lambda: model(d)))
    loss = model(d).square().mean()
    return forward[0] - 3 * (forward[1] - forward[0]), operations(loss.backward)


@pytest.mark.parametrize(
    ("make", "sizes", "bounds", "each"),
    [
        # A layer costs its convolution, statistics, batch norm and ReLU, and their backward.
        (dncnn, (9, 17), (195, 136), (4, 4)),
        # A block at each of five places costs two convolutions, a ReLU and a sum, and their backward.
        (unet, (1, 2), (130, 120), (5 * 4, 5 * 6)),
    ],
)
def test_a_step_runs_few_operations_outside_of_its_evaluations(make, sizes, bounds, each):
    few, many = (outside(make(size)) for size in sizes)
    for found, bound in zip(many, bounds, strict=True):
        assert found <= bound
    for a, b, bound in zip(few, many, each, strict=True):
        assert b - a <= bound * (sizes[1] - sizes[0])
