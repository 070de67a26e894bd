"""The methods to differentiate a fixed point x* = T(x*; inputs, Θ), one class each.

With J = ∂T/∂x at x* and g = ∂ℓ/∂x at the output, the implicit function theorem gives the gradient (∂T/∂Θ)ᵀ w with
(I − Jᵀ) w = g. Most methods are an approximation of w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.tensors import compute_dtype, flat, per_sample
from jfbfast.convergence import warn_unconverged
from jfbfast.implicit.jacobian import Linearisation
from jfbfast.implicit.krylov import cgls, gmres
from jfbfast.solvers import Anderson, Status


class Jacobian:
    """Products with J = ∂T/∂x at the fixed point.

    Attributes:
        inverse: w ↦ (I − J)⁻ᵀ w by the solver's estimate; None if it made none.
    """

    def __init__(self, x: Tensor, image: Tensor, inverse: Callable[[Tensor], Tensor] | None = None) -> None:
        self.inverse = inverse
        self._products = Linearisation(image, (x,))

    def vjp(self, w: Tensor) -> Tensor:
        """Jᵀ w for w (B, …), by one backward pass through the layer."""
        return self._products.vjp(w)[0]

    def jvp(self, v: Tensor) -> Tensor:
        """J v for v (B, …), by one backward pass through u ↦ Jᵀ u, which is traced at the first call."""
        return self._products.jvp((v,))


class GradientMethod:
    """Base class of the gradient methods; a method turns the gradient g at the output into w ≈ (I − J)⁻ᵀ g.

    Autograd then multiplies w by (∂T/∂Θ)ᵀ. A method overrides `cotangent`, or `trace` if it differentiates through
    more than one application of the layer.

    Attributes:
        needs: what `cotangent` uses of its `Jacobian`: "products", "inverse" (the solver's estimate), or None.

    Example:
        >>> import torch, jfbfast
        >>> class Halved(jfbfast.GradientMethod):  # half of the JFB gradient
        ...     needs = None
        ...     def cotangent(self, gradient, jacobian):
        ...         return gradient / 2
        >>> d = torch.ones(1, 2, requires_grad=True)
        >>> out = jfbfast.fixed_point(lambda x, d: 0.5 * x + d, torch.zeros(1, 2), inputs=(d,), gradient=Halved())
        >>> out.sum().backward()
        >>> d.grad
        tensor([[0.5000, 0.5000]])
    """

    needs: ClassVar[Literal["products", "inverse"] | None] = "products"

    @property
    def differentiates_in_x(self) -> bool:
        """Whether the gradient uses ∂T/∂x, by products or by several applications of the layer."""
        return self.needs == "products" or type(self).trace is not GradientMethod.trace

    def trace(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply ``layer`` to the fixed point x and return the output, whose graph backward differentiates."""
        return layer(x)

    def cotangent(self, gradient: Tensor, jacobian: Jacobian) -> Tensor:
        """Return w for g = ∂ℓ/∂x at the output of `trace`, both (B, …). Here it is g itself."""
        return gradient


@dataclass(frozen=True)
class JFB(GradientMethod):
    """Jacobian-free backpropagation (Fung et al., 2022): (I − J)⁻¹ is replaced by I, so w = g.

    Example:
        >>> import torch, jfbfast
        >>> d = torch.ones(1, 2, requires_grad=True)
        >>> out = jfbfast.fixed_point(lambda x, d: 0.5 * x + d, torch.zeros(1, 2), inputs=(d,), gradient=jfbfast.JFB())
        >>> out.sum().backward()
        >>> d.grad  # the exact gradient is 2
        tensor([[1., 1.]])
    """

    needs = None


@dataclass(frozen=True)
class Neumann(GradientMethod):
    """The truncated Neumann series w = Σ_{k < terms} (Jᵀ)ᵏ g, by terms − 1 products.

    Args:
        terms: at least 1; 1 is JFB.

    Raises:
        ValueError: ``terms`` below 1.

    Example:
        >>> import torch, jfbfast
        >>> d = torch.ones(1, 2, requires_grad=True)
        >>> method = jfbfast.Neumann(terms=3)
        >>> jfbfast.fixed_point(lambda x, d: 0.5 * x + d, d.detach(), inputs=(d,), gradient=method).sum().backward()
        >>> d.grad  # 1 + 1/2 + 1/4
        tensor([[1.7500, 1.7500]])
    """

    terms: int = 5

    def __post_init__(self) -> None:
        checks.integer("terms", self.terms, 1)

    def cotangent(self, gradient: Tensor, jacobian: Jacobian) -> Tensor:
        w = gradient
        for _ in range(self.terms - 1):
            w = gradient + jacobian.vjp(w)
        return w


@dataclass(frozen=True)
class Phantom(GradientMethod):
    """The phantom gradient (Geng et al., 2021, "On Training Implicit Models"), in its unrolled form.

    It takes ``steps`` steps x ← (1 − τ)x + τT(x) from x* and differentiates through all of them. At x* that is
    w = τ Σ_{k < steps} ((1 − τ)I + τJᵀ)ᵏ g. The output is the last iterate. Memory grows linearly with ``steps``,
    not with the solver's iterations.

    Args:
        steps: at least 1.
        damping: τ in (0, 1]; the paper takes 0.5 with 5 steps.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import torch, jfbfast
        >>> d = torch.ones(1, 2, requires_grad=True)
        >>> method = jfbfast.Phantom(steps=2, damping=1.0)
        >>> jfbfast.fixed_point(lambda x, d: 0.5 * x + d, d.detach(), inputs=(d,), gradient=method).sum().backward()
        >>> d.grad
        tensor([[1.5000, 1.5000]])
    """

    needs = None
    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        checks.integer("steps", self.steps, 1)
        checks.share("damping", self.damping)

    def trace(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        for _ in range(self.steps):
            image = layer(x)
            x = image if self.damping == 1 else torch.lerp(x, image, self.damping)
        return x


@dataclass(frozen=True)
class Implicit(GradientMethod):
    """The exact gradient: solves (I − Jᵀ) w = g for each sample, with one product for the whole batch at a time.

    Args:
        solver: "gmres": GMRES without restarts; its memory grows by one w in each iteration. "cg": conjugate
            gradients on (I − J)(I − Jᵀ) w = (I − J) g, as in Liu, Tong and Zhao (2024). It keeps only five vectors,
            but takes two products in each iteration and squares the condition number, and the layer must be twice
            differentiable. "anderson": the fixed point w = Jᵀ w + g by `Anderson`.
        tol: ‖(I − Jᵀ) w − g‖ ≤ tol ‖g‖ ("anderson": ≤ tol ‖Jᵀ w + g‖); 0 takes ``max_iter`` iterations.
        max_iter: the most iterations.

    Raises:
        ValueError: another solver, or a value out of its range.

    Warns:
        ConvergenceWarning: in backward, if samples did not reach ``tol``; they keep their last w.

    Example:
        >>> import torch, jfbfast
        >>> d = torch.ones(1, 2, requires_grad=True)
        >>> method = jfbfast.Implicit("gmres", tol=1e-6)
        >>> jfbfast.fixed_point(lambda x, d: 0.5 * x + d, d.detach(), inputs=(d,), gradient=method).sum().backward()
        >>> d.grad
        tensor([[2.0000, 2.0000]])
    """

    solver: Literal["gmres", "cg", "anderson"] = "gmres"
    tol: float = 1e-6
    max_iter: int = 50

    def __post_init__(self) -> None:
        if self.solver not in ("gmres", "cg", "anderson"):
            raise ValueError(f"solver is {self.solver!r}; it takes 'gmres', 'cg' or 'anderson'")
        checks.non_negative("tol", self.tol)
        checks.integer("max_iter", self.max_iter, 1)

    def cotangent(self, gradient: Tensor, jacobian: Jacobian) -> Tensor:
        g = gradient.to(compute_dtype(gradient.dtype))

        def adjoint(w: Tensor) -> Tensor:
            return w - jacobian.vjp(w)

        if self.solver == "anderson":
            found = Anderson(tol=self.tol, max_iter=self.max_iter).solve(lambda w: g + jacobian.vjp(w), g)
            w, residual, reached = found.value, found.residual, found.status == Status.CONVERGED
        else:
            if self.solver == "gmres":
                w, residual = gmres(adjoint, g, self.tol, self.max_iter)
            else:
                w, residual = cgls(adjoint, lambda v: v - jacobian.jvp(v), g, self.tol, self.max_iter)
            reached = residual <= self.tol
        if self.tol > 0 and not reached.all():
            warn_unconverged(
                f"{int((~reached).sum())} of {len(g)} samples did not reach tol={self.tol:g} in {self.max_iter} "
                f"iterations of the implicit gradient's solve (largest residual {float(residual.max()):.1e})"
            )
        return w.to(gradient.dtype)


@dataclass(frozen=True)
class Shine(GradientMethod):
    """SHINE (Ramzi et al., 2022): w = B⁻ᵀ g with the estimate B⁻¹ ≈ (I − J)⁻¹ that the forward solve has built.

    It needs no product with J, but a solver that makes the estimate: `Anderson` or `Broyden`. A sample whose w is not
    finite falls back to JFB, w = g.

    Args:
        fallback: also fall back to JFB for a sample with ‖w‖ > ``ratio`` ‖g‖.
        ratio: positive; the authors' code takes 1.8.

    Raises:
        ValueError: ``ratio`` not positive.

    Example:
        >>> import torch, jfbfast
        >>> d = torch.ones(1, 2, requires_grad=True)
        >>> method = jfbfast.Shine(fallback=False)
        >>> jfbfast.fixed_point(lambda x, d: 0.5 * x + d, d.detach(), inputs=(d,), gradient=method).sum().backward()
        >>> d.grad
        tensor([[2., 2.]])
    """

    needs = "inverse"
    fallback: bool = True
    ratio: float = 1.8

    def __post_init__(self) -> None:
        checks.positive("ratio", self.ratio)

    def cotangent(self, gradient: Tensor, jacobian: Jacobian) -> Tensor:
        assert jacobian.inverse is not None
        w = jacobian.inverse(gradient)
        norm_w, norm_g = (torch.linalg.vector_norm(flat(v), dim=1, dtype=torch.float64) for v in (w, gradient))
        kept = norm_w.isfinite() & (not self.fallback or norm_w <= self.ratio * norm_g)
        return torch.where(per_sample(kept, w), w, gradient)


@dataclass(frozen=True)
class Unrolled(GradientMethod):
    """Deep unrolling: apply T ``steps`` times from x0 and differentiate through all applications, without a solve.

    Memory grows linearly with ``steps``. Only the tolerances of the solver are used, for the samples' status. The
    value of the `FixedPointSolution` is the last but one iterate, so that the output is T(value).

    Args:
        steps: at least 1.

    Raises:
        ValueError: ``steps`` below 1.

    Example:
        >>> import torch, jfbfast
        >>> d = torch.ones(1, 2, requires_grad=True)
        >>> method = jfbfast.Unrolled(steps=3)
        >>> jfbfast.fixed_point(lambda x, d: 0.5 * x + d, 0 * d.detach(), inputs=(d,), gradient=method)
        tensor([[1.7500, 1.7500]], grad_fn=<_FixedPointFunctionBackward>)
    """

    needs = None
    steps: int = 10

    def __post_init__(self) -> None:
        checks.integer("steps", self.steps, 1)

    def trace(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = layer(x)
        return x


GRADIENTS: dict[str, type[GradientMethod]] = {
    "jfb": JFB,
    "neumann": Neumann,
    "phantom": Phantom,
    "implicit": Implicit,
    "shine": Shine,
    "unrolled": Unrolled,
}


def gradient_method(gradient: str | GradientMethod) -> GradientMethod:
    """The method of that name with its defaults, or the method itself.

    Raises:
        ValueError: another name.
        TypeError: neither a name nor a `GradientMethod`.
    """
    if isinstance(gradient, GradientMethod):
        return gradient
    if not isinstance(gradient, str):
        raise TypeError(f"gradient is {gradient!r}; it takes a name or a GradientMethod")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient is {gradient!r}; it takes one of {', '.join(map(repr, GRADIENTS))}, or a method")
    return GRADIENTS[gradient]()
