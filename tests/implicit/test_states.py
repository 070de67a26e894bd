"""States of several tensors, and of complex ones: solved and differentiated like one real tensor."""

import copy
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

import jfbfast
from helpers.implicit import TIGHT, assert_all_close
from jfbfast import Anderson, Broyden, ConvergenceWarning, Inertial, Picard, Status, fixed_point, solve_fixed_point
from jfbfast.solvers.states import Packing

COMPLEX, REAL = torch.complex128, torch.float64
SOLVERS = [TIGHT, Broyden(tol=1e-12, max_iter=300), Picard(1e-12, 300), Inertial(1e-12, 300, momentum=0.2)]


class Mixed(nn.Module):
    """A layer on {"h": real (B, 3), "z": (complex (B, 5), real (B,))}, neither symmetric nor holomorphic."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.real, self.wide = nn.Linear(3, 3, dtype=REAL), nn.Linear(3, 5, dtype=REAL)
        self.phase = nn.Parameter(torch.randn(5, dtype=COMPLEX) / 5)

    def forward(self, x, d):
        h, (z, s) = x["h"], x["z"]
        z_new = 0.3j * torch.tanh(self.wide(h)) + self.phase * z.conj() + d["z"]
        h_new = 0.4 * torch.tanh(self.real(h) + z.imag[:, :3] + s[:, None]) + d["h"]
        return {"z": (z_new, 0.3 * torch.cos(s) + z.real.mean(1) / 5), "h": h_new}  # in another order than the state


def mixed(batch=3):
    layer = Mixed()
    state = {
        "h": torch.zeros(batch, 3, dtype=REAL),
        "z": (torch.zeros(batch, 5, dtype=COMPLEX), torch.zeros(batch).double()),
    }
    d = {"h": torch.randn(batch, 3, dtype=REAL), "z": torch.randn(batch, 5, dtype=COMPLEX)}
    return layer, state, {name: value.requires_grad_() for name, value in d.items()}


def loss(x):
    return x["h"].square().sum() + (x["z"][0] * (1 + 2j)).imag.sum() + x["z"][0].abs().pow(3).sum() + x["z"][1].sum()


def gradients(value, layer, d):
    return torch.autograd.grad(value, [*d.values(), *layer.parameters()])


def by_autograd(layer, state, d, steps=80):
    for _ in range(steps):
        state = layer(state, d)
    return state


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_each_solver_solves_a_state_of_several_tensors(solver):
    layer, state, d = mixed()
    out, solution = solve_fixed_point(layer, state, inputs=(d,), solver=solver)
    expected = by_autograd(layer, state, d)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(solution.value, {k: expected[k] for k in state}, rtol=0, atol=1e-10, check_stride=False)
    assert list(out) == list(state) and isinstance(out["z"], tuple) and solution.aux is None
    assert (solution.status == Status.CONVERGED).all() and solution.residual.shape == (3,)


@pytest.mark.parametrize(
    "method",
    [jfbfast.Implicit(kind, tol=1e-12, max_iter=200) for kind in ("gmres", "cg", "anderson")]
    + [jfbfast.Neumann(60), jfbfast.Phantom(60, 1.0), jfbfast.Unrolled(80)],
    ids=str,
)
def test_exact_gradients_are_autograds_through_a_long_unrolling(method):
    layer, state, d = mixed()
    found = gradients(loss(fixed_point(layer, state, inputs=(d,), solver=TIGHT, gradient=method)), layer, d)
    assert_all_close(found, gradients(loss(by_autograd(layer, state, d)), layer, d), rtol=1e-8)


def test_jfb_is_autograds_gradient_of_one_application():
    layer, state, d = mixed()
    out, solution = solve_fixed_point(layer, state, inputs=(d,), solver=TIGHT)
    assert_all_close(gradients(loss(out), layer, d), gradients(loss(layer(solution.value, d)), layer, d), rtol=1e-9)


def test_shine_takes_the_solvers_estimate_on_packed_states():
    layer, state, d = mixed()
    exact = gradients(loss(by_autograd(layer, state, d)), layer, d)
    errors = []
    for method in ("jfb", jfbfast.Shine(fallback=False)):
        out = fixed_point(layer, state, inputs=(d,), solver=Broyden(tol=1e-10, max_iter=100), gradient=method)
        found = gradients(loss(out), layer, d)
        cosine = torch.cosine_similarity(
            *(
                torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in each])
                for each in (found, exact)
            ),
            dim=0,
        )
        errors.append(1 - float(cosine))
    assert max(errors) < 0.1


def test_gradcheck_of_a_complex_fixed_point():
    matrix = 0.3 * torch.randn(3, 3, dtype=COMPLEX, generator=torch.Generator().manual_seed(0))

    def solved(d, matrix):
        def layer(x, d):
            return x @ matrix.mT + 0.1 * x.conj() * d + d

        method = jfbfast.Implicit("gmres", tol=1e-13, max_iter=100)
        return fixed_point(layer, torch.zeros_like(d), inputs=(d,), parameters=[matrix], solver=TIGHT, gradient=method)

    d = torch.randn(2, 3, dtype=COMPLEX, generator=torch.Generator().manual_seed(1)) / 2
    assert torch.autograd.gradcheck(solved, (d.requires_grad_(), matrix.requires_grad_()), check_undefined_grad=False)


class Point(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize(
    "kind", [lambda a, b: [a, b], Point, lambda a, b: OrderedDict(a=a, b=b), lambda a, b: ((a,), [b])]
)
def test_any_pytree_is_a_state_and_samples_leave_the_batch(kind):
    sizes = []

    def layer(x, d):
        a, b = torch.utils._pytree.tree_leaves(x)
        sizes.append(len(a))
        return kind(d * a / 2 + 1, (b + a.mean((1, 2))[:, None]) / 3)

    rate = torch.tensor([0.01, 0.01, 1.9], dtype=REAL)[:, None, None]
    state = kind(torch.zeros(3, 3, 5, dtype=REAL), torch.zeros(3, 7, dtype=REAL))
    out = fixed_point(layer, state, inputs=(rate,), solver=Picard(1e-9, 500))
    a, b = torch.utils._pytree.tree_leaves(out)
    assert type(out) is type(state) and 1 in sizes and sizes[-1] == 3
    torch.testing.assert_close(a, (1 / (1 - rate / 2)).expand(3, 3, 5), rtol=1e-6, atol=0)
    torch.testing.assert_close(b, a.mean((1, 2))[:, None].expand(3, 7) / 2, rtol=1e-6, atol=0)


class Gated(nn.Module):
    """An LSTM's cell, as a user has it: its state is a tuple (h, c); a batch norm before it counts its updates."""

    def __init__(self):
        super().__init__()
        self.norm, self.cell = nn.BatchNorm1d(4), nn.LSTMCell(4, 5)
        with torch.no_grad():
            for p in self.cell.parameters():
                p *= 0.5

    def step(self, state, d):
        return self.cell(self.norm(d), state)


def test_a_recurrent_cell_trains_and_its_norm_updates_once():
    torch.manual_seed(0)
    model, d = Gated().double(), torch.randn(6, 4, dtype=REAL)
    start = (torch.zeros(6, 5, dtype=REAL),) * 2
    h, _ = fixed_point(model.step, start, inputs=(d,), solver=TIGHT, gradient="implicit")
    h.square().sum().backward()
    assert model.norm.num_batches_tracked == 1 and all(p.grad.abs().sum() > 0 for p in model.parameters())


class Mri(nn.Module):
    """x − η Fᴴ M (M F x − d) − η' R(x), on complex images, with a real convolution of two channels."""

    def __init__(self, mask):
        super().__init__()
        self.mask, self.network = mask, nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, d):
        data = torch.fft.ifft2(self.mask * torch.fft.fft2(x, norm="ortho") - d, norm="ortho")
        pair = torch.view_as_real(x[:, 0]).movedim(-1, 1)
        features = torch.view_as_complex(torch.tanh(self.network(pair)).movedim(1, -1).contiguous())
        return x - data - 0.2 * (x - 0.5 * features[:, None])


@pytest.mark.parametrize("options", [{}, {"solve_dtype": torch.bfloat16}], ids=str)
def test_a_complex_layer_with_convolutions_is_solved_in_float32(options):
    torch.manual_seed(0)
    mask = (torch.rand(1, 1, 9, 7) > 0.4).float()
    layer, truth = Mri(mask), torch.randn(2, 1, 9, 7, dtype=torch.complex64)
    d = mask * torch.fft.fft2(truth, norm="ortho")
    solver = Anderson(tol=1e-4, max_iter=100)
    out, solution = solve_fixed_point(layer, torch.zeros_like(truth), inputs=(d,), solver=solver, **options)
    assert out.dtype == torch.complex64 and (solution.status == Status.CONVERGED).all()
    assert (layer(out, d) - out).norm() < 3e-4 * out.norm()
    out.abs().square().sum().backward()
    assert layer.network.weight.grad.abs().sum() > 0


def test_auxiliary_outputs_are_those_of_the_last_application():
    def layer(x, d):
        image = {"x": torch.cos(x["x"]) / 2 + d}
        return image, {"at": x["x"], "name": "last"}

    d = torch.rand(3, 5, dtype=REAL, requires_grad=True)
    state = {"x": torch.zeros(3, 5, dtype=REAL)}
    out, aux = fixed_point(layer, state, inputs=(d,), has_aux=True)
    torch.testing.assert_close(torch.cos(aux["at"]) / 2 + d, out["x"])
    assert aux["name"] == "last" and not aux["at"].requires_grad
    out["x"].sum().backward()
    plain, solution = solve_fixed_point(lambda x, d: (x / 2 + d, x), d.detach(), inputs=(d,), has_aux=True)
    torch.testing.assert_close(solution.aux, solution.value)
    torch.testing.assert_close(solution.aux / 2 + d, plain)
    with pytest.raises(TypeError, match=r"has_aux is True and the layer returns a Tensor; it takes \(state, aux\)"):
        fixed_point(lambda x: x, torch.zeros(2, 3), has_aux=True)


def test_auxiliary_outputs_have_the_whole_batch_if_a_sample_diverges():
    d = torch.tensor([[0.5], [torch.nan], [0.2]], dtype=REAL)
    with pytest.warns(ConvergenceWarning, match="1 diverged"):
        _, aux = fixed_point(lambda x, d: (d * x + 1, x), torch.zeros(3, 1, dtype=REAL), inputs=(d,), has_aux=True)
    torch.testing.assert_close(aux[:, 0], torch.tensor([2, 0, 1.25], dtype=REAL), rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("gradient", ["jfb", jfbfast.Unrolled(7)], ids=str)
def test_a_callback_sees_every_evaluation(gradient):
    seen = []
    layer, state, d = mixed()
    out, solution = solve_fixed_point(
        layer, state, inputs=(d,), gradient=gradient, callback=lambda *given: seen.append(given)
    )
    numbers, states, residuals = zip(*seen, strict=True)
    assert list(numbers) == list(range(1, int(solution.iterations.max()) + (2 if gradient == "jfb" else 1)))
    torch.testing.assert_close(states[0], state)
    torch.testing.assert_close(states[-1], solution.value)
    torch.testing.assert_close(residuals[-1], solution.residual)
    assert all(r.shape == (3,) for r in residuals) and not states[-1]["h"].requires_grad
    torch.testing.assert_close(out, fixed_point(layer, state, inputs=(d,), gradient=gradient), rtol=1e-2, atol=1e-2)


def test_a_callback_may_keep_and_change_what_it_gets():
    kept = []

    def spoil(evaluation, x, residual):
        kept.append(x.clone())
        x.fill_(torch.nan)

    x0 = torch.zeros(2, 3)
    out = fixed_point(lambda x: x / 2 + 1, x0, solver=Picard(1e-3), callback=spoil)
    torch.testing.assert_close(out, torch.full((2, 3), 2.0), rtol=1e-3, atol=0)
    assert torch.equal(kept[0], torch.zeros(2, 3)) and torch.equal(kept[1], torch.ones(2, 3)) and not x0.any()


def test_a_warm_start_keeps_states_of_any_structure():
    layer, state, d = mixed()
    cache = jfbfast.WarmStart(dtype=None)
    _, cold = solve_fixed_point(layer, cache.get([4, 7, 1], state), inputs=(d,), solver=TIGHT)
    cache.put([4, 7, 1], cold)
    kept = cache.get([4, 7, 1], state)
    torch.testing.assert_close(kept, cold.value, rtol=0, atol=0)
    assert (solve_fixed_point(layer, kept, inputs=(d,), solver=TIGHT)[1].iterations <= 2).all()
    torch.testing.assert_close(cache.get([9, 8, 3], state), state)


def test_the_spectrum_of_a_complex_layer_is_that_of_its_real_form():
    values = jfbfast.spectrum.ritz_values(lambda x: (0.3 + 0.4j) * x, torch.ones(2, 3, dtype=COMPLEX))
    torch.testing.assert_close(values.abs(), torch.full((2, 6), 0.5, dtype=REAL))
    norm = jfbfast.spectrum.operator_norm(
        lambda x: {"a": 2 * x["b"], "b": x["a"]}, {"a": torch.ones(1, 2), "b": torch.ones(1, 2)}
    )
    torch.testing.assert_close(norm, torch.tensor([2.0]), check_dtype=False)


def test_an_empty_batch_keeps_its_structure():
    layer, state, d = mixed()
    out = fixed_point(
        layer, {"h": state["h"][:0], "z": tuple(z[:0] for z in state["z"])}, inputs=({k: v[:0] for k, v in d.items()},)
    )
    assert out["z"][0].shape == (0, 5) and out["z"][0].dtype == COMPLEX
    gradients(loss(out), layer, d)


def test_a_state_that_cannot_be_packed_is_refused_by_the_name_of_its_leaf():
    x = torch.zeros(2, 3)
    for state, error, told in (
        ({"a": x, "b": 3}, TypeError, r"x0\['b'\] is a int; it takes a tensor"),
        ((), TypeError, "x0 is an empty tuple"),
        (
            (x, x.double()),
            ValueError,
            r"x0\[1\] has the precision torch.float64; it takes that of x0\[0\], torch.float32",
        ),
        ((x, x[:1]), ValueError, r"x0\[1\] has the batch size 1; it takes that of x0\[0\], 2"),
        ((x, x.long()), ValueError, r"x0\[1\] is torch.int64 of shape \(2, 3\); it takes a floating-point or complex"),
    ):
        with pytest.raises(error, match=told):
            fixed_point(lambda x: x, state)
    for layer, error, told in (
        (lambda x: x[0], TypeError, "what the layer returns has another structure than x0: Node type mismatch"),
        (lambda x: (x[0], None), TypeError, r"what the layer returns has a NoneType for x0\[1\]"),
        (lambda x: (x[0], x[1][:, :2]), ValueError, r"has shape \(2, 2\) for x0\[1\]; it takes \(B, 3\)"),
        (lambda x: (x[0], 1j * x[1]), ValueError, r"is complex for x0\[1\], which is torch.float32"),
    ):
        with pytest.raises(error, match=told):
            fixed_point(layer, (x, x))
    with pytest.raises(
        ValueError, match=r"layer returns torch.complex64 for an x of torch.float32; it takes a complex x0"
    ):
        fixed_point(lambda x: 1j * x, x)
    with pytest.raises(TypeError, match=r"inputs\[0\]\['b'\] is a NoneType; it takes a tensor"):
        fixed_point(lambda x, d: x, x, inputs=({"a": x, "b": None},))
    with pytest.raises(
        ValueError, match=r"inputs\[0\]\['a'\] has shape \(1, 3\); it takes the batch size of x0, \(2, …\)"
    ):
        fixed_point(lambda x, d: x, x, inputs=({"a": x[:1]},))
    with pytest.raises(ValueError, match="compile_solve is True; it takes a state that is one real tensor"):
        fixed_point(nn.Identity(), (x,), compile_solve=True)


def test_packing_is_undone_by_unpacking_and_keeps_norms():
    _, state, _ = mixed()
    state = {"h": torch.randn_like(state["h"]), "z": tuple(torch.randn_like(z) for z in state["z"])}
    packing = Packing(state)
    x = packing.pack(state)
    assert x.shape == (3, 3 + 2 * 5 + 1)
    torch.testing.assert_close(packing.unpack(x), state, rtol=0, atol=0)
    squares = state["h"].square().sum(1) + state["z"][0].abs().square().sum(1) + state["z"][1].square()
    torch.testing.assert_close(x.norm(dim=1), squares.sqrt())
    conjugate = {"h": state["h"], "z": (state["z"][0].conj(), state["z"][1])}
    torch.testing.assert_close(packing.unpack(packing.pack(conjugate)), conjugate, rtol=0, atol=0)
    assert copy.deepcopy(packing).sizes == packing.sizes
