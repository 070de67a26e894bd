"""The C++ kernels against the float64 definition, at most twice as far from it as PyTorch's own path."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from torch import Tensor

from helpers import processes
from helpers.bands import cast, operator
from jfbfast.backends import native, reference
from jfbfast.backends.reference import PADDING_MODES, Bands
from jfbfast.backends.tensors import compute_dtype, padded

pytestmark = pytest.mark.compiled

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1), (1, 37), (7, 13), (33, 65), (40, 3))
RADII = ((0, 0), (1, 2), (2, 2), (3, 1), (5, 4), (6, 31))


def fits(size: tuple[int, int], radii: tuple[int, int], mode: str) -> bool:
    if mode == "reflect":
        return all(r < n for r, n in zip(radii, size, strict=True))
    return mode != "circular" or all(r <= n for r, n in zip(radii, size, strict=True))


def images(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count))


def assert_as_good(got: Tensor, plain: Tensor, exact: Tensor, what: object = "") -> None:
    """``got`` errs at most twice as much as ``plain``, with a floor of a few units in the last place."""
    assert got.dtype == plain.dtype and got.shape == plain.shape and got.is_contiguous()
    if not got.numel():
        return
    error, allowed = ((y.double() - exact).abs().max().item() for y in (got, plain))
    floor = 4 * torch.finfo(compute_dtype(got.dtype)).eps + torch.finfo(got.dtype).eps
    assert error <= 2 * allowed + floor * exact.abs().max().item(), what


def check(dtype: torch.dtype, bands: Bands, adjoint: Bands, x: Tensor, d: Tensor, r: Tensor) -> None:
    """Every kernel of the blur on the given images, with and without d and r."""
    low, low_adjoint = cast(bands, dtype), cast(adjoint, dtype)
    assert_as_good(native.blur(x, low), reference.blur(x, low), reference.blur(x.double(), bands), "blur")
    step_size = torch.tensor(0.7)
    for *given, eta in ((x, d, r, step_size), (x, d, None, step_size), (x, None, r, None)):
        exact = (None if t is None else t.double() for t in given)
        assert_as_good(
            native.gradient(*given, low, low_adjoint, eta),
            reference.gradient(*given, low, low_adjoint, eta),
            reference.gradient(*exact, bands, adjoint, eta),
            "gradient",
        )


def test_the_compiled_module_loaded() -> None:
    assert native.AVAILABLE, native.UNAVAILABLE_BECAUSE
    assert native.describe().startswith("C++ (")


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_definition(dtype: torch.dtype, mode: str) -> None:
    for size, radii in itertools.product(SIZES, RADII):
        if fits(size, radii, mode):
            bands, adjoint = operator(size, radii, mode)
            check(dtype, bands, adjoint, *images(3, (2, *size), dtype))


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("radius", (2, 15))
def test_small_images_agree_with_the_definition(mode: str, radius: int) -> None:
    for size in itertools.product((1, 2, 3, 5, 17), repeat=2):
        if fits(size, (radius, radius), mode):
            check(torch.float32, *operator(size, (radius, radius), mode), *images(3, (2, *size), torch.float32))


def test_a_table_without_constant_rows() -> None:
    size, radii = (20, 50), (2, 3)
    y, x = images(1, (20, 5), torch.float64)[0], images(1, (50, 7), torch.float64)[0]
    inside = Bands(
        *(reference.band_table([1.0] * (2 * r + 1), n, "zeros") for n, r in zip(size, radii, strict=True)),
        False,
    )
    bands = Bands(y * inside.y, x * inside.x, False)
    check(torch.float32, bands, reference.transpose(bands), *images(3, (2, *size), torch.float32))


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2],
    "cut out": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4), value=torch.nan)[..., 1:-4, 3:-2],
    "reversed batch": lambda x: x.flip(0)[[1, 0]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_images_are_not_misread(dtype: torch.dtype, layout: str) -> None:
    bands, adjoint = (cast(b, dtype) for b in operator((9, 21), (2, 1), "reflect"))
    plain = images(3, (2, 3, 9, 21), dtype)
    strided = tuple(LAYOUTS[layout](t) for t in plain)
    step_size = torch.tensor(0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))
    assert torch.equal(native.blur(strided[0], bands), native.blur(plain[0], bands))
    got = native.gradient(*strided, bands, adjoint, step_size)
    assert torch.equal(got, native.gradient(*plain, bands, adjoint, step_size))


@pytest.mark.parametrize("mode", ("valid", "circular"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_smaller_d_has_a_margin_of_zeros(dtype: torch.dtype, mode: str) -> None:
    """The result is that of d with the margin, to the bit; a margin that is off by one is noticed."""
    bands, adjoint = (cast(b, dtype) for b in operator((23, 67), (2, 1), mode))
    x, d, r = images(3, (5, 23, 67), dtype)
    for y, x_ in ((2, 1), (0, 3), (4, 0), (11, 33)):
        small = d[..., : 23 - 2 * y, : 67 - 2 * x_]
        whole = padded(small, (y, x_))
        got = native.gradient(x, small, r, bands, adjoint)
        assert torch.equal(got, native.gradient(x, whole, r, bands, adjoint))
        assert not torch.equal(got, native.gradient(x, whole.roll((0, 1, 1), (0, 1, 2)), r, bands, adjoint))
        assert_as_good(got, reference.gradient(x, small, r, bands, adjoint), got.double(), "gradient")


def test_expanded_images_are_not_misread() -> None:
    bands, adjoint = (cast(b, torch.float32) for b in operator((9, 21), (2, 1), "zeros"))
    x, d, r = (t.expand(4, 3, 9, 21) for t in images(3, (1, 1, 9, 21), torch.float32))
    got = native.gradient(x, d, r, bands, adjoint)
    assert torch.equal(got, native.gradient(x.contiguous(), d.contiguous(), r.contiguous(), bands, adjoint))


@pytest.mark.parametrize("shape", ((0, 3, 8, 8), (2, 0, 8, 8), (0, 5), (5, 0), (2, 3, 0, 0)))
def test_empty_images_give_empty_results(shape: tuple[int, ...]) -> None:
    bands, adjoint = (cast(b, torch.float32) for b in operator(shape[-2:], (1, 1), "zeros"))
    x = torch.zeros(shape)
    assert native.blur(x, bands).shape == shape
    assert native.gradient(x, x, None, bands, adjoint).shape == shape


@pytest.mark.parametrize("shape", ((7, 13), (5, 7, 13), (2, 3, 7, 13), (2, 2, 3, 7, 13)))
def test_images_may_have_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    bands, adjoint = operator((7, 13), (2, 2), "replicate")
    check(torch.float32, bands, adjoint, *images(3, shape, torch.float32))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_halves_are_converted_as_torch_does(dtype: torch.dtype) -> None:
    identity = Bands(torch.ones(1, 1), torch.ones(65536, 1), False)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    back = native.blur(every, identity)
    assert torch.equal(back.isnan(), every.isnan())
    assert torch.equal(back.nan_to_num(nan=0.0, posinf=None), every.nan_to_num(nan=0.0, posinf=None))
    # A blur by one factor, whose exact value lies between two halves, rounds as torch's conversion does.
    factor = 1.0 + 3 * 2.0**-10
    scaled = native.blur(every, Bands(torch.full((1, 1), factor), identity.x, False))
    expected = (every.float() * factor).to(dtype)
    finite = ~expected.isnan()
    assert torch.equal(scaled[finite], expected[finite]) and scaled[~finite].isnan().all()


def test_nan_stays_in_its_plane_and_within_reach() -> None:
    bands, adjoint = (cast(b, torch.float32) for b in operator((40, 50), (2, 3), "zeros"))
    x, d, r = images(3, (3, 40, 50), torch.float32)
    spoilt = x.clone()
    spoilt[1, 20, 25] = torch.nan
    clean, got = native.blur(x, bands), native.blur(spoilt, bands)
    reached = torch.zeros(3, 40, 50, dtype=torch.bool)
    reached[1, 18:23, 22:29] = True
    assert torch.equal(got.isnan(), reached) and torch.equal(got[~reached], clean[~reached])
    got = native.gradient(spoilt, d, r, bands, adjoint)
    reached[1, 16:25, 19:32] = True
    assert torch.equal(got.isnan(), reached)
    assert torch.equal(got[~reached], native.gradient(x, d, r, bands, adjoint)[~reached])


def all_kernels(threads: int) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            bands, adjoint = (cast(b, dtype) for b in operator((150, 133), (2, 2), "reflect"))
            x, d, r = images(3, (2, 150, 133), dtype)
            results += [native.blur(x, bands), native.gradient(x, d, r, bands, adjoint)]
        x, f = images(2, (3, 30_001), torch.float32)
        residuals, gram = torch.ones(4, 3, 30_001), torch.zeros(3, 4, 4, dtype=torch.float64)
        results += [native.anderson_append(x, f, residuals, gram, 1, 3), gram, residuals]
        return [*results, native.anderson_mix(gram[:, 1, :2], [x, f])]
    finally:
        torch.set_num_threads(before)


def test_results_do_not_depend_on_the_thread_count() -> None:
    one = all_kernels(1)
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(one, all_kernels(threads), strict=True))


def test_results_do_not_depend_on_the_rest_of_the_batch() -> None:
    bands, adjoint = (cast(b, torch.float32) for b in operator((50, 70), (2, 2), "zeros"))
    x, d, r = images(3, (5, 2, 50, 70), torch.float32)
    out, alone = (native.gradient(*rows, bands, adjoint) for rows in ((x, d, r), (x[3:4], d[3:4], r[3:4])))
    assert torch.equal(out[3:4], alone)
    x, f = images(2, (4, 5003), torch.float32)
    history = images(1, (3, 4, 5003), torch.float32)[0]
    whole, single = torch.zeros(4, 3, 3, dtype=torch.float64), torch.zeros(1, 3, 3, dtype=torch.float64)
    squares = native.anderson_append(x, f, history.clone(), whole, 0, 3)
    square = native.anderson_append(x[2:3], f[2:3], history[:, 2:3].clone(), single, 0, 3)
    assert torch.equal(whole[2:3], single) and torch.equal(squares[2:3], square)


FORKED = """
import os, torch
from jfbfast.backends import native, reference
bands = reference.Bands(torch.ones(256, 1), torch.ones(256, 1), False)
x = torch.ones(8, 256, 256)
native.blur(x, bands)
child = os.fork()
if child == 0:
    os._exit(0 if native.blur(x, bands)[7, 255, 255] == 1 else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""


def test_works_in_a_forked_child() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


@pytest.mark.parametrize("isa", ["baseline", pytest.param("avx2", marks=pytest.mark.slow)])
def test_every_instruction_set_agrees_with_the_definition(isa: str) -> None:
    """The narrower kernels too, in a process of their own; where this CPU lacks them, those that it has."""
    names = "zeros or circular or halves or norms or nan or anderson"
    processes.run_tests_with_isa(isa, __file__, names)


WITHOUT_TORCH = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("_native", sys.argv[1])
module = module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa)
"""


def test_the_name_of_an_instruction_set_is_known_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JFBFAST_ISA", "")
    command = [sys.executable, "-c", WITHOUT_TORCH, native._native.__file__]
    in_use = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert in_use == {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    monkeypatch.setenv("JFBFAST_ISA", "avx")
    spec = spec_from_file_location("jfbfast.backends.anew", native.__file__)
    assert spec and spec.loader
    with pytest.raises(ValueError, match="JFBFAST_ISA is 'avx'; it takes one of 'avx512', 'avx2'"):
        spec.loader.exec_module(module_from_spec(spec))


@pytest.mark.parametrize("size", (1, 7, 2048, 10_001))
@pytest.mark.parametrize(
    "dtype, history",
    [(t, t) for t in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16)],
)
def test_anderson_append(dtype: torch.dtype, history: torch.dtype, size: int) -> None:
    x, f = images(2, (3, size), dtype)
    for memory, slot, filled in ((1, 0, 1), (5, 2, 5), (5, 0, 2), (12, 11, 12)):
        before = images(1, (memory, 3, size), history)[0]
        gram = [torch.full((3, memory, memory), 7.0, dtype=torch.float64) for _ in range(2)]
        residuals = [before.clone() for _ in range(2)]
        expected = reference.anderson_append(x, f, residuals[0], gram[0], slot, filled)
        got = native.anderson_append(x, f, residuals[1], gram[1], slot, filled)
        if dtype in (history, torch.float32):
            assert torch.equal(residuals[0], residuals[1])
        torch.testing.assert_close(residuals[0], residuals[1], rtol=torch.finfo(history).eps, atol=0)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        scale = gram[0].diagonal(dim1=1, dim2=2).abs().max().item()
        torch.testing.assert_close(gram[1], gram[0], rtol=1e-2 if dtype != history else 1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("memory", (1, 2, 5, 16))
def test_anderson_weights(memory: int) -> None:
    history = images(1, (20, memory, 30), torch.float64)[0]
    history[1] *= 1e-9
    history[2, -1] = history[2, 0]
    gram = history @ history.mT
    gram[3, :, 0] = gram[3, 0, :] = 0
    valid = torch.rand(20, memory, generator=torch.Generator().manual_seed(0)) < 0.7
    valid[:, 0] = True
    valid[3, -1] = True
    for chosen in (valid, torch.ones_like(valid)):
        got, expected = (m.anderson_weights(gram, chosen, 1e-8) for m in (native, reference))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8, equal_nan=True)
        assert not got[~chosen].any()
    gram[0, 0, 0] = torch.nan
    got = native.anderson_weights(gram, valid, 1e-8)
    assert got[0].isnan().any() and torch.equal(got[1:].isnan(), expected[1:].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_anderson_mix(dtype: torch.dtype) -> None:
    for count, size in ((1, 1), (2, 7), (5, 4097), (16, 100)):
        history = images(count, (3, size), dtype)
        alpha = images(1, (3, count), torch.float64)[0]
        exact = reference.anderson_mix(alpha, [f.double() for f in history])
        plain = reference.anderson_mix(alpha, history)
        assert_as_good(native.anderson_mix(alpha, history), plain, exact)
        out = torch.full((3, size), torch.nan, dtype=dtype)
        assert native.anderson_mix(alpha, [f.T.contiguous().T for f in history], out=out) is out
        assert_as_good(out, plain, exact)


def test_a_slot_beyond_the_history_is_refused() -> None:
    history, gram = torch.zeros(2, 1, 4), torch.zeros(1, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(slot, filled\) is \(2, 2\)"):
        native.anderson_append(torch.zeros(1, 4), torch.zeros(1, 4), history, gram, 2, 2)


@pytest.mark.parametrize(
    "kernel, name, wrong",
    (
        ("anderson_append", "f", lambda f: f.half()),
        ("anderson_append", "f", lambda f: f[:, :3]),
        ("anderson_append", "residuals", lambda r: r.half()),
        ("anderson_append", "residuals", lambda r: r[..., ::2].repeat(1, 1, 2)[:, :1]),
        ("anderson_append", "residuals", lambda r: r.mT.contiguous().mT),
        ("anderson_append", "gram", lambda g: g.float()),
        ("anderson_weights", "gram", lambda g: g.float()),
        ("anderson_weights", "valid", lambda v: v.double()),
        ("anderson_mix", "alpha", lambda a: a[:1]),
        ("anderson_mix", "images", lambda i: [i[0], i[1].double()]),
        ("anderson_mix", "out", lambda o: o.half()),
        ("anderson_mix", "out", lambda o: o.mT.contiguous().mT),
        ("winograd_weights", "weight", lambda w: w.double()),
        ("conv3x3", "transformed", lambda t: t.bfloat16()),
        ("conv3x3", "transformed", lambda t: t.to("meta")),
        ("conv3x3", "transformed", lambda t: t[1:]),
    ),
)
def test_arguments_that_are_passed_by_address_are_checked(
    kernel: str, name: str, wrong: Callable[[object], object]
) -> None:
    f, history = torch.zeros(2, 4), torch.zeros(2, 2, 4)
    gram, alpha, valid = torch.zeros(2, 2, 2, dtype=torch.float64), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    x, weight, bias = torch.zeros(1, 16, 4, 4), torch.zeros(16, 16, 3, 3), torch.zeros(16)
    given = {
        "anderson_append": {"x": f, "f": f, "residuals": history, "gram": gram, "slot": 0, "filled": 1},
        "anderson_weights": {"gram": gram, "valid": valid, "regularization": 0.0},
        "anderson_mix": {"alpha": alpha, "images": [f, f], "out": f.clone()},
        "winograd_weights": {"weight": weight},
        "conv3x3": {"x": x, "weight": weight, "bias": bias, "transformed": native.winograd_weights(weight)},
    }[kernel]  # fmt: skip
    getattr(native, kernel)(**given)
    with pytest.raises(ValueError, match=f"^{name} (is|has) "):
        getattr(native, kernel)(**given | {name: wrong(given[name])})
