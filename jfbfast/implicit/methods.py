"""The ways to differentiate a fixed point x* = T(x*; inputs, Θ), one class each.

With J = ∂T/∂x at x* and g = ∂ℓ/∂x at the output, the gradient by the implicit function theorem is
(∂T/∂Θ)ᵀ w with (I − Jᵀ) w = g. Most methods are a choice of w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.reference import band_dtype, flat, per_sample
from jfbfast.convergence import warn_unconverged
from jfbfast.implicit.jacobian import Linearisation
from jfbfast.implicit.krylov import cgls, gmres
from jfbfast.solvers import Anderson, Status


class Jacobian:
    """J = ∂T/∂x at the fixed point as products, each with tensors of the batch's shape.

    Attributes:
        inverse: w ↦ (I − J)⁻ᵀ w by the forward solve's estimate; None where it made none.
    """

    def __init__(self, x: Tensor, image: Tensor, inverse: Callable[[Tensor], Tensor] | None = None) -> None:
        self.inverse = inverse
        self._products = Linearisation(image, (x,))

    def vjp(self, w: Tensor) -> Tensor:
        """Jᵀ w, by one backward through the layer."""
        return self._products.vjp(w)[0]

    def jvp(self, v: Tensor) -> Tensor:
        """J v, by one backward through the backward u ↦ Jᵀ u, which is traced at the first call."""
        return self._products.jvp((v,))


class GradientMethod:
    """How the gradient g at the output becomes w ≈ (I − J)⁻ᵀ g, to be multiplied by ∂T/∂Θ.

    Attributes:
        needs: what `cotangent` asks of its `Jacobian`: "products", "inverse" (the forward solve's
            estimate) or None for neither.
    """

    needs: ClassVar[Literal["products", "inverse"] | None] = "products"

    @property
    def differentiates_in_x(self) -> bool:
        """Whether the gradient goes through ∂T/∂x, by products or through several applications."""
        return self.needs == "products" or type(self).trace is not GradientMethod.trace

    def trace(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The output, whose graph backward differentiates; from the fixed point x, T(x)."""
        return layer(x)

    def cotangent(self, gradient: Tensor, jacobian: Jacobian) -> Tensor:
        """w, given g = ∂ℓ/∂x at the output of `trace`, both (B, …): g itself unless a method says otherwise."""
        return gradient


@dataclass(frozen=True)
class JFB(GradientMethod):
    """Jacobian-free backpropagation (Fung et al., 2022): (I − J)⁻¹ replaced by I, so w = g."""

    needs = None


@dataclass(frozen=True)
class Neumann(GradientMethod):
    """The Neumann series cut off: w = Σ_{k < terms} (Jᵀ)ᵏ g, by terms − 1 products.

    Args:
        terms: at least 1; 1 is JFB.

    Raises:
        ValueError: ``terms`` below 1.
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
    """The phantom gradient (Geng et al., 2021, "On Training Implicit Models"), in its unrolling form.

    x ← (1 − τ)x + τT(x), ``steps`` times from x*, with the gradient through all of them: at x* that is
    w = τ Σ_{k < steps} ((1 − τ)I + τJᵀ)ᵏ g. The output is the last of these iterates. Memory grows
    linearly with ``steps``, not with the solver's iterations.

    Args:
        steps: at least 1.
        damping: τ in (0, 1]; the paper takes 0.5 with 5 steps.

    Raises:
        ValueError: a value out of its range.
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
    """The exact gradient: (I − Jᵀ) w = g solved for each sample, with one product of the batch at a time.

    Args:
        solver: "gmres", without restarts; its memory grows by one w a product. "cg": conjugate gradients
            on (I − J)(I − Jᵀ) w = (I − J) g, as in Liu, Tong and Zhao (2024), which need no more than
            five w but two products an iteration and the square of the condition; the layer must be
            differentiable twice. "anderson": the fixed point w = Jᵀ w + g by `Anderson`.
        tol: ‖(I − Jᵀ) w − g‖ ≤ tol ‖g‖ ("anderson": ≤ tol ‖Jᵀ w + g‖); 0 runs to ``max_iter``.
        max_iter: iterations at most.

    Raises:
        ValueError: another solver, or a value out of its range.

    Warns:
        ConvergenceWarning: in backward, for samples that did not reach ``tol``; they keep what they have.
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
        g = gradient.to(band_dtype(gradient.dtype))

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
    """SHINE (Ramzi et al., 2022): w = B⁻ᵀ g, B⁻¹ ≈ (I − J)⁻¹ the estimate that the forward solve built.

    No product with J. The solver must make the estimate. A sample whose w is not finite takes JFB's, w = g.

    Args:
        fallback: take JFB's also for a sample whose ‖w‖ exceeds ``ratio`` ‖g‖.
        ratio: the safeguard's bound, positive; the authors' code takes 1.8.

    Raises:
        ValueError: ``ratio`` not positive.
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
    """Deep unrolling: T applied ``steps`` times from x0, with the gradient through all of them, and no solve.

    Memory grows linearly with ``steps``. The solver's tolerances alone are used, to tell a sample's
    status. The `FixedPointSolution` has the last but one iterate as its value, so that the output is
    T(value), and ``steps`` iterations.

    Args:
        steps: at least 1.

    Raises:
        ValueError: ``steps`` below 1.
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
