"""The ways to differentiate a fixed point: against dense matrices, finite differences and plain autograd."""

import copy
import inspect
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models import Cell, networks
from torch import nn

from jfbfast import (
    JFB,
    Anderson,
    ConvergenceWarning,
    DEGrad,
    DnCNN,
    GaussianBlur,
    Implicit,
    Neumann,
    Phantom,
    Shine,
    Status,
    Unrolled,
    fixed_point,
)
from jfbfast.gradients import solve_fixed_point
from jfbfast.gradients.krylov import conjugate_gradients, gmres
from jfbfast.gradients.methods import GRADIENTS, gradient_method

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
    """What a solver that estimates the inverse hands over, here exact."""

    def __init__(self, jacobians, factor):
        self.matrices = factor * torch.linalg.inv(torch.eye(jacobians.shape[-1]).to(jacobians) - jacobians)

    def transpose(self, w):
        return torch.einsum("bij,bi->bj", self.matrices.to(w.dtype), w.flatten(1)).view(w.shape)


class Estimated(NamedTuple):
    value: torch.Tensor
    residual: torch.Tensor
    iterations: torch.Tensor
    status: torch.Tensor
    inverse: Estimate | None = None


class Exact:
    """A solver that hands over (I − J)⁻¹, scaled by ``factor``."""

    def __init__(self, solver=TIGHT, factor=1.0):
        self.solver, self.factor = solver, factor
        self.tol, self.atol, self.max_iter = solver.tol, solver.atol, solver.max_iter

    def solve(self, layer, x0, inputs=(), estimate=False):
        solution = self.solver.solve(layer, x0, inputs)
        if not estimate:
            return solution
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            jacobians = one_layer(layer, solution.value, inputs)
        return Estimated(*solution[:4], Estimate(jacobians, self.factor))


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


def test_unrolled_says_converged_by_the_solvers_tolerance():
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
        def solve(self, layer, x0, inputs=(), estimate=False):
            solution = super().solve(layer, x0, inputs, estimate)
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
    class Without(Exact):
        def solve(self, layer, x0, inputs=(), estimate=False):
            return super().solve(layer, x0, inputs)

    cell, d, x0 = problem()
    with pytest.raises(ValueError, match="solver is Without, which made no estimate"):
        fixed_point(cell, x0, inputs=(d,), solver=Without(), gradient="shine")
    with torch.no_grad():
        fixed_point(cell, x0, inputs=(d,), solver=Without(), gradient="shine")


@pytest.mark.skipif("estimate" not in inspect.signature(Anderson.solve).parameters, reason="no estimate of the inverse")
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


@pytest.mark.parametrize("method", [*GRADIENTS, Implicit("cg"), Implicit("anderson")], ids=str)
def test_every_method_under_autocast(method):
    cell, d, x0 = problem(dtype=torch.float32)
    solver = solver_for(method, Anderson(tol=2e-2))
    with torch.autocast("cpu", torch.bfloat16):
        out = fixed_point(cell, x0, inputs=(d,), solver=solver, gradient=method)
    assert out.dtype == torch.float32
    with warnings.catch_warnings():  # the products of a layer in bfloat16 are rounded
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = gradients_of(cell, d, out)
    expected = gradients_of(cell, d, fixed_point(cell, x0, inputs=(d,), solver=solver_for(method), gradient=method))
    assert all(g.dtype == torch.float32 for g in found)
    assert_all_close(found, expected, 0.1)


def test_a_backward_under_autocast_is_as_exact_as_without():
    cell, d, x0 = problem(dtype=torch.float32)
    found = []
    for autocast in (True, False):
        out = fixed_point(cell, x0, inputs=(d,), solver=Anderson(tol=1e-6), gradient=Implicit("cg"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(gradients_of(cell, d, out))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", [*GRADIENTS, Implicit("cg"), Implicit("anderson")], ids=str)
def test_a_bad_sample_takes_no_part(method):
    cell, d, x0 = problem(batch=4)
    good = [0, 1, 3]
    kept = d.detach()[good].requires_grad_()
    expected = fixed_point(cell, x0[good], inputs=(kept,), solver=solver_for(method), gradient=method)
    with torch.no_grad():
        d[2, 5] = torch.nan
    with pytest.warns(ConvergenceWarning, match="1 of 4 samples.* diverged"):
        found = fixed_point(cell, x0, inputs=(d,), solver=solver_for(method), gradient=method)
    assert torch.equal(found[2], x0[2])
    torch.testing.assert_close(found[good], expected, rtol=1e-11, atol=1e-11)
    gradients = torch.autograd.grad(found[good].square().sum(), [d, *cell.parameters()])
    assert (gradients[0][2] == 0).all()
    expected = torch.autograd.grad(expected.square().sum(), [kept, *cell.parameters()])
    assert_all_close([gradients[0][good], *gradients[1:]], expected, 1e-9)


@pytest.mark.parametrize("method", [*GRADIENTS, Implicit("cg"), Implicit("anderson")], ids=str)
def test_captured_data_of_a_sample_that_grows_without_bound(method):
    """Its layer's Jacobian is 3 I; without inputs it stays in the batch, with a gradient of zero."""
    factors = torch.tensor([0.5, 3.0, 0.2], dtype=torch.float64)[:, None]
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def layer(x):
        return weight * factors.to(x) * x + 1

    x0 = torch.zeros(3, 4, dtype=torch.float64)
    method = Unrolled(30) if method == "unrolled" else method
    with pytest.warns(ConvergenceWarning, match=r"1 diverged|1 of 3 samples diverged"):
        out = fixed_point(layer, x0, parameters=[weight], solver=solver_for(method, DIVERGING), gradient=method)
    out[[0, 2]].sum().backward()
    assert weight.grad.isfinite().all() and (weight.grad > 0).all()


DIVERGING = Anderson(tol=1e-10, max_iter=100, memory=1)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(name, mode):
    cell, d, x0 = problem()
    expected = fixed_point(cell, x0, inputs=(d,), solver=solver_for(name), gradient=name)
    with mode():
        found = fixed_point(cell, x0, inputs=(d,), solver=solver_for(name), gradient=name)
    assert not found.requires_grad
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", GRADIENTS)
def test_an_empty_batch_and_a_wholly_bad_one(name):
    cell, d, x0 = problem()
    none = torch.zeros(0, 12, dtype=torch.float64, requires_grad=True)
    out = fixed_point(cell, x0[:0], inputs=(none,), solver=solver_for(name), gradient=name)
    assert out.shape == (0, 12)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), list(cell.parameters())))
    with pytest.warns(ConvergenceWarning):
        out = fixed_point(cell, x0, inputs=(d * torch.nan,), solver=solver_for(name), gradient=name)
    assert torch.equal(out, x0)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), list(cell.parameters())))


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_trace_does_not_depend_on_the_iterations(name):
    """What autograd keeps in forward, in elements, with 3 and with 60 evaluations."""
    cell, d, x0 = problem()
    kept = []
    for max_iter in (3, 60):
        count = []
        solver = solver_for(name, Anderson(tol=0, max_iter=max_iter))
        with (
            warnings.catch_warnings(),
            torch.autograd.graph.saved_tensors_hooks(lambda t, count=count: count.append(t.numel()) or t, lambda t: t),
        ):
            warnings.simplefilter("ignore", ConvergenceWarning)
            fixed_point(cell, x0, inputs=(d,), solver=solver, gradient=name)
        kept.append(sum(count))
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("method", [Phantom(steps=3), Unrolled(4), Implicit(max_iter=300)], ids=str)
@pytest.mark.parametrize("bad", [False, True])
def test_running_statistics_step_once(method, bad):
    model = DEGrad(GaussianBlur(), DnCNN(3, 5, 3), step_size=0.3, gradient=method).double().train()
    d = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    good = slice(0, 3)
    if bad:
        d[2, 0, 0, 0] = torch.nan
        good = slice(0, 2)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model(d)
    for norm in (m for m in twin.modules() if hasattr(m, "power_iteration")):
        norm.power_iteration()
    seen = []
    norm = next(m for m in twin.modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    twin.eval()
    twin.layer(model.solution.value[good], d[good])
    updated = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    mean, var = seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3))
    torch.testing.assert_close(updated.running_mean, 0.9 * norm.running_mean + 0.1 * mean)
    torch.testing.assert_close(updated.running_var, 0.9 * norm.running_var + 0.1 * var)
    assert int(updated.num_batches_tracked) == 1


@pytest.mark.parametrize("solver", ["gmres", "cg", "anderson"])
def test_an_adjoint_that_stops_early_says_so(solver):
    cell, d, x0 = problem()
    out = fixed_point(cell, x0, inputs=(d,), solver=TIGHT, gradient=Implicit(solver, tol=1e-9, max_iter=2))
    with pytest.warns(
        ConvergenceWarning, match=r"3 of 3 samples did not reach tol=1e-09 in 2 .*largest residual [\d.]+e-"
    ):
        gradients = gradients_of(cell, d, out)
    assert all(g.isfinite().all() for g in gradients)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = fixed_point(cell, x0, inputs=(d,), solver=TIGHT, gradient=Implicit(solver, tol=0, max_iter=2))
        gradients_of(cell, d, out)


def test_a_warning_points_at_the_callers_line():
    cell, d, x0 = problem()
    model = networks()["filtered"]
    model.solver = hasty = Anderson(tol=1e-9, max_iter=2)

    def line():
        return sys._getframe(1).f_lineno

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        out, first = fixed_point(cell, x0, inputs=(d,), solver=hasty, gradient=Implicit(max_iter=1)), line()
        model(torch.randn(1, 3, 8, 8)), (second := line())
        out.sum().backward(), (third := line())
        fixed_point(lambda x, d: 1e9 * x + d, x0, inputs=(d,), gradient="unrolled"), (fourth := line())
    assert all(warning.filename == __file__ for warning in found)
    assert [warning.lineno for warning in found] == [first, second, third, fourth]


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("solve", ["gmres", "cg"])
def test_linear_solves_of_a_batch(solve, dtype, tol):
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
        found = conjugate_gradients(times(matrices), times(matrices.mT), b, tol, 3000)
    regular = [0, 1, 6]
    expected = torch.linalg.solve(matrices[regular].double(), b[regular].double().flatten(1)).view(3, 4, 5)
    error = (found.value[regular] - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (error <= 1e3 * tol).all()
    assert (found.residual[regular] <= tol).all()
    assert found.residual[2] == 0 and (found.value[2] == 0).all()
    assert found.residual[3].isnan() and found.value[3].isnan().any()
    assert found.residual[4] > 0.5 and found.value[4].isfinite().all()
    assert found.residual[5] > tol


def test_names_and_ranges():
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
