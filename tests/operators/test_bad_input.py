"""Arguments that operators refuse, each by its name."""

import pytest
import torch

import jfbfast


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jfbfast.GaussianBlur(4), "kernel_size is 4"),
        (lambda: jfbfast.GaussianBlur(5, -1.0), "sigma is -1.0"),
        (lambda: jfbfast.GaussianBlur(5, (1.0, float("nan"))), "sigma is"),
        (lambda: jfbfast.GaussianBlur((3, 5, 7)), "kernel_size is"),
        (lambda: jfbfast.GaussianBlur((3, None)), "kernel_size is"),
        (lambda: jfbfast.GaussianBlur(5.0), "kernel_size is 5.0"),
        (lambda: jfbfast.GaussianBlur().solve(torch.zeros(1, 1, 8, 8), torch.ones(8, 8)), "damping has shape"),
        (lambda: jfbfast.GaussianBlur(padding_mode="same"), "padding_mode is 'same'"),
        (lambda: jfbfast.SeparableBlur([1.0, 2.0], [1.0]), "taps_y is"),
        (lambda: jfbfast.SeparableBlur([1.0], [float("inf")]), "taps_x is"),
        (lambda: jfbfast.SeparableBlur([1.0], torch.ones(3, requires_grad=True)), "taps_x requires a gradient"),
        (lambda: jfbfast.GaussianBlur(5, torch.tensor(1.0, requires_grad=True)), "sigma requires a gradient"),
        (lambda: jfbfast.GaussianBlur()(torch.zeros(4, dtype=torch.int64)), "x is torch.int64"),
        (lambda: jfbfast.GaussianBlur()(torch.zeros(5)), "x is torch.float32 of shape"),
        (lambda: jfbfast.GaussianBlur().gradient(torch.zeros(8, 8), torch.zeros(8, 9)), "d is"),
        (
            lambda: jfbfast.GaussianBlur().gradient(torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.float64)),
            "d is torch.float64",
        ),
        (
            lambda: jfbfast.GaussianBlur().gradient_step(*torch.zeros(3, 8, 8), torch.zeros(2)),
            "step_size has shape",
        ),
        (lambda: jfbfast.GaussianBlur(padding_mode="reflect")(torch.zeros(2, 9)), "side of 2 pixels"),
        (lambda: jfbfast.GaussianBlur(padding_mode="circular")(torch.zeros(9, 1)), "side of 1 pixels"),
        (lambda: jfbfast.GaussianBlur(5, 1.0, "valid")(torch.zeros(4, 9)), "side of 4 pixels; 5 taps .* at least 5"),
        (lambda: jfbfast.GaussianBlur(5, 1.0, "valid").adjoint(torch.zeros(9, 0)), "side of 4 pixels"),
        (lambda: jfbfast.GaussianBlur(5, 1.0, "valid").solve(torch.zeros(9, 4), 0.1), "side of 4 pixels"),
        (lambda: jfbfast.GaussianBlur(5, 1.0, "valid").gradient(*torch.zeros(2, 4, 9)), "side of 4 pixels"),
        (
            lambda: jfbfast.GaussianBlur(5, 1.0, "valid").gradient(*torch.zeros(2, 8, 9)),
            r"d is .* of shape \(8, 9\) .* x \(8, 9\) by padding_mode='valid': torch.float32 of shape \(4, 5\)",
        ),
        (lambda: jfbfast.GaussianBlur(5, 1.0, "valid").solve(torch.zeros(9, 9), 0), "numerically singular"),
        (
            lambda: jfbfast.direct_inverse(jfbfast.GaussianBlur(5, 1.0, "valid"), torch.zeros(9, 9)),
            "padding_mode is 'valid'; direct_inverse takes another one",
        ),
        (lambda: jfbfast.GaussianBlur().solve(torch.zeros(8, 8), -0.1), "damping is -0.1"),
        (
            lambda: jfbfast.GaussianBlur(9, 30.0, "circular").solve(torch.zeros(9, 9), 0),
            "numerically singular",
        ),
        (
            lambda: jfbfast.direct_inverse(jfbfast.GaussianBlur(9, 30.0, "circular"), torch.zeros(9, 9)),
            "numerically singular",
        ),
        (
            lambda: jfbfast.GaussianBlur().solve(torch.zeros(1, 1025), 0),
            r"damping is 0; images of \(1, 1025\) pixels take a positive number",
        ),
        (lambda: jfbfast.backend("cuda").__enter__(), "name is 'cuda'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
