"""`check_adjoint`: whether the adjoint of a linear operator is its adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.tensors import flat, per_sample
from jfbfast.operators.iterative import linear_operator

Map = Callable[[Tensor], Tensor]


@torch.no_grad()
def check_adjoint(
    operator: Any,
    like: Tensor | Sequence[int],
    *,
    adjoint: Map | None = None,
    tol: float | None = None,
    trials: int = 3,
    seed: int = 0,
) -> float:
    """Check that A is linear, treats every sample by itself, and that its adjoint Aᵀ satisfies ⟨Ax, y⟩ = ⟨x, Aᵀy⟩.

    It takes random x and y; for complex numbers the adjoint is the conjugate transpose. An adjoint that is wrong gives
    a gradient step that does not descend, and a solve that ends at another image or diverges.

    Args:
        operator: A, called as ``operator(x)``, with an ``adjoint``; or a linear physics of deepinv, whose ``A`` and
            ``A_adjoint`` are checked, without its noise.
        like: an example of x, (B, …), whose dtype and device are taken (with B ≥ 2 the samples are checked to be
            separate); or its shape, for float32 on the CPU.
        adjoint: Aᵀ, for an operator that is just a function.
        tol: the relative error allowed of each comparison; None for the square root of the dtype's rounding (3e-4 in
            float32).
        trials: the number of random pairs, at least 1.
        seed: of the random numbers.

    Returns:
        The largest relative error found, at most ``tol``. That of ⟨Ax, y⟩ is relative to ‖Ax‖ ‖y‖ / √m, the size that
        this product has for random vectors with m numbers.

    Raises:
        TypeError: ``operator`` is no operator; A or Aᵀ does not return a tensor.
        ValueError: A or Aᵀ changes from call to call, is not finite, not linear, or mixes the samples of a batch; Aᵀy
            does not have the shape of x; Aᵀ is not the adjoint of A. The message says how it differs, for example by
            a factor.

    Example:
        >>> import torch, jfbfast
        >>> blur = jfbfast.GaussianBlur(padding_mode="reflect")
        >>> jfbfast.check_adjoint(blur, (2, 3, 9, 8)) < 1e-5
        True
        >>> try:
        ...     jfbfast.check_adjoint(blur, (2, 3, 9, 8), adjoint=lambda y: 2 * blur.adjoint(y))
        ... except ValueError as error:
        ...     print(error)
        adjoint is 2 times the adjoint of A; it takes one with ⟨Ax, y⟩ = ⟨x, Aᵀy⟩
    """
    checks.integer("trials", trials, 1)
    like = like if isinstance(like, Tensor) else torch.empty(*like)
    if like.dim() < 1 or not like.numel() or not (like.is_floating_point() or like.is_complex()):
        raise ValueError(
            f"like is {like.dtype} of shape {tuple(like.shape)}; it takes a real or complex x, (B, …), not empty"
        )
    tol = torch.finfo(like.dtype).eps ** 0.5 if tol is None else tol
    checks.positive("tol", tol)
    if adjoint is None:
        operator = linear_operator("operator", operator)
        adjoint = operator.adjoint
    elif hasattr(operator, "A_adjoint"):
        operator = operator.A
    generator = torch.Generator().manual_seed(seed)

    def random(example: Tensor) -> Tensor:
        return torch.randn(example.shape, dtype=example.dtype, generator=generator).to(example.device)

    maps: dict[str, tuple[Map, Tensor]] = {}
    image = _image("A", operator, random(like))
    maps["A"] = operator, like
    back = _image("adjoint", adjoint, random(image))
    if back.shape != like.shape:
        raise ValueError(
            f"adjoint maps {tuple(image.shape)} to {tuple(back.shape)}; it takes {tuple(like.shape)}, as x"
        )
    if back.is_complex() != like.is_complex():
        raise ValueError(f"adjoint returns {back.dtype}; it takes one that returns the dtype of x, {like.dtype}")
    mixed = image.is_complex() != like.is_complex()  # A is linear in real numbers only: the products' real parts count
    maps["adjoint"] = adjoint, image
    worst = 0.0
    for name, (function, example) in maps.items():
        worst = max(worst, _check_linear(name, function, random(example), random(example), tol, mixed))
    for name, (function, example) in maps.items():
        if len(example) > 1:
            worst = max(worst, _check_samples(name, function, random(example), random(example), tol))
    pairs = [(random(like), random(image)) for _ in range(trials)]
    return max(worst, _check_products(operator, adjoint, pairs, tol, mixed))


def _image(name: str, function: Map, x: Tensor) -> Tensor:
    image = function(x.clone())
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} returns a {type(image).__name__}; it takes an operator that returns a tensor")
    if image.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"{name} maps {tuple(x.shape)} to {tuple(image.shape)}; it takes an operator that keeps the batch size"
        )
    if not image.isfinite().all():
        raise ValueError(f"{name} gives values that are not finite; it takes a linear operator")
    return image


def _apart(a: Tensor, b: Tensor, size: float) -> float:
    """‖a − b‖ / size, where size is positive; 0 for two zeros."""
    distance = float(torch.linalg.vector_norm(a - b))
    return distance / size if size > 0 else float(distance > 0)


def _size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _check_linear(name: str, function: Map, x: Tensor, y: Tensor, tol: float, mixed: bool) -> float:
    image = _image(name, function, x)
    size = _size(image)
    again = _apart(_image(name, function, x), image, size)
    if again > tol:
        raise ValueError(
            f"{name} gives another result at a second call with the same argument, by {again:.1e}; "
            "it takes an operator without noise"
        )
    offset = _size(_image(name, function, torch.zeros_like(x)))
    if offset > tol * size:
        raise ValueError(f"{name} maps 0 to values of norm {offset:.3g}; it takes a linear operator, without an offset")
    scale = 0.6 - 0.8j if x.is_complex() and not mixed else -0.7
    other = _image(name, function, y)
    combined = _image(name, function, scale * x + y)
    error = _apart(combined, scale * image + other, size + _size(other))
    if error > tol:
        if (
            isinstance(scale, complex)
            and _apart(combined, scale.conjugate() * image + other, size + _size(other)) <= tol
        ):
            raise ValueError(f"{name} conjugates its argument; it takes a map that is linear in complex numbers")
        raise ValueError(
            f"{name} is not linear: f(ax + y) and a·f(x) + f(y) differ by {error:.1e}; it takes a linear one"
        )
    return max(error, again)


def _check_samples(name: str, function: Map, x: Tensor, other: Tensor, tol: float) -> float:
    """Replace the first sample, and see whether the images of the others change."""
    replaced = torch.cat([other[:1], x[1:]])
    image = _image(name, function, x)[1:]
    error = _apart(_image(name, function, replaced)[1:], image, _size(image))
    if error > tol:
        raise ValueError(
            f"{name} mixes the samples of a batch: another first sample changes the others' images by {error:.1e}; "
            "it takes an operator that treats each by itself"
        )
    return error


def _products(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each sample, antilinear in b, (B,) in double precision."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float64)
    return (flat(a).to(wide) * flat(b).to(wide).conj()).sum(1)


def _check_products(operator: Map, adjoint: Map, pairs: list[tuple[Tensor, Tensor]], tol: float, mixed: bool) -> float:
    """Compare ⟨Ax, y⟩ with ⟨x, Aᵀy⟩ for each sample of these pairs, and for y = Ax, where neither is near zero."""
    images = [_image("A", operator, x) for x, _ in pairs]
    compared = [(x, y, image) for (x, y), image in zip(pairs, images, strict=True)]
    compared += [(x, _unit(image), image) for (x, _), image in zip(pairs, images, strict=True)]
    rows = []
    for x, y, image in compared:
        right = _products(x, _image("adjoint", adjoint, y))
        transposed = right
        if y.is_complex():
            transposed = _products(x, _image("adjoint", adjoint, y.conj().resolve_conj()).conj())
        norms = _products(image, image).abs().sqrt() * _products(y, y).abs().sqrt()
        rows.append((_products(image, y), right, transposed, norms / flat(y).shape[1] ** 0.5))
    left, right, transposed, scale = (torch.cat(values) for values in zip(*rows, strict=True))
    if mixed:
        left, right, transposed = left.real, right.real, transposed.real
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    error = float(((left - right).abs() / scale).max())
    if error <= tol:
        return error
    takes = "it takes one with ⟨Ax, y⟩ = ⟨x, Aᵀy⟩"
    if float(((left - transposed).abs() / scale).max()) <= tol:
        raise ValueError(f"adjoint is the transpose of A without the complex conjugate; {takes}")
    factor = complex(_products(right[None], left[None]) / _products(left[None], left[None]))
    fitted = (right - (factor if right.is_complex() else factor.real) * left).abs() / scale
    if float(fitted.max()) <= tol * max(1.0, abs(factor)) and abs(factor) > tol:
        factor = factor.conjugate()  # since ⟨x, f Aᵀy⟩ has the conjugate of f
        told = f"{factor.real:.4g}" if abs(factor.imag) <= tol * abs(factor) else f"({factor:.4g})"
        raise ValueError(f"adjoint is {told} times the adjoint of A; {takes}")
    raise ValueError(f"adjoint is not that of A: ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ by {error:.1e} of their size; {takes}")


def _unit(image: Tensor) -> Tensor:
    """Each sample with the norm 1; zeros stay."""
    norm = torch.linalg.vector_norm(flat(image), dim=1)
    return image / per_sample(norm.clamp_min(torch.finfo(norm.dtype).tiny), image)
