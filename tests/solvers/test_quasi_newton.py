"""Broyden's method against dense inverse Jacobians, and the rate of the inertial iteration."""

import math

import pytest
import torch

import jfbfast
from helpers.maps import linear_map
from jfbfast import Broyden, Inertial, Picard, Status


def dense_broyden(layer, x, steps, memory):
    """x ← x − H g with H rebuilt from −I by Broyden's updates with the last pairs; the iterates."""
    iterates, images, pairs = [x], [layer(x)], []
    for _ in range(steps):
        inverse = -torch.eye(x.numel(), dtype=x.dtype)
        for s, y in pairs[-memory:]:
            inverse += torch.outer(s - inverse @ y, s @ inverse) / (s @ inverse @ y)
        following = iterates[-1] - inverse @ (images[-1] - iterates[-1])
        image = layer(following)
        s = following - iterates[-1]
        pairs.append((s, image - images[-1] - s))
        iterates.append(following)
        images.append(image)
    return torch.stack(iterates)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("memory", [1, 2, 4, 30])
def test_steps_are_those_of_the_dense_inverse(backend, memory):
    matrix = linear_map(12, 0.8)[2]
    starts = torch.randn(3, 12, dtype=torch.float64)
    iterates = []

    def layer(x):
        return torch.tanh(x @ matrix.T) + 1

    def recorded(x):
        iterates.append(x.clone())
        return layer(x)

    steps = 11
    with jfbfast.backend(backend):
        Broyden(tol=0, max_iter=steps + 1, memory=memory).solve(recorded, starts)
    for sample, start in enumerate(starts):
        expected = dense_broyden(layer, start, steps, memory)
        found = torch.stack([x[sample] for x in iterates])
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_a_linear_map_is_solved_in_twice_its_dimension():
    """Gay (1979): Broyden's good method ends in at most 2n steps on n linear equations."""
    n = 7
    layer, fixed_point, *_ = linear_map(n, 0.9)
    solution = Broyden(tol=1e-9, max_iter=2 * n + 1, memory=2 * n).solve(layer, torch.zeros(1, n, dtype=torch.float64))
    assert solution.status[0] == Status.CONVERGED
    torch.testing.assert_close(solution.value[0], fixed_point, rtol=1e-7, atol=1e-7)


def test_an_update_with_a_zero_denominator_is_skipped_only_in_its_sample():
    """With ∂g/∂x a quarter turn, sᵀy = 0 at every step: what is left is x ← T(x)."""
    turn = torch.tensor([[0.0, 0.2], [-0.2, 0.0]], dtype=torch.float64)
    shrink = torch.tensor([[-0.6, 0.1], [0.0, -0.3]], dtype=torch.float64)
    matrices = torch.stack((turn, shrink))
    iterates = []

    def layer(x, matrices):
        iterates.append(x.clone())
        return x + (matrices @ x[:, :, None]).squeeze(2)

    x0 = torch.ones(2, 2, dtype=torch.float64)
    Broyden(tol=1e-12, max_iter=6).solve(layer, x0, (matrices,))
    x = x0[0]
    for found in iterates:
        torch.testing.assert_close(found[0], x, rtol=1e-12, atol=1e-12)
        x = x + turn @ x
    assert iterates[5][1].norm() < 1e-3 * x0[1].norm()


def test_it_solves_what_plain_iteration_cannot():
    matrix = linear_map(20, 0.5)[2]

    def layer(x):
        return -2.0 * x + torch.tanh(x @ matrix.T) + 1

    x0 = torch.zeros(2, 20, dtype=torch.float64)
    assert (Picard(tol=1e-8, max_iter=100).solve(layer, x0).status != Status.CONVERGED).all()
    assert (Broyden(tol=1e-8, max_iter=100).solve(layer, x0).status == Status.CONVERGED).all()


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.6])
def test_the_rate_of_the_inertial_iteration(momentum):
    """The larger root of r² = λ((1 + β)r − β) at the largest λ, for β below the best one."""
    largest = 0.97
    assert momentum <= (1 - math.sqrt(1 - largest)) / (1 + math.sqrt(1 - largest))
    spectrum = torch.linspace(0, largest, 30, dtype=torch.float64)
    residuals = []

    def layer(x):
        f = spectrum * x + 1
        residuals.append(float((f - x).norm()))
        return f

    Inertial(tol=0, max_iter=240, momentum=momentum).solve(layer, torch.zeros(1, 30, dtype=torch.float64))
    half = largest * (1 + momentum) / 2
    expected = half + math.sqrt(half**2 - largest * momentum)
    measured = (residuals[159] / residuals[119]) ** (1 / 40)
    assert abs(measured - expected) < 2e-3


def test_the_best_momentum_takes_the_root_of_the_steps():
    spectrum = torch.linspace(0, 0.99, 40, dtype=torch.float64)
    x0 = torch.zeros(1, 40, dtype=torch.float64)
    plain, inertial = (
        solver.solve(lambda x: spectrum * x + 1, x0)
        for solver in (Picard(1e-6, 3000), Inertial(1e-6, 3000, momentum=0.9 / 1.1))
    )
    assert (inertial.status == Status.CONVERGED).all()
    assert int(inertial.iterations) < int(plain.iterations) / 5


def test_too_much_momentum_is_dropped():
    """Eigenvalues of −0.8 grow under a momentum of ½, one sample's alone."""
    rates = torch.tensor([[-0.8], [0.95]], dtype=torch.float64)
    x0 = torch.zeros(2, 5, dtype=torch.float64)
    solution = Inertial(1e-8, 200).solve(lambda x, r: r * x + 1, x0, (rates,))
    assert (solution.status == Status.CONVERGED).all()
    plain = Picard(1e-8, 200).solve(lambda x, r: r * x + 1, x0, (rates,))
    assert solution.iterations[0] <= plain.iterations[0] + 4
    assert solution.iterations[1] < 0.7 * plain.iterations[1]
