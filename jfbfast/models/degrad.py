"""DE-GRAD: the implicit network whose layer is a gradient step on data and regulariser."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from jfbfast.implicit.methods import GradientMethod
from jfbfast.models import registry
from jfbfast.models.config import ModelConfig
from jfbfast.models.data_step import basis_of_step, constants, diagonal_step, factors_of_images
from jfbfast.models.implicit_network import ImplicitNetwork, check_operator
from jfbfast.models.pretrained import set_gaussian
from jfbfast.models.red import RED, log_parameter
from jfbfast.models.sharing import load_shared
from jfbfast.operators.data_fidelity import as_data_fidelity, check_quadratic
from jfbfast.operators.eigenbasis import Eigenbasis
from jfbfast.operators.iterative import IterativeOperator, LinearOperator, gradient, linear_operator
from jfbfast.solvers import FixedPointSolver

D = TypeVar("D", bound="DEGrad")


@registry.model("paper", "preconditioned", "filtered")
class DEGrad(ImplicitNetwork):
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
            injection) or the ``filter`` that the layer uses, an `IterativeOperator` around it supplies both. None for
            a model whose every call brings its operator, ``model(d, physics)``. Its
            buffers are not in the model's ``state_dict``, which records what A is: loading it into a model with
            another A warns.
        regularizer: R, a map of images to images of the same shape. Wrap a denoiser D in a `RED`.
        step_size: η > 0, the start of a learnable parameter; the preconditioned layer has none.
        preconditioner: None, or "exact".
        data_fidelity: f, whose gradient takes the place of Aᵀ(A x − d): None for `LeastSquares`, ½‖A x − d‖²;
            `WeightedLeastSquares`, `Poisson` or your own from ``jfbfast.data_fidelity``, or one of deepinv. Only the
            first two take a preconditioner.
        damping: λ > 0 of the preconditioner, the start of a learnable parameter; None takes the
            weight of a `RED` regulariser.
        averaging: α in (0, 1] of the layer T_α = (1 − α)x + αT(x), which has the same fixed points. "auto"
            estimates it at the first forward, and whenever `update_averaging` is called. It is then a
            buffer, NaN before the first estimate; each forward tries again until an estimate succeeds.
        solver: None takes `Anderson()`.
        gradient: "jfb", "neumann", "phantom", "implicit", "shine" or "unrolled", or a gradient method (see
            `fixed_point`).
        solve_dtype, compile_solve, cuda_graph: as in `fixed_point`.

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

    def __init__(
        self,
        blur: LinearOperator | None,
        regularizer: nn.Module,
        *,
        data_fidelity: Any = None,
        step_size: float = 1.0,
        preconditioner: Literal["exact"] | None = None,
        damping: float | None = None,
        averaging: float | Literal["auto"] = 1.0,
        solver: FixedPointSolver | None = None,
        gradient: str | GradientMethod = "jfb",
        solve_dtype: torch.dtype | None = None,
        compile_solve: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        operator: Any = None if blur is None else linear_operator("blur", blur)
        _check_options(regularizer, step_size, preconditioner, damping)
        fidelity = as_data_fidelity(data_fidelity)
        if preconditioner:
            check_quadratic("the preconditioned layer", fidelity)
        needed = {"solve"} if preconditioner else set()
        if isinstance(regularizer, RED):
            needed.update(regularizer.needs)
        complete = operator is None or all(callable(getattr(operator, method, None)) for method in needed)
        super().__init__(
            operator if complete else IterativeOperator(operator),
            averaging=averaging,
            solver=solver,
            gradient=gradient,
            solve_dtype=solve_dtype,
            compile_solve=compile_solve,
            cuda_graph=cuda_graph,
        )
        self.regularizer: Any = regularizer
        self.data_fidelity = fidelity
        self.preconditioner = preconditioner
        self.log_step_size = None if preconditioner else log_parameter("step_size", step_size)
        self.log_damping = None if damping is None else log_parameter("damping", damping)

    @classmethod
    def from_pretrained(
        cls: type[D],
        name: str | Path,
        *,
        sigma: float | None = None,
        noise: float | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **objects: Any,
    ) -> D:
        """Load a model by its name, or from a file, a directory or the Hugging Face hub, in eval().

        Those with names (`jfbfast.pretrained_names`) restore colour images (B, 3, H, W) in [−1, 1] of any size.
        "universal" takes what lies beyond the edge for unknown, and the others for zeros (mid-grey). The model cards in
        ``weights/`` have the details.

        Args:
            name: one of `jfbfast.pretrained_names`; a file that `jfbfast train` wrote, or its directory; a directory
                that ``save_pretrained`` wrote; or "user/model" on the hub. The hub, which also has the named models
                that are not in this installation, takes ``pip install 'jfbfast[hub]'``. What lies on this machine
                goes before the hub.
            sigma, noise: the blur's σ in pixels and the noise's standard deviation on [−1, 1]; None takes the model's
                own. They set a `UniversalDEGrad` for a whole Gaussian and unknown surroundings; its
                ``set_measurement`` takes every other blur. A model for a single setting takes its own values only.
            revision, token, cache_dir, force_download, local_files_only: as in huggingface_hub's snapshot_download.
                With local_files_only, or the variable HF_HUB_OFFLINE=1, only what was downloaded before is used.
            objects: what the model has of other libraries, such as ``denoiser=my_network``; its weights are loaded.

        Raises:
            ValueError: none of these (the message lists the names); a damaged model; a network that is not a
                DE-GRAD; σ or noise other than the only ones that the model is for, or a noise level out of its range;
                objects missing, or that it does not take.

        Example:
            >>> import jfbfast
            >>> model = jfbfast.DEGrad.from_pretrained("gaussian5-sigma1")
            >>> model.blur.sigma, model.training
            ((1.0, 1.0), False)
        """
        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        flags = {"force_download": force_download, "local_files_only": local_files_only}
        model, config = load_shared(cls, name, objects, {**options, **flags})
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

    @property
    def _injections(self) -> int:
        """How many of the tensors of `injected` are for R; the rest are for the data fidelity."""
        return int(isinstance(self.regularizer, RED) and self.regularizer.injection)

    def injected(self, d: Tensor) -> tuple[Tensor, ...]:
        """What the layer needs at every evaluation: the injection of a `RED`, if it has one, and then

        - V* P Aᵀd, λ/(s + λ) and the factors of the filter, for a layer that `diagonal_step` can compute in a basis V;
        - what the data fidelity keeps of d, for any other.
        """
        check_operator(self.blur)
        red = self.regularizer
        if not isinstance(red, RED):
            return self.data_fidelity.inputs(d)
        basis = self._basis(d)
        if basis is None:
            own = self.data_fidelity.inputs(d)
            return *red.injected(*self._seen(d, own)), *own
        z, weight, squares = red.injected(self.blur, d), red.weight, basis.eigenvalues(d)
        found = *z, *constants(basis, self.blur, d, weight, red.restoration(z[0], weight) if z else None)
        return (*found, factors_of_images(red.seen_factors(squares).to(squares.dtype), d)) if red.filtered else found

    def _basis(self, d: Tensor) -> Eigenbasis | None:
        """The basis in which T is z + λP D(W x) for the measurements d; None for a layer without this form."""
        red = self.regularizer
        if self.preconditioner is None or self.log_damping is not None or not red.is_plain:
            return None
        return basis_of_step(self.data_fidelity, self.blur, d)

    def _seen(self, d: Tensor, own: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
        """A and d as preconditioner, filter and injection see them: W^½A and W^½d for weighted least squares."""
        return self.data_fidelity.least_squares(self.blur, d, *own) or (self.blur, d)

    def step(self, x: Tensor, d: Tensor, *injected: Tensor) -> Tensor:
        """T(x; d) for the images x and the measurements d of one batch; ``injected`` is what `injected` returned."""
        injected = injected or self.injected(d)
        z, own = injected[: self._injections], injected[self._injections :]
        basis = self._basis(d)
        if basis is not None:
            restored, kept, *seen_factors = own
            seen = basis.image(basis.coefficients(x) * seen_factors[0]).to(x.dtype) if seen_factors else x
            return diagonal_step(basis, self.regularizer.denoised(seen, x, *z), restored, kept).to(x.dtype)
        operator, seen = self._seen(d, own)
        r = self.regularizer(x, operator, seen, *z) if isinstance(self.regularizer, RED) else self.regularizer(x)
        if r.shape != x.shape:
            raise ValueError(
                f"regularizer maps shape {tuple(x.shape)} to {tuple(r.shape)}; it takes one that keeps the shape"
            )
        r = r.to(x.dtype)
        if self.step_size is not None:
            return self.data_fidelity.descend(self.blur, x, d, r, self.step_size, *own)
        return x - operator.solve(gradient(operator, x, seen, r), self.damping)

    @torch.no_grad()
    def start(self, d: Tensor, *injected: Tensor) -> Tensor:
        """The default start of a solve: Aᵀd, or P Aᵀd for a preconditioned layer."""
        check_operator(self.blur)
        if self.preconditioner is None:
            own = injected[self._injections :] if injected else self.data_fidelity.inputs(d)
            return self.blur.adjoint(self.data_fidelity.measured(d, *own))
        injected = injected or self.injected(d)
        if self._injections and self.log_damping is None:
            return injected[0].detach()
        basis = self._basis(d)
        if basis is not None:
            return basis.image(injected[0]).to(d.dtype)
        operator, seen = self._seen(d, injected[self._injections :])
        return operator.solve(operator.adjoint(seen), self.damping)

    @torch.no_grad()
    def extra_repr(self) -> str:
        values = {"step_size": self.step_size, "damping": self.damping, "averaging": self.averaging}
        told = [f"{name}={float(value):.4g}" for name, value in values.items() if value is not None]
        told += [f"{name}={getattr(self, name)!r}" for name in ("preconditioner", "solver", "gradient")]
        return ", ".join(told)


def _check_options(regularizer: Any, step_size: float, preconditioner: str | None, damping: float | None) -> None:
    """Raise TypeError or ValueError for arguments of `DEGrad` that are wrong or contradict each other."""
    if not callable(regularizer) or isinstance(regularizer, type):
        raise TypeError(f"regularizer is {regularizer!r}; it takes a module")
    kind = type(regularizer).__name__
    if getattr(regularizer, "is_denoiser", False):
        raise ValueError(f"regularizer is a denoiser, a {kind}; it takes R, so wrap the denoiser: RED({kind}(…))")
    if any(
        f"{base.__module__}.{base.__name__}" == "deepinv.models.base.Denoiser" for base in type(regularizer).__mro__
    ):
        told = f"so wrap the denoiser: RED({kind}(…), noise=0.05)"
        raise ValueError(f"regularizer is a denoiser of deepinv, a {kind}; it takes R, {told}")
    if preconditioner not in (None, "exact"):
        raise ValueError(f"preconditioner is {preconditioner!r}; it takes None or 'exact'")
    if preconditioner is None and damping is not None:
        raise ValueError(f"damping is {damping}; only preconditioner='exact' takes one")
    if preconditioner and step_size != 1.0:
        raise ValueError(f"step_size is {step_size}; the preconditioned layer takes none")
    if preconditioner and damping is None and not isinstance(regularizer, RED):
        raise ValueError("damping is None; the preconditioner takes a positive number unless R is a RED")
