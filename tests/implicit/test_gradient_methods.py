"""The ways to differentiate a fixed point: against dense matrices, finite differences and plain autograd."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from helpers.implicit import TIGHT, Exact, assert_all_close, gradients_of, one_layer, problem, solver_for
from helpers.models import Cell, networks
from jfbfast import (
    JFB,
    Anderson,
    ConvergenceWarning,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Shine,
    Status,
    Unrolled,
    fixed_point,
    solve_fixed_point,
)
from jfbfast.implicit.krylov import cgls, gmres
from jfbfast.implicit.methods import GRADIENTS, gradient_method


@pytest.mark.parametrize(
    "name, solvers",
    [("red", ["gmres"]), ("filtered", ["gmres", "cg", "anderson"]), ("own dampings", ["gmres", "cg", "anderson"])],
)
def test_the_implicit_gradient_is_the_dense_one(name, solvers):
    model = networks()[name].double().eval()
    d = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    model.solver = Anderson(tol=1e-3, max_iter=5)  # the formula holds at any x
    expected = None
    for solver in solvers:
        model.gradient = Implicit(solver, tol=1e-9, max_iter=300)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* evaluations", ConvergenceWarning)
            out = model(d)
        found = gradients_of(model, d, out)
        if expected is None:
            x = model.solution.value
            jacobian = one_layer(model.layer, x, (d,))
            g = torch.linspace(-1, 2, out.numel()).to(out).view(out.shape) + 2 * out.detach()
            w = torch.linalg.solve(torch.eye(x[0].numel()).to(x) - jacobian.mT, g.flatten(1)[..., None]).view(g.shape)
            expected = torch.autograd.grad(model.layer(x, d), [d, *model.parameters()], w)
        assert_all_close(found, expected, 1e-6)


@pytest.mark.parametrize("solver", ["gmres", "cg", "anderson"])
@pytest.mark.parametrize("name", ["cell", "filtered"])
def test_the_implicit_gradient_is_that_of_the_converged_solve(name, solver):
    if name == "cell":
        module, d, x0 = problem()
        layer = module
    else:
        module = networks()[name].double().eval()
        layer = module.layer
        d = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
        x0 = torch.zeros_like(d)
    method = Implicit(solver, tol=1e-10, max_iter=300)

    def loss():
        return fixed_point(layer, x0, inputs=(d,), solver=TIGHT, gradient=method).square().sum()

    tensors = [d, *module.parameters()]
    gradients = torch.autograd.grad(loss(), tensors)
    for part in (slice(0, 1), slice(1, None)):  # the inputs, and the parameters
        directions = [torch.randn_like(t) for t in tensors[part]]
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                for tensor, direction in zip(tensors[part], directions, strict=True):
                    tensor += step * direction
                values.append(loss())
                for tensor, direction in zip(tensors[part], directions, strict=True):
                    tensor -= step * direction
        expected = (values[0] - values[1]) / 2e-6
        found = sum((g * v).sum() for g, v in zip(gradients[part], directions, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def linear(size=7, radius=0.8):
    """T(x) = x Mᵀ + d, whose gradient by d is w itself; M is not symmetric."""
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix *= radius / torch.linalg.matrix_norm(matrix, 2)
    d = torch.randn(4, size, dtype=torch.float64, requires_grad=True)
    return matrix, d, lambda x, d: x @ matrix.T + d


@pytest.mark.parametrize("terms", [1, 2, 6])
def test_neumann_is_its_series(terms):
    matrix, d, layer = linear()
    out = fixed_point(layer, torch.zeros_like(d), inputs=(d,), solver=TIGHT, gradient=Neumann(terms))
    g = torch.randn_like(out)
    expected = sum(g @ torch.linalg.matrix_power(matrix, k) for k in range(terms))
    torch.testing.assert_close(torch.autograd.grad(out, d, g)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps, damping", [(1, 1.0), (3, 1.0), (5, 0.5), (4, 0.2)])
def test_phantom_is_its_formula(steps, damping):
    matrix, d, layer = linear()
    out = fixed_point(layer, torch.zeros_like(d), inputs=(d,), solver=TIGHT, gradient=Phantom(steps, damping))
    g = torch.randn_like(out)
    step = (1 - damping) * torch.eye(len(matrix)).double() + damping * matrix
    expected = damping * sum(g @ torch.linalg.matrix_power(step, k) for k in range(steps))
    torch.testing.assert_close(torch.autograd.grad(out, d, g)[0], expected, rtol=1e-12, atol=1e-12)


def test_phantom_is_autograd_through_its_steps():
    cell, d, x0 = problem()
    out, solution = solve_fixed_point(cell, x0, inputs=(d,), gradient=Phantom(steps=3, damping=0.7))
    x = solution.value
    for _ in range(3):
        x = 0.3 * x + 0.7 * cell(x, d)
    torch.testing.assert_close(out, x, rtol=1e-13, atol=1e-13)
    assert_all_close(gradients_of(cell, d, out), gradients_of(cell, d, x), 1e-12)


@pytest.mark.parametrize("steps", [1, 6])
def test_unrolled_is_autograd_from_the_start(steps):
    cell, d, x0 = problem()
    out, solution = solve_fixed_point(cell, x0, inputs=(d,), solver=TIGHT, gradient=Unrolled(steps))
    iterates = [x0]
    for _ in range(steps):
        iterates.append(cell(iterates[-1], d))
    torch.testing.assert_close(out, iterates[-1], rtol=0, atol=0)
    assert_all_close(gradients_of(cell, d, out), gradients_of(cell, d, iterates[-1]), 1e-13)
    assert torch.equal(solution.value, iterates[-2]) and not solution.value.requires_grad
    change = (iterates[-1] - iterates[-2]).norm(dim=1) / iterates[-1].norm(dim=1)
    torch.testing.assert_close(solution.residual, change.detach())
    assert (solution.iterations == steps).all() and (solution.status == Status.MAX_ITER).all()


def test_unrolled_reports_convergence_by_the_solvers_tolerance():
    cell, d, x0 = problem()
    _, solution = solve_fixed_point(cell, x0, inputs=(d,), gradient=Unrolled(40), solver=Anderson(tol=1e-3))
    assert (solution.status == Status.CONVERGED).all() and (solution.residual <= 1e-3).all()


def test_shine_with_an_exact_estimate_is_the_implicit_gradient():
    cell, d, x0 = problem()
    found = gradients_of(cell, d, fixed_point(cell, x0, inputs=(d,), solver=Exact(), gradient=Shine(ratio=100)))
    out = fixed_point(cell, x0, inputs=(d,), solver=TIGHT, gradient=Implicit(tol=1e-12))
    assert_all_close(found, gradients_of(cell, d, out), 1e-9)


def test_shine_falls_back_sample_by_sample():
    _, d, layer = linear()
    estimate = torch.eye(7).double().repeat(4, 1, 1)
    estimate[0] *= 1.5
    estimate[1] *= -2.0
    estimate[2, 0, 0] = torch.nan

    class Solver(Exact):
        def solve(self, *args, **options):
            solution = super().solve(*args, **options)
            solution.inverse.matrices = matrices
            return solution

    matrices = estimate
    g = torch.randn_like(d)

    def w(method):
        out = fixed_point(layer, torch.zeros_like(d), inputs=(d,), solver=Solver(), gradient=method)
        return torch.autograd.grad(out, d, g)[0]

    torch.testing.assert_close(w(Shine()), g * torch.tensor([1.5, 1, 1, 1]).double()[:, None])
    torch.testing.assert_close(w(Shine(ratio=1.2)), g)
    kept = w(Shine(fallback=False))
    torch.testing.assert_close(kept, g * torch.tensor([1.5, -2, 1, 1]).double()[:, None])


def test_shine_refuses_a_solver_without_an_estimate():
    cell, d, x0 = problem()
    with pytest.raises(ValueError, match=r"gradient is Shine.*; it takes a solver with a history"):
        fixed_point(cell, x0, inputs=(d,), solver=Picard(), gradient="shine")
    with torch.no_grad():
        fixed_point(cell, x0, inputs=(d,), solver=Picard(), gradient="shine")


def test_shine_with_a_solvers_own_estimate():
    cell, d, x0 = problem(batch=4)
    solver = Anderson(tol=1e-10, memory=12)
    exact = gradients_of(cell, d, fixed_point(cell, x0, inputs=(d,), solver=solver, gradient=Implicit(tol=1e-10)))
    errors = []
    for method in (JFB(), Shine()):
        found = gradients_of(cell, d, fixed_point(cell, x0, inputs=(d,), solver=solver, gradient=method))
        errors.append(torch.linalg.vector_norm(found[0] - exact[0]))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", GRADIENTS)
def test_every_method_trains(name):
    teacher, student = Cell(), Cell()
    d = torch.randn(16, 12)
    x0 = torch.zeros_like(d)
    with torch.no_grad():
        target = fixed_point(teacher, x0, inputs=(d,), solver=Anderson(tol=1e-5))
    optimiser = torch.optim.Adam(student.parameters(), 0.02)
    solver = solver_for(name, Anderson(tol=1e-4))
    losses = []
    for _ in range(25):
        loss = F.mse_loss(fixed_point(student, x0, inputs=(d,), solver=solver, gradient=name), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("solve", ["gmres", "cg"])
def test_the_linear_solvers_solve_each_system_of_a_batch(solve, dtype, tol):
    """Each sample of its own scale; one zero, one of NaN, one singular, one with a NaN in its matrix."""
    matrices = torch.eye(20) - 0.9 * torch.randn(7, 20, 20) / 20**0.5
    matrices[4], matrices[4, 0, 0] = 0, 1.0
    matrices[5, 3, 3] = torch.nan
    matrices[6] = torch.diag(torch.tensor([1.0, 2.0, 3.0]).repeat(7)[:20])  # a Krylov space of three
    matrices = matrices.to(dtype)
    b = (torch.randn(7, 4, 5) * torch.tensor([1, 1e-15, 0, 1, 1, 1, 1e9])[:, None, None]).to(dtype)
    b[3, 0, 0] = torch.nan

    def times(matrices):
        return lambda w: torch.einsum("bij,bj->bi", matrices, w.flatten(1)).view(w.shape)

    if solve == "gmres":
        found = gmres(times(matrices), b, tol, 30)
    else:
        found = cgls(times(matrices), times(matrices.mT), b, tol, 3000)
    regular = [0, 1, 6]
    expected = torch.linalg.solve(matrices[regular].double(), b[regular].double().flatten(1)).view(3, 4, 5)
    error = (found.value[regular] - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (error <= 1e3 * tol).all()
    assert (found.residual[regular] <= tol).all()
    assert found.residual[2] == 0 and (found.value[2] == 0).all()
    assert found.residual[3].isnan() and found.value[3].isnan().any()
    assert found.residual[4] > 0.5 and found.value[4].isfinite().all()
    assert found.residual[5] > tol


def test_names_and_arguments_are_checked():
    assert {name: gradient_method(name) for name in GRADIENTS} == {
        "jfb": JFB(),
        "neumann": Neumann(5),
        "phantom": Phantom(5, 0.5),
        "implicit": Implicit("gmres", 1e-6, 50),
        "shine": Shine(True, 1.8),
        "unrolled": Unrolled(10),
    }
    for make, message in (
        (lambda: gradient_method("exact"), "gradient is 'exact'; it takes one of 'jfb', 'neumann'"),
        (lambda: Neumann(0), "terms is 0"),
        (lambda: Neumann(True), "terms is True; it takes an integer of at least 1"),
        (lambda: Phantom(steps=1.5), "steps is 1.5"),
        (lambda: Phantom(damping=0), "damping is 0"),
        (lambda: Implicit("lu"), "solver is 'lu'"),
        (lambda: Implicit(tol=-1), "tol is -1"),
        (lambda: Implicit(max_iter=0), "max_iter is 0"),
        (lambda: Shine(ratio=0), "ratio is 0"),
        (lambda: Unrolled(0), "steps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="gradient is 3"):
        gradient_method(3)
    with pytest.raises(ValueError, match=r"maps shape \(2, 3\) to \(2, 2\)"):
        fixed_point(lambda x: x[:, 1:], torch.zeros(2, 3), gradient="unrolled")
