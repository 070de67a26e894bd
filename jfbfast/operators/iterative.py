"""Any linear operator A: its protocol, its gradient step, and functions of AᵀA by conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.backends.precision import full_precision
from jfbfast.backends.tensors import compute_dtype
from jfbfast.buffers import buffers_of, used
from jfbfast.operators.blur import SeparableBlur
from jfbfast.operators.conjugate_gradients import TOLERANCE, conjugate_gradients
from jfbfast.operators.convolution import Blur
from jfbfast.operators.inverse import scalar_gradient
from jfbfast.operators.physics import PhysicsOperator

_ADJOINTS = {"adjoint", "A_adjoint"}  # the names here and in deepinv
_PLAIN = {int, float, bool, str, type(None), Tensor}  # no operators
# Attributes of every module, and of torch's convolutions: most of what a network has, and no operators.
_ORDINARY = {
    *vars(nn.Module()),
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding"),
    *("groups", "padding_mode", "_reversed_padding_repeated_twice", "inplace"),
}


class LinearOperator(Protocol):
    """The methods of A that DE-GRAD calls."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def adjoint(self, y: Tensor) -> Tensor: ...


def linear_operator(name: str, given: Any) -> Any:
    """``given`` itself if it is an operator; a linear physics of deepinv is wrapped in a `PhysicsOperator`.

    Raises:
        TypeError: ``given`` is a class, cannot be called, or has no adjoint.
    """
    if isinstance(given, type):
        raise TypeError(f"{name} is the class {given.__name__}; it takes an instance")
    if not hasattr(given, "adjoint") and hasattr(given, "A_adjoint"):
        return PhysicsOperator(given)
    for told, found in (("cannot be called", given), ("has no adjoint", getattr(given, "adjoint", None))):
        if not callable(found):
            raise TypeError(f"{name} is {type(given).__name__}, which {told}; it takes a module with an adjoint")
    return given


def with_solve(operator: Any, like: Any = None) -> Any:
    """``operator``, in an `IterativeOperator` with the settings of ``like`` if it has no ``solve`` or ``filter``."""
    if all(callable(getattr(operator, method, None)) for method in ("solve", "filter")):
        return operator
    if isinstance(like, IterativeOperator):
        return IterativeOperator(operator, like.tol, like.max_iter)
    return IterativeOperator(operator)


def may_hold_sample_data(module: nn.Module | None) -> bool:
    """Whether a module contains an operator or a data fidelity that may hold something of each sample, such as a mask.

    Only a `SeparableBlur`, a `Blur` and the data fidelities of this package are known to hold none. A layer with
    another is evaluated on whole batches.
    """
    found: list[Any] = [module]
    seen: set[int] = set()
    while found:  # a loop with few calls, since every solve runs it
        value = found.pop()
        kind: type = type(value)
        if kind in _PLAIN:
            continue
        if isinstance(value, nn.Module):
            if id(value) in seen:
                continue
            seen.add(id(value))
            attributes, children = value.__dict__, value._modules
            found += children.values()
            # An operator need not be a module.
            found += [attributes[name] for name in attributes.keys() - _ORDINARY if name[0] != "_"]
            of_class = _held_by_class(kind)
            if of_class == "data":
                return True
            # hasattr of a module would call its slow __getattr__, and the children of a TorchScript module are no dict.
            has_adjoint = of_class or any([name in attributes or name in children for name in _ADJOINTS])
            if has_adjoint and not isinstance(value, (SeparableBlur, Blur, IterativeOperator)):
                return True
        elif isinstance(value, (list, tuple)):
            found.extend(value)
        elif isinstance(value, dict):
            found.extend(value.values())
        elif (hasattr(value, "adjoint") or hasattr(value, "A_adjoint")) and not isinstance(value, Tensor):
            return True
    return False


@lru_cache(maxsize=512)
def _held_by_class(kind: type) -> str:
    """What a class of modules says of them: "data" of each sample for a DataFidelity that may hold it, or "adjoint"."""
    if getattr(kind, "may_hold_sample_data", False):
        return "data"
    return "adjoint" if any(hasattr(kind, name) for name in _ADJOINTS) else ""


def gradient(operator: LinearOperator, x: Tensor, d: Tensor, r: Tensor | None) -> Tensor:
    """Aᵀ(A x − d) + r, in one pass over the images if A is separable; None stands for r = 0."""
    if isinstance(operator, (SeparableBlur, Blur)):
        return operator.gradient(x, d, r)
    g = operator.adjoint(operator(x) - d)
    return g if r is None else g + r


def gradient_step(operator: LinearOperator, x: Tensor, d: Tensor, r: Tensor | None, step_size: Tensor) -> Tensor:
    """x − η(Aᵀ(A x − d) + r), in one pass over the images if A is separable; None stands for r = 0."""
    if isinstance(operator, (SeparableBlur, Blur)):
        return operator.gradient_step(x, d, r, step_size)
    return x - step_size * gradient(operator, x, d, r)


class IterativeOperator(nn.Module):
    """A linear operator with ``solve`` and ``filter``, both by conjugate gradients on AᵀA + λI.

    A physics of deepinv with a closed form of (AᵀA + λI)⁻¹ is solved by that form in place of conjugate gradients: one
    with a singular value decomposition (DecomposablePhysics, such as BlurFFT, Inpainting, MRI and Denoising) or with
    a closed ``prox_l2`` (Downsampling with circular padding).

    `DEGrad` wraps an operator in this class itself; do it by hand to choose the tolerance. The layer
    x − P(g) has the same fixed points however inaccurately P = (AᵀA + λI)⁻¹ is solved, so ``tol=1e-2`` is enough
    for a preconditioned layer without a filter or an injection. The error of the filter, and of the image that an
    injection adds to the denoiser's input, is at most tol·‖x‖.

    Everything is differentiable in the images and the damping, also twice; the derivatives of a solve are
    solves too. What A computes from learnable parameters gets its gradient as well, once: a gradient in the parameters
    of A with create_graph=True raises a RuntimeError.

    Args:
        operator: A, a module from (B, …) to (B, …) with ``adjoint`` that treats each sample by itself, or a linear
            physics of deepinv. Images of half precision are solved for in float32, so it must accept float32.
        tol: a sample is done where ‖b − (AᵀA + λI) x‖ ≤ tol·‖b‖; None for 1e-6, or 1e-12 in float64. The residual is
            updated by the recurrence; in float32 the true one does not fall below about 1e-7 ‖AᵀA‖/λ.
        max_iter: the largest number of applications of AᵀA in one solve.

    Raises:
        ValueError: ``tol`` not in (0, 1); ``max_iter`` below 1.
        TypeError: an operator that cannot be called, or without ``adjoint``.

    Example:
        >>> import torch, jfbfast
        >>> class Mask(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x * torch.tensor([1.0, 0.0])
        ...     adjoint = forward
        >>> operator = jfbfast.IterativeOperator(Mask())
        >>> operator.solve(torch.ones(1, 2), damping=0.25)
        tensor([[0.8000, 4.0000]])
        >>> operator.filter(torch.ones(1, 2), damping=0.25)
        tensor([[0.8000, 0.0000]])
    """

    def __init__(self, operator: LinearOperator, tol: float | None = None, max_iter: int = 1000) -> None:
        super().__init__()
        if tol is not None:
            checks.number("tol", tol, lambda t: 0 < t < 1, "None or a number in (0, 1)")
        checks.integer("max_iter", max_iter, 1)
        self.operator: Any = linear_operator("operator", operator)
        self.tol: float | None = tol
        self.max_iter: int = max_iter

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        return self.operator(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self.operator.adjoint(y)

    def __getattr__(self, name: str) -> Any:
        """An attribute of A that this class lacks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "operator":
                raise
        return getattr(getattr(self.operator, "physics", self.operator), name)

    def eigenbasis(self, shape: Sequence[int]) -> None:
        """None, whatever A has, since this class solves by conjugate gradients."""

    def normal(self, x: Tensor) -> Tensor:
        """AᵀA x."""
        return self.adjoint(self(x))

    def gradient(self, x: Tensor, d: Tensor, r: Tensor | None = None) -> Tensor:
        """Aᵀ(A x − d) + r; None stands for r = 0."""
        return gradient(self.operator, x, d, r)

    def gradient_step(self, x: Tensor, d: Tensor, r: Tensor | None, step_size: float | Tensor) -> Tensor:
        """x − η(Aᵀ(A x − d) + r); None stands for r = 0."""
        return x - step_size * self.gradient(x, d, r)

    def solve(self, b: Tensor, damping: float | Tensor) -> Tensor:
        """(AᵀA + λI)⁻¹ b; NaN for samples with a b that is not finite.

        Args:
            b: images (B, …), real or complex.
            damping: λ > 0, a number or a real tensor of shape () or (B, 1, …, 1).

        Raises:
            ValueError: b without a batch dimension; a number λ ≤ 0; a tensor of another shape.

        Warns:
            ConvergenceWarning: some samples did not reach ``tol``; usually because ``adjoint`` is not the adjoint.
        """
        if b.dim() < 2:
            raise ValueError(f"b has shape {tuple(b.shape)}; it takes a batch (B, …)")
        if not isinstance(damping, Tensor):
            checks.positive("damping", damping)
            damping = torch.tensor(damping, dtype=torch.float64, device=b.device)
        if damping.dim() and damping.shape != (len(b), *[1] * (b.dim() - 1)):
            raise ValueError(
                f"damping has shape {tuple(damping.shape)}; it takes a number, or shape () or (B, 1, …, 1)"
            )
        with torch.no_grad():
            x = self._solve(b.detach(), damping.detach())
        if not torch.is_grad_enabled():
            return x
        # x = P(b − AᵀA x₀ + AᵀA x₀) with fixed x₀ = x; the first AᵀA keeps its graph, which is what −P ∂(AᵀA) x needs.
        wide = _wide(b.dtype)
        with full_precision(b.device):
            back = self.normal(torch.where(x.isfinite(), x, 0).to(wide))
        if back.requires_grad:
            b = b - (_Once.apply(back) - back.detach()).to(b.dtype)
        return _Tikhonov.apply(b, damping, x, self)

    def filter(self, x: Tensor, damping: float | Tensor) -> Tensor:
        """W x with the Tikhonov filter W = AᵀA(AᵀA + δI)⁻¹ = I − δ(AᵀA + δI)⁻¹: the part of x that A preserves."""
        return (x - damping * self.solve(x, damping)).to(x.dtype)

    def _solve(self, b: Tensor, damping: Tensor) -> Tensor:
        wide = _wide(b.dtype)
        tol = TOLERANCE[wide] if self.tol is None else self.tol
        dims, goal = tuple(range(1, b.dim())), f"samples did not reach tol={tol:g}"
        closed = isinstance(self.operator, PhysicsOperator)
        with full_precision(b.device):
            right, damping = b.to(wide), damping.to(wide.to_real())
            x = self.operator.closed_solve(right, damping) if closed else None
            if x is None:
                x = conjugate_gradients(self.normal, right, damping, tol, self.max_iter, dims=dims, goal=goal)
        return x.to(b.dtype)

    def extra_repr(self) -> str:
        return f"tol={self.tol}, max_iter={self.max_iter}"


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to solve in for images of ``dtype``."""
    return dtype if dtype.is_complex else compute_dtype(dtype)


class _Once(torch.autograd.Function):
    """The identity, for what can be differentiated once: its second derivative would lack the terms through x₀."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph is True for a gradient in the parameters of A; the gradient of a solve by conjugate "
                "gradients has no derivative there, so it takes False, or inputs= without the parameters of A"
            )
        return g


class _Tikhonov(torch.autograd.Function):
    """x = P b with P = (AᵀA + λI)⁻¹, from the known x: for a cotangent g, ∂/∂b is P g and ∂/∂λ is −Re⟨P g, x⟩."""

    @staticmethod
    def forward(b: Tensor, damping: Tensor, x: Tensor, operator: IterativeOperator) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, damping, _, ctx.operator = inputs
        ctx.buffers = buffers_of(ctx.operator.modules())  # a mask may have changed by the time of backward
        ctx.save_for_backward(damping, output if ctx.needs_input_grad[1] else None)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        damping, x = ctx.saved_tensors
        with used(ctx.buffers):
            u = ctx.operator.solve(g, damping)
        return u, scalar_gradient(u, x, damping) if ctx.needs_input_grad[1] else None, None, None
