"""What every gradient method guarantees: precision, bad samples, memory, warnings."""

import copy
import sys
import warnings

import pytest
import torch

from helpers.implicit import TIGHT, assert_all_close, gradients_of, problem, solver_for
from helpers.models import Cell, networks
from jfbfast import (
    Anderson,
    ConvergenceWarning,
    DEGrad,
    DnCNN,
    GaussianBlur,
    Implicit,
    Picard,
    Unrolled,
    fixed_point,
    jacobian_penalty,
)
from jfbfast.implicit.methods import GRADIENTS, gradient_method
from jfbfast.spectrum import contraction_factor, operator_norm

METHODS = [*GRADIENTS, Implicit("cg"), Implicit("anderson")]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_retained_graph_is_differentiated_again(method):
    cell, d, x0 = problem()
    leaves = [d, *cell.parameters()]
    out = fixed_point(cell, x0, inputs=(d,), solver=solver_for(method), gradient=method)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    assert not torch.equal(first[0], second[0])
    both = torch.autograd.grad(out.square().sum() + out.sum(), leaves)
    torch.testing.assert_close(both, tuple(map(torch.add, first, second)), rtol=1e-5, atol=1e-5)  # as Implicit's tol
    with pytest.raises(RuntimeError, match="trace is freed; a second backward takes retain_graph=True in the first"):
        torch.autograd.grad(out.sum(), leaves)


@pytest.mark.parametrize(("tol", "seen"), [(1e-3, "bf16"), (5e-4, "ieee")])
@pytest.mark.parametrize("method", [*METHODS, Implicit(tol=1e-2)], ids=str)
def test_reduced_precision_is_not_used_for_a_tolerance_that_it_cannot_reach(method, tol, seen):
    cell, d, x0 = problem(dtype=torch.float32)
    products, found = torch.backends.mkldnn.matmul, []

    def note(*_):
        found.append(products.fp32_precision)

    def layer(x, d):
        image = cell(x, d)
        note()
        if image.requires_grad:
            image.register_hook(note)
        return image

    if getattr(gradient_method(method), "tol", 1.0) < tol:
        seen = "ieee"  # of the layer that carries the gradient, which serves the method's own tolerance
    products.fp32_precision = "bf16"
    try:
        solver, parameters = solver_for(method, Anderson(tol=tol)), list(cell.parameters())
        out = fixed_point(layer, x0, inputs=(d,), parameters=parameters, solver=solver, gradient=method)
        solves = len(found)
        out.sum().backward()
        assert products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = "none"
    assert len(found) > solves and {*found[solves - 1 :]} == {seen}


def test_a_second_derivative_is_refused():
    cell, d, x0 = problem()
    out = fixed_point(cell, x0, inputs=(d,))
    with pytest.raises(RuntimeError, match="create_graph is True; the gradient of a fixed point has no derivative"):
        torch.autograd.grad(out.sum(), d, create_graph=True)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_works_under_autocast(method):
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


def test_a_backward_under_autocast_is_as_exact_as_one_without():
    cell, d, x0 = problem(dtype=torch.float32)
    found = []
    for autocast in (True, False):
        out = fixed_point(cell, x0, inputs=(d,), solver=Anderson(tol=1e-6), gradient=Implicit("cg"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(gradients_of(cell, d, out))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_bad_sample_affects_neither_the_other_samples_nor_the_gradients(method):
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


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_diverging_sample_in_captured_data_has_gradient_zero(method):
    """Its layer's Jacobian is 3 I; without inputs it stays in the batch, with a gradient of zero."""
    factors = torch.tensor([0.5, 3.0, 0.2], dtype=torch.float64)[:, None]
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def layer(x):
        return weight * factors.to(x) * x + 1

    x0 = torch.zeros(3, 4, dtype=torch.float64)
    method = Unrolled(30) if method == "unrolled" else method
    with pytest.warns(ConvergenceWarning, match=r"1 diverged|1 of 3 samples diverged"):
        out = fixed_point(
            layer, x0, parameters=[weight], solver=solver_for(method, Picard(tol=1e-10, max_iter=100)), gradient=method
        )
    out[[0, 2]].sum().backward()
    assert weight.grad.isfinite().all() and (weight.grad > 0).all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_parameters_hook_runs_once(method):
    cell, d, x0 = problem()
    expected = gradients_of(cell, d, fixed_point(cell, x0, inputs=(d,), solver=solver_for(method), gradient=method))
    for p in (d, *cell.parameters()):
        p.register_hook(lambda g: g / 2)
    handle = cell.inner.weight.register_hook(lambda g: 8 * g)
    out = fixed_point(cell, x0, inputs=(d,), solver=solver_for(method), gradient=method)
    found = gradients_of(cell, d, out)
    factors = [4.0 if p is cell.inner.weight else 0.5 for p in (d, *cell.parameters())]
    assert_all_close(found, [k * g for k, g in zip(factors, expected, strict=True)], 1e-9)
    handle.remove()
    out = fixed_point(cell, x0, inputs=(d,), solver=solver_for(method), gradient=method)
    assert_all_close(gradients_of(cell, d, out), [g / 2 for g in expected], 1e-9)


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
def test_an_empty_batch_and_a_batch_of_bad_samples_have_gradient_zero(name):
    cell, d, x0 = problem()
    none = torch.zeros(0, 12, dtype=torch.float64, requires_grad=True)
    out = fixed_point(cell, x0[:0], inputs=(none,), solver=solver_for(name), gradient=name)
    assert out.shape == (0, 12)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), list(cell.parameters())))
    for start in (x0, x0 * torch.nan):
        with pytest.warns(ConvergenceWarning):
            out = fixed_point(cell, start, inputs=(d * torch.nan,), solver=solver_for(name), gradient=name)
        torch.testing.assert_close(out, start, rtol=0, atol=0, equal_nan=True)
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), list(cell.parameters())))


class Reshaped(Cell):
    def forward(self, x, d):
        return super().forward(x.reshape(x.shape[0], -1), d)  # which raises for an empty batch


@pytest.mark.parametrize("name", [name for name in GRADIENTS if name != "shine"])
def test_a_layer_that_cannot_take_an_empty_batch_never_gets_one(name):
    cell, d = Reshaped(), torch.full((1, 12), torch.nan, requires_grad=True)
    with pytest.warns(ConvergenceWarning, match="1 diverged|1 of 1 samples diverged"):
        out = fixed_point(cell, torch.zeros(1, 12), inputs=(d,), gradient=name)
    assert (out == 0).all()
    found = torch.autograd.grad((torch.nan * out).sum(), [d, *cell.parameters()])
    assert all((g == 0).all() for g in found)
    assert fixed_point(cell, torch.zeros(0, 12), inputs=(d[:0],), gradient="jfb").shape == (0, 12)


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_trace_does_not_depend_on_the_iterations(name):
    """What autograd keeps in forward, in elements, with 3 evaluations and with 15, whose residual is not 0 yet."""
    cell, d, x0 = problem()
    kept = []
    for max_iter in (3, 15):
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


@pytest.mark.parametrize("solver", ["gmres", "cg", "anderson"])
def test_an_adjoint_solve_that_stops_early_warns(solver):
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


@pytest.mark.parametrize("gradient", ["jfb", "unrolled"])
def test_a_batch_of_the_wrong_size_is_named_and_changes_no_buffer(gradient):
    model = DEGrad(GaussianBlur(), DnCNN(3, 4, 3)).train()
    state = copy.deepcopy(model.state_dict())
    x0, d = torch.zeros(4, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    for start, inputs, error, message in (
        (x0, (d,), ValueError, r"inputs\[0\] has shape \(1, 3, 8, 8\); it takes the batch size of x0"),
        (x0, d, TypeError, "inputs is a tensor; it takes a sequence of tensors"),
        (x0, (1.0,), TypeError, r"inputs\[0\] is a float"),
        (x0.numpy(), (x0,), TypeError, "x0 is a ndarray"),
        (x0.long(), (x0,), ValueError, "x0 is torch.int64"),
        (x0.sum(), (), ValueError, r"of shape \(\); it takes"),
    ):
        with pytest.raises(error, match=message):
            fixed_point(model.layer, start, inputs=inputs, gradient=gradient)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_parameter_named_twice_has_one_gradient(method):
    cell, d, x0 = problem()
    found = []
    for times in (1, 2):
        cell.zero_grad()
        named = [*cell.parameters()] * times
        out = fixed_point(cell, x0, inputs=(d,), parameters=named, solver=solver_for(method), gradient=method)
        out.square().sum().backward()
        found.append([p.grad.clone() for p in cell.parameters()])
    assert_all_close(*found, rtol=1e-12)


@pytest.mark.parametrize("gradient", ["jfb", "implicit", "shine", "phantom"])
def test_samples_may_be_scalars_or_empty(gradient):
    w = torch.tensor(0.5, requires_grad=True)
    d = torch.tensor([1.0, 2.0])
    out = fixed_point(
        lambda x, d: w * x + d, torch.zeros(2), inputs=(d,), parameters=[w], solver=Anderson(1e-6), gradient=gradient
    )
    torch.testing.assert_close(out, 2 * d, rtol=1e-4, atol=0)
    out.sum().backward()
    assert w.grad > 0
    for measure in (contraction_factor, operator_norm):
        torch.testing.assert_close(measure(lambda x: 0.5 * x, d).float(), torch.full((2,), 0.5))
    assert float(jacobian_penalty(lambda x: 2 * x, x=d, bound=0.5)) == pytest.approx(1.5**2)
    empty = fixed_point(lambda x, d: x, torch.zeros(2, 0), inputs=(d,), gradient=gradient)
    assert empty.shape == (2, 0)


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
