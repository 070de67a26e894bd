"""DE-GRAD: the implicit network whose layer is a gradient step on data and regulariser."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jfbfast import checks
from jfbfast.implicit.autograd import ImplicitLayer
from jfbfast.implicit.fixed_point import ForwardSolve, solve_fixed_point
from jfbfast.implicit.methods import JFB, GradientMethod, gradient_method
from jfbfast.implicit.prepared import checked_solve_dtype
from jfbfast.models import registry
from jfbfast.models.config import ModelConfig
from jfbfast.models.operator_record import described, keep_operator, record_operator
from jfbfast.models.pretrained import load_model, set_gaussian
from jfbfast.models.red import RED, log_parameter
from jfbfast.operators.blur import SeparableBlur
from jfbfast.operators.convolution import Blur
from jfbfast.operators.iterative import (
    IterativeOperator,
    LinearOperator,
    gradient,
    gradient_step,
    linear_operator,
)
from jfbfast.solvers import Anderson, FixedPointSolution, FixedPointSolver
from jfbfast.solvers.base import checked_solver
from jfbfast.spectrum import optimal_averaging, ritz_values


@registry.model("paper", "preconditioned", "filtered")
class DEGrad(nn.Module):
    """The fixed point of T(x) = x − η(Aᵀ(A x − d) + R(x)), with a trained R (Gilton, Ongie, Willett, 2021).

    The layer T has three forms:

    - the paper's: ``DEGrad(blur, DnCNN())``, where R is the network itself, or ``RED(denoiser)``;
    - preconditioned: ``preconditioner="exact"``, T(x) = x − P(Aᵀ(A x − d) + R(x)) with
      P = (AᵀA + λI)⁻¹, which has the same fixed points;
    - filtered, the recommended one: ``preconditioner="exact"`` with ``RED(denoiser, filter_damping="weight")``,
      R(x) = λ(x − D(W x)) with the same λ, W = AᵀA(AᵀA + δI)⁻¹ and δ = λ, so that the denoiser D sees only
      what A keeps of x; with ``UNet(injection=True)`` as denoiser, R(x; d) = λ(x − D(W x, P Aᵀd)).

    Args:
        blur: A: a `SeparableBlur`, a `Blur`, any module with ``adjoint``, or a linear physics of deepinv (with ``A``
            and ``A_adjoint``). It may hold a mask or a kernel for each sample: with an operator other than
            the first two, converged samples stay in the batch. If it lacks the ``solve`` (preconditioner,
            injection) or the ``filter`` that the layer uses, an `IterativeOperator` around it supplies both. Its
            buffers are not in the model's ``state_dict``, which records what A is: loading it into a model with
            another A warns.
        regularizer: R, a map of images to images of the same shape. Wrap a denoiser D in a `RED`.
        step_size: η > 0, the start of a learnable parameter; the preconditioned layer has none.
        preconditioner: None, or "exact".
        damping: λ > 0 of the preconditioner, the start of a learnable parameter; None takes the
            weight of a `RED` regulariser.
        averaging: α in (0, 1] of the layer T_α = (1 − α)x + αT(x), which has the same fixed points. "auto"
            estimates it at the first forward, and whenever `update_averaging` is called. It is then a
            buffer, NaN before the first estimate; each forward tries again until an estimate succeeds.
        solver: None takes `Anderson()`.
        gradient: "jfb", "neumann", "phantom", "implicit", "shine" or "unrolled", or a gradient method (see
            `fixed_point`).
        solve_dtype, compile_solve: as in `fixed_point`.

    Attributes:
        solution: the `FixedPointSolution` of the last forward.

    Raises:
        ValueError: a value out of its range, options that contradict each other, or a denoiser of this package as R.
        TypeError: an operator or a regulariser that cannot be called, an operator without ``adjoint``, or a solver
            that is not one.

    Example:
        >>> import torch, jfbfast
        >>> blur = jfbfast.GaussianBlur(kernel_size=5, sigma=1.0)
        >>> red = jfbfast.RED(jfbfast.UNet(channels=1, features=(4, 8), blocks=(1, 1)), filter_damping="weight")
        >>> model = jfbfast.DEGrad(blur, red, preconditioner="exact")
        >>> d = blur(torch.rand(2, 1, 16, 16))
        >>> restored = model(d)  # the solve, and one more application of the layer
        >>> restored.square().mean().backward()  # through that one application
        >>> restored.shape, len(model.solution.iterations)
        (torch.Size([2, 1, 16, 16]), 2)
    """

    solution: FixedPointSolution | None

    def __init__(
        self,
        blur: LinearOperator,
        regularizer: nn.Module,
        *,
        step_size: float = 1.0,
        preconditioner: Literal["exact"] | None = None,
        damping: float | None = None,
        averaging: float | Literal["auto"] = 1.0,
        solver: FixedPointSolver | None = None,
        gradient: str | GradientMethod = "jfb",
        solve_dtype: torch.dtype | None = None,
        compile_solve: bool = False,
    ) -> None:
        super().__init__()
        operator = linear_operator("blur", blur)
        _check_options(regularizer, step_size, preconditioner, damping, averaging)
        needed = {"solve"} if preconditioner else set()
        if isinstance(regularizer, RED):
            needed.update(regularizer.needs)
        closed = all(callable(getattr(operator, method, None)) for method in needed)
        self.blur: Any = operator if closed else IterativeOperator(operator)
        self.regularizer: Any = regularizer
        self.preconditioner = preconditioner
        self.averaging: float | Tensor
        if averaging == "auto":
            self.register_buffer("averaging", torch.tensor(torch.nan))
        else:
            self.averaging = averaging
        self.solver = checked_solver(solver) or Anderson()
        self.gradient = gradient_method(gradient)
        self.solve_dtype = checked_solve_dtype(solve_dtype)
        self.compile_solve = compile_solve
        self.log_step_size = None if preconditioner else log_parameter("step_size", step_size)
        self.log_damping = None if damping is None else log_parameter("damping", damping)
        self.solution = None
        self.register_state_dict_post_hook(record_operator)
        self.register_load_state_dict_pre_hook(keep_operator)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, sigma: float | None = None, noise: float | None = None) -> DEGrad:
        """Load a model that ships with the package, or that `jfbfast train` wrote, in eval().

        The shipped models (`jfbfast.pretrained_names`) restore colour images (B, 3, H, W) in [−1, 1] of any size, which
        were blurred with zeros (mid-grey) beyond the edge. The model cards in ``weights/`` have the details.

        Args:
            name: of a shipped model, or a file.
            sigma, noise: the blur's σ in pixels and the noise's standard deviation on [−1, 1]; None takes the model's
                own. They set a `UniversalDEGrad` for a whole Gaussian and unknown surroundings; its
                ``set_measurement`` takes every other blur. A model for a single setting takes its own values only.

        Raises:
            ValueError: neither a name nor a file (the message lists the names); a network that is not a DE-GRAD;
                σ or noise other than the only ones that the model is for, or a noise level out of its range.

        Example:
            >>> import jfbfast
            >>> model = jfbfast.DEGrad.from_pretrained("gaussian5-sigma1")
            >>> model.blur.sigma, model.training
            ((1.0, 1.0), False)
        """
        model, config = load_model(name)
        if not isinstance(model, cls):
            taken = "a DE-GRAD" if cls is DEGrad else f"a {cls.__name__}"
            raise ValueError(f"name is {str(name)!r}, a {config.form} network; it takes {taken}")
        set_gaussian(str(name), model, config, sigma, noise)
        return model

    @classmethod
    def from_config(cls, config: ModelConfig, network: nn.Module) -> DEGrad:
        """Make the untrained model around its network, for `ModelConfig.model`."""
        if config.form == "paper":
            if getattr(network, "is_denoiser", False):
                raise ValueError(f"denoiser is {dict(config.denoiser)}; the paper's form takes a DnCNN, not residual")
            return cls(config.blur(), network, step_size=config.step_size, **config.degrad_options())
        red = RED(network, config.weight, "weight" if config.form == "filtered" else None)
        return cls(config.blur(), red, preconditioner="exact", **config.degrad_options())

    def set_measurement(self, blur: Any, noise: float) -> None:
        """Restore measurements with this blur and noise level from now on, whatever the model was trained for."""
        self.blur = blur

    @property
    def step_size(self) -> Tensor | None:
        """η, a tensor of shape (); None for a preconditioned layer."""
        return None if self.log_step_size is None else self.log_step_size.exp()

    @property
    def damping(self) -> Tensor | None:
        """λ of the preconditioner, a tensor of shape (); None without a preconditioner."""
        if self.preconditioner is None:
            return None
        if self.log_damping is not None:
            return self.log_damping.exp()
        return self.regularizer.weight

    def layer(self, x: Tensor, d: Tensor, *injected: Tensor) -> Tensor:
        """T_α(x; d) for the images x and the measurements d of one batch; ``injected`` is R's injection, if known."""
        red = isinstance(self.regularizer, RED)
        r = self.regularizer(x, self.blur, d, *injected) if red else self.regularizer(x)
        if r.shape != x.shape:
            raise ValueError(
                f"regularizer maps shape {tuple(x.shape)} to {tuple(r.shape)}; it takes one that keeps the shape"
            )
        r = r.to(x.dtype)
        if self.step_size is not None:
            image = gradient_step(self.blur, x, d, r, self.step_size)
        else:
            image = x - self.blur.solve(gradient(self.blur, x, d, r), self.damping)
        if isinstance(self.averaging, Tensor):
            return torch.lerp(x, image, self.averaging.nan_to_num(1.0).to(x.dtype))
        return image if self.averaging == 1 else torch.lerp(x, image, self.averaging)

    @property
    def averaging_is_due(self) -> bool:
        """Whether ``averaging="auto"`` has no estimate yet."""
        return isinstance(self.averaging, Tensor) and bool(self.averaging.isnan())

    @torch.no_grad()
    def update_averaging(self, d: Tensor, x0: Tensor | None = None) -> None:
        """Estimate the α of ``averaging="auto"``: the `optimal_averaging` of the spectra at the fixed points for d.

        It solves with T itself, and takes 60 vector-Jacobian products there. One α serves all samples: the
        one that is best for the worst of them. A sample that diverged counts with the spectrum at its best iterate.
        If no sample has a finite iterate with an eigenvalue that some α contracts, α becomes NaN, and the layer is T
        itself. An empty batch changes nothing.

        Args:
            d, x0: as in `forward`.

        Raises:
            ValueError: a model whose ``averaging`` is a number.
        """
        if not isinstance(self.averaging, Tensor):
            raise ValueError(f"averaging is {self.averaging}; only a model with averaging='auto' updates it")
        if not len(d):
            return
        before = self.averaging
        try:
            self._set_averaging(torch.nan)  # so that the layer is T itself
            implicit = ImplicitLayer(self.layer, (), JFB(), self.solver.tol)
            found = ForwardSolve(implicit, self.solver).find(self.start(d) if x0 is None else x0, (d,))
            estimate = optimal_averaging(ritz_values(self.layer, found.value, (d,)))
        except BaseException:
            self.averaging = before
            raise
        self._set_averaging(float(estimate))

    @torch.inference_mode(False)
    def _set_averaging(self, value: float) -> None:
        """Set α in a new tensor, because the graph of an earlier forward may hold the old one."""
        self.averaging = torch.full_like(self.averaging, value)  # type: ignore[arg-type]

    @torch.compiler.disable
    def forward(self, d: Tensor, x0: Tensor | None = None) -> Tensor:
        """The restored images T(x*) for the measurements d, in the shape of Aᵀd.

        With the padding mode "valid" they have a margin around the frame of d, of ``blur.margin`` pixels on each side.
        It is known only as far as the blur brought something of it into d.

        Args:
            d: (B, C, H, W), in the units that R was trained in.
            x0: the start; None for ``start(d)``.

        Raises:
            TypeError: d or x0 is not a tensor.
            ValueError: d does not have four dimensions; d has another dtype than the network's parameters (checked for
                the networks of this package, outside autocast); x0 has another shape, dtype or device than Aᵀd, which
                are those of d for a blur in any padding mode but "valid".

        Warns:
            ConvergenceWarning: some samples did not converge; ``solution.status`` says which.
        """
        self.solution = None
        self._check_arguments(d, x0)
        # Computed once, since it is the same at every evaluation.
        injected = self.regularizer.injected(self.blur, d) if isinstance(self.regularizer, RED) else ()
        if x0 is None:
            x0 = self.start(d, *injected)
        self._check_dtype(x0)
        if self.averaging_is_due:
            self.update_averaging(d, x0)
        restored, self.solution = solve_fixed_point(
            self.layer,
            x0,
            inputs=(d, *injected),
            solver=self.solver,
            gradient=self.gradient,
            solve_dtype=self.solve_dtype,
            compile_solve=self.compile_solve,
        )
        return restored

    def _check_arguments(self, d: Tensor, x0: Tensor | None) -> None:
        """Raise TypeError or ValueError for wrong arguments of `forward`."""
        if not isinstance(d, Tensor):
            raise TypeError(f"d is a {type(d).__name__}; it takes a tensor")
        if x0 is not None and not isinstance(x0, Tensor):
            raise TypeError(f"x0 is a {type(x0).__name__}; it takes a tensor to start from, or None")
        a_blur = isinstance(self.blur, (SeparableBlur, Blur))
        if a_blur and d.dim() != 4:
            raise ValueError(f"d has shape {tuple(d.shape)}; it takes images (B, C, H, W)")
        if x0 is None:
            return
        name, like = "d", d
        if not a_blur or any(self.blur.margin):
            with torch.no_grad():
                name, like = "Aᵀd", self.blur.adjoint(d)
        if x0.shape != like.shape:
            raise ValueError(f"x0 has shape {tuple(x0.shape)}; it takes that of {name}, {tuple(like.shape)}")
        if (x0.dtype, x0.device) != (like.dtype, like.device):
            raise ValueError(f"x0 is {x0.dtype} on {x0.device}; it takes what {name} is, {like.dtype} on {like.device}")

    def _check_dtype(self, x0: Tensor) -> None:
        """Raise ValueError if x0 has another dtype than the network's parameters; torch's own message is less clear.

        Only networks of this package are checked, and not under autocast or with a hook, which may cast.
        """
        network = self.regularizer.denoiser if isinstance(self.regularizer, RED) else self.regularizer
        if type(network) not in registry.NETWORKS.values() or network._forward_pre_hooks:
            return
        dtype = next(network.parameters()).dtype
        if x0.dtype != dtype and not torch.is_autocast_enabled(x0.device.type):
            name = "d" if isinstance(self.blur, SeparableBlur) else "Aᵀd"
            raise ValueError(f"{name} is {x0.dtype}; it takes the dtype of the network's parameters, {dtype}")

    @torch.no_grad()
    def start(self, d: Tensor, *injected: Tensor) -> Tensor:
        """The default start of a solve: Aᵀd, or P Aᵀd for a preconditioned layer."""
        if injected and self.preconditioner and self.log_damping is None:
            return injected[0].detach()
        start = self.blur.adjoint(d)
        return start if self.damping is None else self.blur.solve(start, self.damping)

    @torch.no_grad()
    def extra_repr(self) -> str:
        values = {"step_size": self.step_size, "damping": self.damping, "averaging": self.averaging}
        told = [f"{name}={float(value):.4g}" for name, value in values.items() if value is not None]
        told += [f"{name}={getattr(self, name)!r}" for name in ("preconditioner", "solver", "gradient")]
        return ", ".join(told)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "solution": None}

    def trained_for(self) -> str:
        """The operator that the weights are for, in words."""
        return described(self.blur)


def _check_options(
    regularizer: Any, step_size: float, preconditioner: str | None, damping: float | None, averaging: float | str
) -> None:
    """Raise TypeError or ValueError for arguments of `DEGrad` that are wrong or contradict each other."""
    if not callable(regularizer) or isinstance(regularizer, type):
        raise TypeError(f"regularizer is {regularizer!r}; it takes a module")
    if getattr(regularizer, "is_denoiser", False):
        kind = type(regularizer).__name__
        raise ValueError(f"regularizer is a denoiser, a {kind}; it takes R, so wrap the denoiser: RED({kind}(…))")
    if preconditioner not in (None, "exact"):
        raise ValueError(f"preconditioner is {preconditioner!r}; it takes None or 'exact'")
    if preconditioner is None and damping is not None:
        raise ValueError(f"damping is {damping}; only preconditioner='exact' takes one")
    if preconditioner and step_size != 1.0:
        raise ValueError(f"step_size is {step_size}; the preconditioned layer takes none")
    if preconditioner and damping is None and not isinstance(regularizer, RED):
        raise ValueError("damping is None; the preconditioner takes a positive number unless R is a RED")
    if averaging != "auto":
        checks.number("averaging", averaging, lambda a: 0 < a <= 1, "a number in (0, 1], or 'auto'")
