"""Winograd's 3 × 3 convolution and its gradients against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from helpers import processes
from jfbfast import backend
from jfbfast.backends import conv3x3 as winograd
from jfbfast.backends import native, reference
from jfbfast.backends.fused import Geometry

pytestmark = pytest.mark.compiled

SIZES = ((1, 1), (3, 5), (4, 4), (13, 21), (64, 64))
CHANNELS = ((3, 17), (17, 3), (64, 96), (96, 64), (16, 80))
FURTHER = 8  # a 4 × 4 tile's output is at most so many times further from float64 than the direct convolution's


def problem(batch: int, channels: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs, outputs = channels
    x = torch.randn(batch, inputs, *size, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
    return x, weight, torch.randn(outputs, generator=generator)


def assert_as_good(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> None:
    exact = reference.conv3x3(x.double(), weight.double(), None if bias is None else bias.double(), relu)
    assert got.shape == exact.shape and got.dtype == x.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    direct = reference.conv3x3(x, weight, bias, relu)
    errors = [(y - exact).square().mean().sqrt() for y in (got, direct)]
    assert errors[0] <= FURTHER * errors[1] + 1e-6 * exact.square().mean().sqrt()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_float64(size: tuple[int, int], channels: tuple[int, int]) -> None:
    for batch, biased, relu in itertools.product((1, 3), (False, True), (False, True)):
        x, weight, bias = problem(batch, channels, size)
        given = bias if biased else None
        assert_as_good(native.conv3x3(x, weight, given, relu), x, weight, given, relu)


@pytest.mark.parametrize("size", tuple(itertools.product((1, 2, 5, 7, 8), (1, 4, 6, 9))))
def test_one_input_reaches_only_its_neighbours(size: tuple[int, int]) -> None:
    """The response to each pixel: nine taps, which are those of the weight, and zero elsewhere."""
    pixels = size[0] * size[1]
    x = torch.eye(pixels).view(pixels, 1, *size)
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)
    torch.testing.assert_close(native.conv3x3(x, weight), reference.conv3x3(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", ((0, 16, 8, 8), (2, 16, 0, 8), (2, 16, 8, 0)))
def test_empty_images_give_empty_results(shape: tuple[int, ...]) -> None:
    weight = torch.ones(20, 16, 3, 3)
    assert winograd.conv3x3(torch.zeros(shape), weight).shape == (shape[0], 20, *shape[2:])


LAYOUTS = {
    "channels first": lambda x: x.contiguous(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2],
    "cut out": lambda x: nn.functional.pad(x, (3, 2, 1, 4), value=torch.nan)[..., 1:-4, 3:-2],
    "some channels": lambda x: torch.cat((x, torch.full_like(x, torch.nan)), 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_images_and_weights_are_not_misread(layout: str) -> None:
    x, weight, bias = problem(2, (16, 17), (9, 21))
    strided = LAYOUTS[layout](x)
    expected = native.conv3x3(strided.clone(memory_format=torch.channels_last), weight, bias, True)
    back = native.conv3x3(expected, weight, None, False, None, True)
    for w in (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        assert torch.equal(native.conv3x3(strided, w, bias.repeat(2)[:17], True), expected)
        assert torch.equal(native.conv3x3(expected, w, None, False, None, True), back)


def test_a_transformed_weight_is_the_weight() -> None:
    x, weight, bias = problem(2, (32, 48), (9, 21))
    transformed = winograd.transformed_weight(weight)
    assert torch.equal(winograd.conv3x3(x, weight, bias, True, transformed), winograd.conv3x3(x, weight, bias, True))


def test_results_do_not_depend_on_the_thread_count_or_the_rest_of_the_batch() -> None:
    x, weight, bias = problem(5, (64, 32), (37, 22))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.conv3x3(x, weight, bias))
            assert torch.equal(native.conv3x3(x[3:4], weight, bias), results[-1][3:4])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nan_stays_in_its_sample_and_passes_the_relu() -> None:
    x, weight, bias = problem(3, (16, 16), (9, 14))
    for poison, relu in ((torch.nan, True), (torch.nan, False), (torch.inf, False)):
        spoilt = x.clone()
        spoilt[1, 5, 4, 7] = poison
        got, clean = (native.conv3x3(images, weight, bias, relu) for images in (spoilt, x))
        assert torch.equal(got[[0, 2]], clean[[0, 2]])
        reached = got[1, :, 3:6, 6:9]
        assert not reached.isfinite().any() and (reached.isnan().all() or not relu)


@pytest.mark.parametrize("channels", ((16, 16), (32, 17), (64, 96)))
def test_nothing_is_written_or_read_outside(channels: tuple[int, int]) -> None:
    """Every buffer lies between guards: NaN before and behind what is read, a mark around what is written."""
    x, weight, bias = problem(2, channels, (7, 10))
    expected = native.conv3x3(x, weight, bias)

    def guarded(values: Tensor, guard: float) -> Tensor:
        memory = torch.full((values.numel() + 128,), guard)
        memory[64:-64] = values.flatten()
        return memory

    images, kernels, biases = (
        guarded(t, torch.nan) for t in (x.permute(0, 2, 3, 1), native.winograd_weights(weight), bias)
    )
    out = guarded(torch.zeros(2, 7, 10, channels[1]), 7.0)
    addresses = (t.data_ptr() + 4 * 64 for t in (images, kernels, biases, out))
    native._native.convolution(native._DTYPES[torch.float32], *addresses, False, (2, 7, 10, *channels), 1)
    assert torch.equal(out[64:-64].view(2, 7, 10, -1).permute(0, 3, 1, 2), expected)
    assert (out[:64] == 7).all() and (out[-64:] == 7).all()


@pytest.mark.parametrize("isa", ["baseline", pytest.param("avx2", marks=pytest.mark.slow)])
def test_every_instruction_set_agrees_with_the_definition(isa: str) -> None:
    """The narrower kernels too, in a process of their own; where this CPU lacks them, those that it has."""
    names = "(float64 and not size4) or neighbours or misread or threads or nan_stays or outside or thread_count"
    processes.run_tests_with_isa(isa, __file__, names)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("channels", ((16, 17), (3, 16)))
def test_the_op_passes_opcheck(channels: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype).requires_grad_() for t in problem(2, channels, (5, 9)))
    torch.library.opcheck(winograd.conv3x3, (x, weight, bias, True))
    torch.library.opcheck(winograd.conv3x3, (x.contiguous(), weight, None, False))


def test_few_tiles_are_not_worth_the_transform_of_a_wide_weight() -> None:
    few, many = torch.randn(1, 64, 8, 8), torch.randn(2, 64, 8, 8)
    assert winograd._kernels(many, 64) is native
    assert winograd._kernels(few, 64) is reference and winograd._kernels(many, 128) is reference
    assert winograd._kernels(few, 64, uses=float("inf")) is native


def test_torch_computes_what_winograd_does_not_support() -> None:
    for channels, size, dtype in (((3, 8), (8, 8), torch.float32), ((16, 16), (1, 8), torch.float32)):
        x, weight, bias = (t.to(dtype) for t in problem(2, channels, size))
        assert torch.equal(winograd.conv3x3(x, weight, bias, True), reference.conv3x3(x, weight, bias, True))
    x, weight, bias = problem(2, (16, 16), (8, 8))
    with backend("reference"):
        assert torch.equal(winograd.conv3x3(x, weight, bias), reference.conv3x3(x, weight, bias))
    assert (
        winograd.transformed_weight(weight.double()) is None and winograd.transformed_weight(weight[:, :3]) is not None
    )
    assert winograd.transformed_weight(weight[:3, :3]) is None


@pytest.mark.parametrize(
    "change, message",
    (
        ({"x": torch.zeros(16, 8, 8)}, "x is"),
        ({"x": torch.zeros(1, 17, 8, 8)}, "weight is"),
        ({"weight": torch.zeros(16, 16, 5, 5)}, "weight is"),
        ({"weight": torch.zeros(16, 16, 3, 3).double()}, "weight is"),
        ({"bias": torch.zeros(1)}, "bias is"),
        ({"transformed": torch.zeros(5)}, "transformed is "),
    ),
)
def test_bad_input_is_named(change: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.zeros(1, 16, 8, 8), "weight": torch.zeros(16, 16, 3, 3), "bias": torch.zeros(16)} | change
    with pytest.raises(ValueError, match=message):
        winograd.conv3x3(given["x"], given["weight"], given["bias"], False, given.get("transformed"))


@pytest.mark.parametrize("channels", ((16, 16), (17, 64), (64, 96), (3, 5)))
@pytest.mark.parametrize("size", SIZES)
def test_the_weight_gradient_agrees_with_float64(size: tuple[int, int], channels: tuple[int, int]) -> None:
    for batch in (1, 3):
        x, _, _ = problem(batch, channels, size)
        gradient, _, _ = problem(batch, (channels[1], 1), size)
        got, direct = (f.conv3x3_weight_gradient(x, gradient) for f in (native, reference))
        exact = reference.conv3x3_weight_gradient(x.double(), gradient.double())
        for ours, theirs, e in zip(got, direct, exact, strict=True):
            assert ours.shape == e.shape and ours.is_contiguous()
            assert (ours - e).norm() <= FURTHER * (theirs - e).norm() + 2e-6 * e.norm()


def test_the_weight_gradient_takes_any_layout_and_number_of_threads() -> None:
    """With 288 tiles, enough for several parts."""
    x, weight, _ = problem(4, (64, 64), (34, 30))
    gradient = native.conv3x3(x, weight)
    expected = native.conv3x3_weight_gradient(x, gradient)
    before = torch.get_num_threads()
    try:
        for threads, layout in itertools.product((1, 2, 5), ("channels first", "cut out", "some channels")):
            torch.set_num_threads(threads)
            got = native.conv3x3_weight_gradient(LAYOUTS[layout](x), LAYOUTS[layout](gradient))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_the_weight_gradient_of_no_image_is_zero_and_of_nan_is_nan() -> None:
    weight, bias = native.conv3x3_weight_gradient(torch.zeros(0, 16, 8, 8), torch.zeros(0, 20, 8, 8))
    assert weight.shape == (20, 16, 3, 3) and not weight.any() and bias.shape == (20,) and not bias.any()
    gradient = torch.ones(1, 16, 8, 8)
    gradient[0, 3, 5, 5] = torch.nan
    weight, bias = native.conv3x3_weight_gradient(torch.ones(1, 16, 8, 8), gradient)
    assert weight[3].isnan().all() and torch.equal(bias.isnan(), torch.arange(16) == 3)


def test_the_weight_gradient_writes_nothing_outside() -> None:
    shape, channels = (2, 7, 10), (17, 20)
    memory = [torch.full((n + 128,), 7.0) for n in (9 * 17 * 20, 20)]
    x, gradient = (torch.randn(*shape, c) for c in channels)
    addresses = (x.data_ptr(), gradient.data_ptr(), *(t.data_ptr() + 4 * 64 for t in memory))
    native._native.weight_gradient(native._DTYPES[torch.float32], *addresses, (*shape, *channels), 1)
    expected = native.conv3x3_weight_gradient(x.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2))
    for got, e in zip(memory, expected, strict=True):
        assert torch.equal(got[64:-64], e.flatten()) and (got[:64] == 7).all() and (got[-64:] == 7).all()


@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("biased", (False, True))
def test_gradients_of_every_order_are_those_of_torch(biased: bool, relu: bool) -> None:
    """The gradient, and the gradient of a function of it, against float64 through torch's own convolution."""
    x, weight, bias = problem(2, (16, 17), (9, 6))

    def gradients(convolution: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in ((x, weight, bias) if biased else (x, weight))]
        out = convolution(*leaves, None, relu) if not biased else convolution(*leaves, relu)  # type: ignore[operator]
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*first, *second]

    found, exact = gradients(winograd.conv3x3, torch.float32), gradients(reference.conv3x3, torch.float64)
    for g, e in zip(found, exact, strict=True):
        assert (g - e).norm() <= 1e-5 * e.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch itself calls it
def test_a_relu_has_the_tangent_of_torch() -> None:
    """oneDNN's convolution with a ReLU has none, and would return zeros."""
    x, weight, bias = problem(2, (16, 17), (9, 6))
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    found = torch.func.jvp(lambda x: winograd.convolution(x, weight, bias, geometry, relu=True), (x,), (x,))
    expected = torch.func.jvp(lambda x: torch.conv2d(x, weight, bias, padding=1).relu(), (x,), (x,))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("channels", ((16, 17), (64, 96)))
@pytest.mark.parametrize("size", ((3, 5), (13, 21), (32, 32)))
def test_bfloat16_images_are_read_and_written_with_one_rounding(
    size: tuple[int, int], channels: tuple[int, int]
) -> None:
    x, weight, bias = (t.bfloat16() for t in problem(2, channels, size))
    for relu, given in itertools.product((False, True), (None, bias)):
        got = native.conv3x3(x, weight, given, relu)
        exact = reference.conv3x3(x.double(), weight.double(), None if given is None else given.double(), relu)
        assert got.dtype == torch.bfloat16 and got.is_contiguous(memory_format=torch.channels_last)
        assert (got - exact).norm() <= 1.02 * (exact.bfloat16() - exact).norm()
    gradient = problem(2, (channels[1], 1), size)[0].bfloat16()
    found = native.conv3x3_weight_gradient(x, gradient)
    for got, e in zip(found, reference.conv3x3_weight_gradient(x.double(), gradient.double()), strict=True):
        assert got.dtype == torch.bfloat16 and (got - e).norm() <= 1.05 * (e.bfloat16() - e).norm()


def test_bfloat16_images_in_any_layout_or_with_nan_are_not_misread() -> None:
    x, weight, bias = (t.bfloat16() for t in problem(2, (16, 17), (9, 21)))
    for layout in LAYOUTS.values():
        strided = layout(x)
        expected = native.conv3x3(strided.clone(memory_format=torch.channels_last), weight, bias, True)
        assert torch.equal(native.conv3x3(strided, weight, bias, True), expected)
    x[1, 3, 4, 5] = torch.nan
    got = native.conv3x3(x, weight, bias, True)
    assert got[0].isfinite().all() and got[1, :, 3:6, 4:7].isnan().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
def test_the_adjoint_and_its_gradients_are_those_of_a_transposed_convolution() -> None:
    x, _, _ = problem(2, (17, 1), (9, 6))
    weight, bias = torch.randn(17, 16, 3, 3), torch.randn(16)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        out = winograd.conv3x3(*leaves, True, None, True)
        expected = torch.conv_transpose2d(*exact, padding=1).relu()
        found = [out, *torch.autograd.grad(out.float().square().sum(), leaves)]
        for got, e in zip(found, [expected, *torch.autograd.grad(expected.square().sum(), exact)], strict=True):
            assert (got - e).norm() <= tolerance * e.norm()
    assert winograd._kernels(x, 16) is native
    torch.library.opcheck(winograd.conv3x3, (x, weight, bias, False, None, True))


def test_gradcheck_where_torch_computes_it() -> None:
    x, weight, bias = (t.double().requires_grad_() for t in problem(2, (2, 3), (4, 5)))
    torch.autograd.gradcheck(winograd.conv3x3, (x, weight, bias, False))
    torch.autograd.gradgradcheck(winograd.conv3x3, (x, weight, bias, False))
    adjoint = x, weight.detach().transpose(0, 1).contiguous().requires_grad_(), bias, False, None, True
    torch.autograd.gradgradcheck(winograd.conv3x3, adjoint)
    assert torch.autograd.gradcheck(winograd.conv3x3, (x, weight.detach()))


@pytest.mark.parametrize("needed", ((True, False, False), (False, True, False), (False, False, True)))
def test_only_requested_gradients_are_computed(needed: tuple[bool, ...]) -> None:
    x, weight, bias = (t.requires_grad_(n) for t, n in zip(problem(2, (16, 16), (8, 8)), needed, strict=True))
    winograd.conv3x3(x, weight, bias, True).sum().backward()
    assert tuple(t.grad is not None for t in (x, weight, bias)) == needed


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
def test_the_weight_gradient_op_passes_opcheck_and_refuses_other_shapes() -> None:
    for dtype, channels in ((torch.float32, 16), (torch.float32, 3), (torch.float64, 16)):
        x, gradient = (torch.randn(2, c, 5, 8, dtype=dtype, requires_grad=True) for c in (channels, 17))
        torch.library.opcheck(winograd.conv3x3_weight_gradient, (x, gradient))
    with pytest.raises(ValueError, match="gradient is"):
        winograd.conv3x3_weight_gradient(torch.zeros(2, 16, 8, 8), torch.zeros(2, 16, 8, 9))


def test_the_default_dtype_and_device_have_no_effect() -> None:
    x, weight = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3)
    expected = winograd.conv3x3(x, weight), *winograd.conv3x3_weight_gradient(x, x)
    try:
        torch.set_default_dtype(torch.float64)
        found = (
            winograd.conv3x3(x, weight, None, False, winograd.transformed_weight(weight)),
            *winograd.conv3x3_weight_gradient(x, x),
        )
        with torch.device("meta"):
            elsewhere = winograd.conv3x3(x, weight), *winograd.conv3x3_weight_gradient(x, x)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b, c in zip(expected, found, elsewhere, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b) and torch.equal(a, c)
