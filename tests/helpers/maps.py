"""Maps with known fixed points, and a layer that counts its calls."""

import torch


def linear_map(n, radius, seed=0):
    """x ↦ M x + b with the spectral radius of M as given, and its fixed point."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    matrix *= radius / torch.linalg.eigvals(matrix).abs().max()
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    return (
        (lambda x: x @ matrix.T + b),
        torch.linalg.solve(torch.eye(n, dtype=torch.float64) - matrix, b),
        matrix,
        b,
    )


class Counted:
    def __init__(self, layer):
        self.layer, self.calls, self.batches = layer, 0, []

    def __call__(self, x, *inputs):
        self.calls += 1
        self.batches.append(len(x))
        return self.layer(x, *inputs)


def dense_jacobian(layer, x, d):
    """The Jacobian of each sample, (B, N, N): the sample is copied N times, once for each row."""
    n = x[0].numel()
    unit = torch.eye(n, dtype=x.dtype).view(n, *x.shape[1:])
    found = []
    for sample, measurement in zip(x, d, strict=True):
        copies = sample.detach().expand(n, *sample.shape).clone().requires_grad_()
        out = layer(copies, measurement.expand(n, *measurement.shape))
        found.append(torch.autograd.grad(out, copies, unit)[0].reshape(n, n))
    return torch.stack(found)
