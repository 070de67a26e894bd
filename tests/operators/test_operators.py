"""A, Aᵀ and the functions of AᵀA against PyTorch's convolution and dense matrices."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import jfbfast
from jfbfast.backends import dispatch as backends
from jfbfast.backends import reference
from jfbfast.operators import inverse, ops, tables
from jfbfast.operators.tables import Taps

MODES = reference.PADDING_MODES
BACKENDS = ("reference", "native")


def random_blur(radius_y, radius_x, mode, seed=0):
    generator = torch.Generator().manual_seed(seed)
    taps = (torch.rand(2 * r + 1, generator=generator, dtype=torch.float64) - 0.2 for r in (radius_y, radius_x))
    return jfbfast.SeparableBlur(*taps, mode)


def dense(operator, shape):
    """The matrix of an operator on images of one shape."""
    n = shape[0] * shape[1]
    return operator(torch.eye(n, dtype=torch.float64).view(n, *shape)).flatten(1).T


@st.composite
def problems(draw):
    mode = draw(st.sampled_from(MODES))
    radii = [draw(st.integers(0, 7)) for _ in range(2)]
    least = {"reflect": lambda r: r + 1, "circular": lambda r: max(1, r), "valid": lambda r: 2 * r + 1}
    shape = [draw(st.integers(least.get(mode, lambda r: 1)(r), 20)) for r in radii]
    return mode, radii, shape, draw(st.integers(0, 2**31))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_blur_is_torchs_convolution_and_its_adjoint_is_exact(backend, problem):
    mode, (radius_y, radius_x), shape, seed = problem
    blur = random_blur(radius_y, radius_x, mode, seed)
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    pad = (radius_x, radius_x, radius_y, radius_y)
    padded = x if mode == "valid" else F.pad(x, pad, mode="constant" if mode == "zeros" else mode)
    taps_y, taps_x = (torch.tensor(t, dtype=torch.float64) for t in (blur.taps.y, blur.taps.x))
    expected = F.conv2d(padded, (taps_y[:, None] * taps_x).expand(3, 1, -1, -1), groups=3)
    y = torch.randn(expected.shape, dtype=torch.float64)
    with jfbfast.backend(backend):
        blurred, back = blur(x), blur.adjoint(y)
    torch.testing.assert_close(blurred, expected, rtol=1e-12, atol=1e-12)
    difference = (blurred * y).sum() - (x * back).sum()
    assert abs(difference) <= 1e-13 * blurred.norm() * y.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(6, 9), (5, 4)])
def test_functions_of_the_normal_operator_against_dense_matrices(mode, shape):
    blur = random_blur(2, 1, mode)
    matrix = dense(blur, shape)
    normal = matrix.T @ matrix
    b = torch.randn(2, 3, *shape, dtype=torch.float64)
    flat = b.reshape(6, -1).T
    identity = torch.eye(len(normal), dtype=torch.float64)

    def check(got, expected):
        assert (got.reshape(6, -1).T - expected).norm() <= 1e-10 * expected.norm()

    check(blur.normal(b), normal @ flat)
    for damping in (1e-3, 0.3):
        inverse_of_normal = torch.linalg.inv(normal + damping * identity)
        check(blur.solve(b, damping), inverse_of_normal @ flat)
        check(blur.filter(b, damping), normal @ inverse_of_normal @ flat)
    if mode != "valid":  # where A has no inverse
        check(jfbfast.direct_inverse(blur, b), torch.linalg.solve(matrix, flat))


@pytest.mark.parametrize("mode", MODES)
def test_conjugate_gradients_agree_with_the_svd(mode, monkeypatch):
    blur = jfbfast.GaussianBlur((5, 7), (1.0, 2.0), mode)
    b = torch.randn(2, 1, 40, 31, dtype=torch.float64)
    damping = torch.tensor([1e-3, 0.1], dtype=torch.float64).view(2, 1, 1, 1)
    exact = blur.solve(b, damping)
    monkeypatch.setattr(inverse, "SVD_LIMIT", 16)
    torch.testing.assert_close(blur.solve(b, damping), exact, rtol=0, atol=1e-8)
    b[0, 0, 3, 4] = torch.nan
    found = blur.solve(b, damping)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], exact[1], rtol=0, atol=1e-8)


def test_conjugate_gradients_reach_their_tolerance_or_warn(monkeypatch):
    blur = jfbfast.GaussianBlur(5, 5.0)
    monkeypatch.setattr(inverse, "SVD_LIMIT", 16)
    b, damping = torch.randn(2, 1, 96, 64), 1e-3
    x = blur.solve(b, damping).double()
    assert (blur.normal(x) + damping * x - b).norm() <= 4e-6 * b.norm()  # and the rounding of x
    monkeypatch.setattr(inverse, "_CG_MAX_ITER", 3)
    with pytest.warns(jfbfast.ConvergenceWarning, match="2 of 2 images did not reach .* 1e-06 in 3"):
        blur.solve(b, damping)


def test_solve_takes_one_damping_a_sample():
    blur = jfbfast.GaussianBlur()
    b = torch.randn(3, 2, 9, 8)
    damping = torch.tensor([0.01, 0.1, 1.0])
    found = blur.solve(b, damping.view(3, 1, 1, 1))
    for i in range(3):
        torch.testing.assert_close(found[i], blur.solve(b[i], float(damping[i])))


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])  # one random direction, or all
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_derivatives_pass_gradcheck_once_and_twice(backend, mode, fast):
    blur = random_blur(1, 2, mode)
    x, r = torch.randn(2, 1, 2, 4, 6, dtype=torch.float64, requires_grad=True).unbind()
    d = torch.randn(blur(x).shape, dtype=torch.float64, requires_grad=True)
    step, damping = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.3))
    with jfbfast.backend(backend):
        for function, arguments in (
            (blur, (x,)),
            (blur.adjoint, (d,)),
            (blur.normal, (x,)),
            (blur.gradient, (x, d, r)),
            (blur.gradient_step, (x, d, r, step)),
            (blur.solve, (x, damping)),
            (blur.filter, (x, damping)),
        ):
            assert gradcheck(function, arguments, fast_mode=fast)
            assert gradgradcheck(function, arguments, fast_mode=fast)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        *(("native", "valid"), ("reference", "reflect")),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("native", "reflect"), ("reference", "valid"))),
    ],
)
def test_the_ops_pass_opcheck(backend, mode):
    filters = ([0.2, 0.5, 0.3], [0.1, 0.2, 0.4, 0.2, 0.1], mode)
    x, r = (torch.randn(2, 3, 6, 7, requires_grad=True) for _ in range(2))
    d = torch.randn(ops.blur(x, *filters).shape, requires_grad=True)
    step, damping = (torch.tensor(v, requires_grad=True) for v in (0.7, 0.3))
    strided = torch.randn(2, 7, 6, 3).permute(0, 3, 2, 1)
    with jfbfast.backend(backend):
        for op, arguments in (
            (ops.blur, (x, *filters)),
            (ops.blur, (strided, *filters, True)),
            (ops.gradient, (x, d, None, None, *filters)),
            (ops.gradient, (x, None, strided, step, *filters)),
            (ops.gradient, (strided, d, None, step, *filters)),
            (ops.tikhonov, (strided, damping, *filters)),
            (ops.gradient, (x, d, r, step, *filters)),
            (ops.tikhonov, (x, damping, *filters)),
            (ops.change_basis, (strided, False, *filters)),
            (ops.change_basis, (x, True, *filters)),
        ):
            torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("mode", ["replicate", "valid"])
def test_vmap_agrees_with_a_loop(mode):
    blur = random_blur(2, 1, mode)
    x = torch.randn(3, 2, 6, 7)
    d = torch.randn(blur(x).shape)
    step = torch.tensor([0.5, 0.7, 1.0])
    damping = torch.tensor([0.1, 0.2, 0.3])
    for function, arguments, dims in (
        (blur, (x,), 0),
        (blur.adjoint, (d,), 0),
        (blur.gradient, (x, d[0]), (0, None)),
        (lambda a, b, eta: blur.gradient_step(a, b, None, eta), (x, d, step), 0),
        (lambda a, b: blur.gradient_step(a, b, None, 0.3), (x, d), 0),
        (blur.solve, (x, damping), 0),
        (blur.solve, (x[0], damping), (None, 0)),
        (blur.solve, (x, damping[0]), (0, None)),
        (blur.eigenbasis((6, 7)).coefficients, (x,), 0),
        (blur.eigenbasis((6, 7)).image, (x,), 0),
    ):
        batched = torch.vmap(function, in_dims=dims)(*arguments)
        dims = dims if isinstance(dims, tuple) else (dims,) * len(arguments)
        for i in range(3):
            one = function(*(a if dim is None else a[i] for a, dim in zip(arguments, dims, strict=True)))
            torch.testing.assert_close(batched[i], one)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own rules for forward mode
def test_forward_mode_is_refused():
    """torch.library drops the tangent of an op without a rule, and a derivative would be 0 without a word."""
    blur = jfbfast.GaussianBlur()
    x = torch.randn(2, 1, 8, 9)
    for function in (blur, blur.normal, lambda x: blur.gradient_step(x, x, None, 0.5), lambda x: blur.solve(x, 0.1)):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (x,), (x,))


@pytest.mark.parametrize("mode", ["zeros", "valid"])
def test_compile_without_a_graph_break(mode):
    blur = jfbfast.GaussianBlur((3, 5), 1.0, mode)
    x, d = torch.randn(1, 3, 8, 9), torch.randn(1, 3, 6, 5) if mode == "valid" else torch.randn(1, 3, 8, 9)

    def function(x, d, step):
        return blur.filter(blur.gradient_step(x, d, blur.adjoint(d - blur(x)), step), 0.1)

    step = torch.tensor(0.5, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x, d, step), function(x, d, step))
    grads = [torch.autograd.grad(f(x, d, step).square().sum(), step)[0] for f in (compiled, function)]
    torch.testing.assert_close(*grads)


def test_solve_ignores_autocast_and_reduced_precision():
    blur, b = jfbfast.GaussianBlur(), torch.randn(1, 3, 32, 32)
    exact = blur.solve(b, 0.01)
    products, previous = torch.backends.mkldnn.matmul, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(blur.solve(b, 0.01), exact, rtol=0, atol=0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(previous)
    previous, products.fp32_precision = products.fp32_precision, "bf16"  # the newer setting
    try:
        torch.testing.assert_close(blur.solve(b, 0.01), exact, rtol=0, atol=0)
        assert products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = previous


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_solves_in_float32(dtype):
    blur = jfbfast.GaussianBlur()
    b = torch.randn(1, 3, 16, 16).to(dtype)
    found = blur.solve(b, 0.05)
    assert found.dtype == dtype
    torch.testing.assert_close(found, blur.solve(b.float(), 0.05).to(dtype), rtol=0, atol=0)


def test_deepcopy_pickle_state_dict_and_inference_mode():
    blur = jfbfast.GaussianBlur((3, 5), (0.5, 1.5), "circular")
    x = torch.randn(2, 8, 8)
    with torch.inference_mode():
        expected = blur(x)
    for copied in (copy.deepcopy(blur), pickle.loads(pickle.dumps(blur))):
        torch.testing.assert_close(copied(x), expected)
    assert blur.state_dict() == {}
    assert blur.sigma == (0.5, 1.5)
    leaf = x.clone().requires_grad_()
    blur.solve(leaf, 0.1).sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (8, 8), (2, 1, 3, 8, 8)])
def test_any_number_of_leading_dimensions(shape):
    blur = jfbfast.GaussianBlur()
    x = torch.randn(shape)
    for image in (
        blur(x),
        blur.adjoint(x),
        blur.normal(x),
        blur.gradient_step(x, x, None, 0.1),
        blur.solve(x, 0.1),
    ):
        assert image.shape == x.shape


def test_the_kernel_size_follows_from_sigma_unless_given():
    assert jfbfast.GaussianBlur(sigma=(0.1, 2.5)).kernel_size == (3, 17)
    assert jfbfast.GaussianBlur(5, sigma=(0.1, 2.5)).kernel_size == (5, 5)
    assert jfbfast.GaussianBlur(5, 2.0, "valid").margin == (2, 2)
    assert jfbfast.GaussianBlur(5, 2.0, "reflect").margin == (0, 0)


def test_flops_in_valid_mode_are_those_of_images_of_the_larger_shape():
    blur, x = jfbfast.SeparableBlur([1.0] * 3, [1.0] * 5, "valid"), torch.zeros(2, 8, 9)
    d = blur(x)
    for function, times in ((lambda: blur(x), 1), (lambda: blur.adjoint(d), 1), (lambda: blur.gradient(x, d), 2)):
        with FlopCounterMode(display=False) as counter:
            function()
        assert counter.get_total_flops() == times * 2 * x.numel() * (3 + 5)


def test_the_flops_of_a_change_of_basis_and_of_a_solve():
    blur, x = jfbfast.GaussianBlur(3, 1.0), torch.randn(2, 3, 6, 7)
    for function, products in ((blur.eigenbasis((6, 7)).coefficients, 1), (lambda x: blur.solve(x, 0.1), 2)):
        with FlopCounterMode(display=False) as counter:
            function(x)
        assert counter.get_total_flops() == products * 2 * x.numel() * (6 + 7)


def test_backend_that_cannot_serve_raises():
    with (
        jfbfast.backend("triton"),
        pytest.raises(RuntimeError, match="'triton' does not serve tensors on cpu"),
    ):
        jfbfast.GaussianBlur()(torch.zeros(8, 8))
    assert backends.selected_backend() == "auto"


def test_a_wrong_adjoint_is_caught(monkeypatch):
    monkeypatch.setattr(reference, "transpose", lambda bands: bands)
    tables.bands.cache_clear()
    try:
        blur = random_blur(2, 2, "zeros")
        x, y = torch.randn(2, 9, 9, dtype=torch.float64)
        difference = (blur(x) * y).sum() - (x * blur.adjoint(y)).sum()
        assert abs(difference) > 1e-3 * blur(x).norm() * y.norm()
    finally:
        tables.bands.cache_clear()


def test_table_cache_keeps_kinds_apart():
    taps = Taps((0.25, 0.5, 0.25), (0.25, 0.5, 0.25), "zeros")
    cpu = torch.device("cpu")
    assert tables.bands(taps, (4, 4), torch.bfloat16, cpu, False).y.dtype == torch.float32
    assert tables.bands(taps, (4, 4), torch.float64, cpu, False).y.dtype == torch.float64


@pytest.mark.parametrize(
    ("mode", "least"), [("zeros", 1), ("replicate", 1), ("circular", 3), ("reflect", 4), ("valid", 7)]
)
def test_each_padding_mode_has_its_smallest_image(mode, least):
    blur = jfbfast.GaussianBlur(7, 1.5, mode)
    x = torch.randn(1, 1, least, least + 1, dtype=torch.float64)
    torch.testing.assert_close((blur(x) * blur(x)).sum(), (x * blur.normal(x)).sum())
    if least > 1:
        for small in (x[:, :, 1:], x.mT[..., 1:]):
            with pytest.raises(ValueError, match=f"a side of {least - 1} pixels; 7 taps .* take at least {least}"):
                blur(small)
