"""An operator without closed forms, and the matrix of a linear map."""

import torch
from torch import nn


class Bare(nn.Module):
    """The operator with ``forward`` and ``adjoint`` alone, as another library's."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, x):
        return self.operator(x)

    def adjoint(self, y):
        return self.operator.adjoint(y)


def dense(function, shape):
    """The matrix of a linear map on batches of images of one shape, in float64."""
    n = torch.Size(shape).numel()
    return function(torch.eye(n, dtype=torch.float64).view(n, *shape)).reshape(n, -1).T
