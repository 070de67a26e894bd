"""The Triton kernels in the interpreter; run by test_triton_interpreted.py with TRITON_INTERPRET=1.

A process of its own, since a kernel decorated under the interpreter cannot be compiled.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from helpers.bands import cast, error, operator
from jfbfast import kernels
from jfbfast.backends import reference
from jfbfast.backends.reference import Bands
from jfbfast.backends.tensors import padded
from jfbfast.kernels import launch, rows, stream

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_triton_interpreted.py"

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_index_too(tensor: type, scope: Any) -> None:
    """Triton 3.6's interpreter makes an index of an array with one element by int(), which NumPy 2.4 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_index_too

MODES = reference.PADDING_MODES
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MARGIN = 300  # more than a tile's width, so that a stray access of a whole row lands in it
SENTINEL = -77.0


def guarded(values: Tensor, fill: float) -> Tensor:
    """A contiguous copy of ``values`` inside a larger buffer of ``fill``."""
    buffer = torch.full((values.numel() + 2 * MARGIN,), fill, dtype=values.dtype)
    inner = buffer[MARGIN : MARGIN + values.numel()].view(values.shape)
    inner.copy_(values)
    return inner


def margins_intact(inner: Tensor) -> bool:
    whole = inner.as_strided((inner.numel() + 2 * MARGIN,), (1,), inner.storage_offset() - MARGIN)
    return bool((whole[:MARGIN] == SENTINEL).all() and (whole[-MARGIN:] == SENTINEL).all())


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor the launcher allocates, each NaN inside margins of SENTINEL."""
    tensors: list[Tensor] = []

    def empty(shape: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        values = torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)
        tensors.append(guarded(values, SENTINEL))
        return tensors[-1]

    monkeypatch.setattr(launch.torch, "empty", empty)
    return tensors


def check(shape: tuple[int, ...], ry: int, rx: int, mode: str, dtype: torch.dtype, allocated: list[Tensor]) -> None:
    """blur and gradient against float64, with NaN around the inputs and guards around outputs.

    In the mode "valid", ``shape`` is that of A x, since smaller images have no A x.
    """
    if mode == "valid":
        shape = (*shape[:-2], shape[-2] + 2 * ry, shape[-1] + 2 * rx)
    exact_bands = operator(shape[-2:], (ry, rx), mode)
    bands, adjoint = (cast(b, dtype) for b in exact_bands)
    torch.manual_seed(0)
    x, d, r = (guarded(torch.randn(shape).to(dtype), float("nan")) for _ in range(3))
    bands, adjoint = (
        Bands(guarded(b.y, float("nan")), guarded(b.x, float("nan")), b.circular) for b in (bands, adjoint)
    )
    eta = torch.tensor(0.7)
    ulp = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)  # float64 is its own yardstick

    exact = reference.blur(x.double(), exact_bands[0])
    plain = error(reference.blur(x, bands), exact)
    assert error(kernels.blur(x, bands), exact) <= 2 * plain + ulp

    exact = reference.gradient(x.double(), d.double(), r.double(), *exact_bands, eta.double())
    plain = error(reference.gradient(x, d, r, bands, adjoint, eta), exact)
    assert error(kernels.gradient(x, d, r, bands, adjoint, eta), exact) <= 2 * plain + ulp
    assert allocated and all(margins_intact(t) for t in allocated)


CASES = (
    *(((2, 7, 13), 2, 1), ((1, 1, 5, 68), 1, 3), ((1, 5, 3), 0, 2), ((1, 8, 8), 7, 5), ((4, 1), 0, 0)),
    *(((1, 10, 9), 9, 1), ((1, 2, 9), 1, 8)),  # the wide kernel
)
TABLES = [mode for mode in MODES if mode != "circular"]  # the kernels are the same for these, with other tables


@pytest.mark.parametrize(
    ("shape", "ry", "rx", "mode"),
    [
        pytest.param(*case, mode, marks=[pytest.mark.slow] * (mode not in ("circular", TABLES[i % len(TABLES)])))
        for i, case in enumerate(CASES)
        for mode in MODES
    ],
)
def test_against_float64(shape, ry, rx, mode, allocated):
    check(shape, ry, rx, mode, torch.float32, allocated)


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float32])
@pytest.mark.parametrize(
    ("shape", "ry", "rx", "mode"),
    [((2, 9, 12), 2, 3, "circular"), ((1, 5, 66), 2, 3, "zeros"), ((1, 3, 7), 12, 31, "zeros")],
)
def test_dtypes(shape, ry, rx, mode, dtype, allocated):
    check(shape, ry, rx, mode, dtype, allocated)


def test_radii_of_the_whole_image_and_beyond(allocated):
    check((1, 2, 3), 5, 7, "zeros", torch.float32, allocated)
    check((1, 2, 3), 5, 7, "replicate", torch.float32, allocated)
    check((1, 5, 4), 5, 4, "circular", torch.float32, allocated)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "dtype"), list(zip(MODES, (*DTYPES, torch.float32), strict=True)))
@pytest.mark.parametrize(
    ("shape", "ry", "rx"),
    [((2, 3, 33, 65), 2, 2), ((1, 70, 131), 3, 4), ((1, 40, 132), 7, 6), ((3, 34, 129), 1, 0), ((1, 35, 133), 31, 17)],
)
def test_larger_grid(shape, ry, rx, mode, dtype, allocated):
    check(shape, ry, rx, mode, dtype, allocated)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reflect", "circular", "valid"])
def test_every_tile(mode, allocated, monkeypatch):
    """Each size class, forced on one image."""
    for table in (launch.GRADIENT_TILES, launch.BLUR_TILES):
        for radius, tiles in list(table.items()):
            for tile in tiles:
                monkeypatch.setitem(table, radius, (tile,))
                margin = radius if mode == "valid" else 0  # wide tiles take widths that are multiples of 4
                check((1, 67, 140 - 2 * margin), radius, radius, mode, torch.float32, allocated)


@pytest.mark.parametrize("radius", [1, 8])
def test_missing_terms_and_plain_gradient(radius):
    bands, adjoint = operator((3, 4), (radius, 1), "zeros")
    x, d, r = torch.randn(3, 1, 3, 4, dtype=torch.float64).unbind()
    for data in (d, None):
        for added in (r, None):
            exact = reference.gradient(x, data, added, bands, adjoint)
            torch.testing.assert_close(kernels.gradient(x, data, added, bands, adjoint), exact)
    eta = torch.tensor(0.3, dtype=torch.bfloat16)
    exact = reference.gradient(x, None, None, bands, adjoint, eta)
    torch.testing.assert_close(kernels.gradient(x, None, None, bands, adjoint, eta), exact)


def test_strided_inputs():
    bands, adjoint = operator((6, 7), (2, 1), "replicate")
    base = torch.randn(2, 6, 7, 3, dtype=torch.float64)
    x = base.permute(0, 3, 1, 2)
    d = torch.randn(1, 1, 6, 7, dtype=torch.float64).expand(2, 3, 6, 7)
    r = torch.randn(2, 3, 7, 12, dtype=torch.float64)[..., ::2].transpose(-1, -2)
    eta = torch.tensor(0.3)
    out = kernels.gradient(x, d, r, bands, adjoint, eta)
    assert out.is_contiguous()
    torch.testing.assert_close(out, reference.gradient(x, d, r, bands, adjoint, eta))
    torch.testing.assert_close(kernels.blur(x, bands), reference.blur(x, bands))


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5)])
def test_empty_batch(shape):
    bands, adjoint = operator((5, 5), (1, 1), "zeros")
    x = torch.empty(shape, dtype=torch.float64)
    assert kernels.blur(x, bands).shape == shape
    assert kernels.gradient(x, x, None, bands, adjoint).shape == shape
    images = x.contiguous(memory_format=torch.channels_last)
    assert kernels.add_relu(images, torch.zeros(shape[1]).double(), images, True) is images


def test_the_tile_is_the_first_that_gives_enough_programs_or_the_last():
    bands = cast(operator((512, 512), (2, 2), "circular")[0], torch.float32)
    plans = [launch.plan(torch.Size((n, 512, 512)), bands, adjoint=True) for n in (1, 40, 60)]
    assert [(plan.constants["TX"], plan.strip + 8) for plan in plans] == [(64, 32), (128, 64), (128, 128)]
    assert [plan.programs >= launch.ENOUGH_PROGRAMS for plan in plans] == [False, True, True]


@pytest.mark.parametrize("radius", [2, 8])
def test_a_smaller_d_has_a_margin_of_zeros(radius):
    bands, adjoint = operator((17, 9), (radius, 1), "valid")
    x, d, r = torch.randn(3, 1, 17, 9, dtype=torch.float64).unbind()
    small = d[:, radius:-radius, 1:-1]
    whole = padded(small, (radius, 1))
    got = kernels.gradient(x, small, r, bands, adjoint)
    assert torch.equal(got, kernels.gradient(x, whole, r, bands, adjoint))
    torch.testing.assert_close(got, reference.gradient(x, d, r, bands, adjoint))  # the margin of d has no weight


@pytest.mark.parametrize(("ry", "rx"), [(2, 1), (3, 8)])
@pytest.mark.parametrize("mode", [pytest.param(m, marks=[pytest.mark.slow] * (m in TABLES[1:])) for m in MODES])
def test_adjointness(mode, ry, rx):
    """⟨Ax, y⟩ = ⟨x, Aᵀy⟩ in float64."""
    bands, adjoint = operator((9, 17), (ry, rx), mode)
    x, y = torch.randn(2, 1, 9, 17, dtype=torch.float64).unbind()
    left, right = (kernels.blur(x, bands) * y).sum(), (x * kernels.blur(y, adjoint)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_nan_stays_in_its_plane():
    bands, adjoint = operator((6, 9), (2, 2), "zeros")
    x = torch.randn(3, 6, 9, dtype=torch.float64)
    x[1] = float("nan")
    out = kernels.gradient(x, x, x, bands, adjoint, torch.tensor(0.5))
    assert out[[0, 2]].isfinite().all() and out[1].isnan().all()


def test_radius_beyond_the_largest_raises():
    bands, _ = operator((4, 4), (kernels.MAX_RADIUS + 1, 1), "zeros")
    with pytest.raises(ValueError, match="radius 32; it takes at most 31"):
        kernels.blur(torch.randn(1, 4, 4, dtype=torch.float64), bands)


def issued_loads(monkeypatch: pytest.MonkeyPatch, columns: int, strips: int) -> float:
    """Image elements that a gradient step asks for, over the least: x, d and r once each. Circular: all is interior."""
    bands, adjoint = operator((24 * strips, columns), (2, 2), "circular")
    count = 0

    def counting(image, plane, y, at, mask, height, width, ACC, CIRCULAR):
        nonlocal count
        count += int(mask.handle.data.sum())
        return rows.load_row(image, plane, y, at, mask, height, width, ACC, CIRCULAR)

    monkeypatch.setattr(stream, "load_row", counting)
    x = torch.randn(1, 24 * strips, columns, dtype=torch.float64).float()
    bands, adjoint = cast(bands, torch.float32), cast(adjoint, torch.float32)
    out = kernels.gradient(x, x, x, bands, adjoint, torch.tensor(0.5))
    torch.testing.assert_close(out, reference.gradient(x, x, x, bands, adjoint, torch.tensor(0.5)))
    return count / (3 * x.numel())


def test_issued_loads(monkeypatch):
    """The smallest tile, so the one with the most halo."""
    assert issued_loads(monkeypatch, columns=2 * 56, strips=1) <= 1.35


# Each check above, shown a kernel that it must catch.


def test_counting_catches_a_small_tile(monkeypatch):
    monkeypatch.setitem(launch.GRADIENT_TILES, 2, (launch.Tile(32, 32, 4),))
    assert issued_loads(monkeypatch, columns=2 * 24, strips=1) > 1.35


@triton.jit
def store_one_column_more(image, plane, y, columns, row, mask, height, width):
    start = rows.row_start(image, plane, y, height, width)
    tl.store(start + columns, row.to(image.dtype.element_ty), mask=mask)
    tl.store(start + columns + 1, row.to(image.dtype.element_ty), mask=mask & (columns == width - 1))


def test_guards_catch_a_store_past_the_end(monkeypatch, allocated):
    monkeypatch.setattr(stream, "store_row", store_one_column_more)
    bands, _ = operator((5, 6), (1, 1), "zeros")
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(kernels.blur(x, bands), reference.blur(x, bands))  # the values alone do not show it
    assert not all(margins_intact(t) for t in allocated)


@triton.jit
def load_below_the_image(image, plane, y, columns, mask, height, width, ACC: tl.constexpr, CIRCULAR: tl.constexpr):
    start = rows.row_start(image, plane, y, height, width)
    return tl.load(start + columns, mask=mask & (y >= 0) & (y <= height), other=0.0).to(ACC)


def test_margins_catch_a_read_past_the_end(monkeypatch):
    monkeypatch.setattr(stream, "load_row", load_below_the_image)
    bands, _ = operator((5, 6), (1, 1), "zeros")
    assert not kernels.blur(guarded(torch.randn(1, 5, 6, dtype=torch.float64), float("nan")), bands).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_comparison_catches_an_adjoint_not_transposed(mode):
    bands, adjoint = operator((9, 8), (2, 1), mode)
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    exact = reference.gradient(x, None, None, bands, adjoint)
    assert error(kernels.gradient(x, None, None, bands, bands), exact) > 1e-2


def added(dtype: torch.dtype, shape: tuple[int, ...], bias: bool, addend: bool, relu: bool) -> tuple[Tensor, Tensor]:
    """What the kernel makes of a channels-last image in guarded memory, and the expectation in float64."""
    batch, channels, height, width = shape
    torch.manual_seed(0)
    values, other = torch.randn(2, batch, height, width, channels).to(dtype)
    weights = guarded(torch.randn(channels).to(dtype), float("nan")) if bias else None
    out = guarded(values, SENTINEL)
    added = guarded(other, float("nan")).permute(0, 3, 1, 2) if addend else None
    expected = reference.add_relu(
        values.double().permute(0, 3, 1, 2).clone(),
        None if weights is None else weights.double(),
        None if added is None else added.double(),
        relu,
    )
    found = kernels.add_relu(out.permute(0, 3, 1, 2), weights, added, relu)
    assert found.data_ptr() == out.data_ptr() and margins_intact(out)
    return found, expected


@pytest.mark.parametrize(
    ("dtype", "shape", "bias", "addend", "relu"),
    [
        *((dtype, (2, 5, 3, 7), True, True, False) for dtype in DTYPES),
        (torch.float32, (1, 64, 6, 5), True, False, True),  # two programs
        (torch.float32, (1, 1, 1, 2), False, True, True),
    ],
)
def test_bias_addend_and_relu(dtype, shape, bias, addend, relu):
    found, expected = added(dtype, shape, bias, addend, relu)
    assert error(found, expected) <= torch.finfo(dtype).eps


def test_a_nan_passes_the_relu_and_other_layouts_are_served():
    out = torch.tensor([[[[torch.nan, -1.0]]]])
    assert kernels.add_relu(out, None, None, True).isnan().tolist() == [[[[True, False]]]]
    out = torch.randn(2, 3, 4, 5)
    expected = reference.add_relu(out.clone(), torch.arange(3.0), None, True)
    assert kernels.add_relu(out, torch.arange(3.0), None, True).equal(expected)


def test_the_guards_catch_a_mask_that_is_too_wide():
    out = guarded(torch.randn(1, 5, 5, 3), SENTINEL)
    constants = {"CHANNELS": 3, "RELU": True, "ACC": tl.float32, "BLOCK": 1024, "VECTOR": 1}
    launch.add_relu_kernel[(1,)](out, None, None, out.numel() + 1, **constants)
    assert not margins_intact(out)
