"""Implicit problems and a solver with an exact estimate, for the tests of the gradient methods."""

import torch

from helpers.models import Cell
from jfbfast import Anderson
from jfbfast.implicit.methods import gradient_method

TIGHT = Anderson(tol=1e-12, max_iter=300)


def one_layer(layer, x, inputs):
    """∂T/∂x of each sample as matrices (B, N, N), by rows."""
    x = x.detach().requires_grad_()
    out = layer(x, *inputs)
    rows = [
        torch.autograd.grad(out.flatten(1)[:, i].sum(), x, retain_graph=True)[0].flatten(1)
        for i in range(x.shape[1:].numel())
    ]
    return torch.stack(rows, 1)


class Estimate:
    """An exact estimate of the inverse, with the interface of a solver's own estimate."""

    def __init__(self, jacobians, factor):
        self.matrices = factor * torch.linalg.inv(torch.eye(jacobians.shape[-1]).to(jacobians) - jacobians)

    def transpose(self, w):
        return torch.einsum("bij,bi->bj", self.matrices.to(w.dtype), w.flatten(1)).view(w.shape)


class Exact:
    """A solver with the exact (I − J)⁻¹ as its estimate, scaled by ``factor``."""

    def __init__(self, solver=TIGHT, factor=1.0):
        self.solver, self.factor = solver, factor
        self.tol, self.atol, self.max_iter = solver.tol, solver.atol, solver.max_iter

    def solve(self, layer, x0, inputs=(), *, estimate=False, **options):
        solution = self.solver.solve(layer, x0, inputs, **options)
        if not estimate:
            return solution
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            jacobians = one_layer(layer, solution.value, inputs)
        return solution._replace(inverse=Estimate(jacobians, self.factor))


def solver_for(method, solver=TIGHT):
    return Exact(solver) if gradient_method(method).needs == "inverse" else solver


def problem(batch=3, size=12, dtype=torch.float64):
    return (
        Cell(size).to(dtype),
        torch.randn(batch, size, dtype=dtype, requires_grad=True),
        torch.zeros(batch, size, dtype=dtype),
    )


def gradients_of(module, d, out):
    """The gradients of a loss to which each element contributes differently."""
    weights = torch.linspace(-1, 2, out.numel()).to(out).view(out.shape)
    found = torch.autograd.grad((weights * out + out.square()).sum(), [d, *module.parameters()])
    return [g.clone() for g in found]


def assert_all_close(found, expected, rtol):
    for a, b in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) <= rtol * torch.linalg.vector_norm(b)
