"""`ImplicitNetwork`: the base of networks whose output is the fixed point of a layer T(x; d)."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from jfbfast import checks
from jfbfast.backends.tensors import per_sample
from jfbfast.backends.tracing import untraced
from jfbfast.implicit.autograd import ImplicitLayer
from jfbfast.implicit.fixed_point import solve_fixed_point
from jfbfast.implicit.forward_solve import ForwardSolve
from jfbfast.implicit.frozen import submodules
from jfbfast.implicit.methods import JFB, GradientMethod, gradient_method
from jfbfast.implicit.prepared import checked_solve_dtype
from jfbfast.models import registry
from jfbfast.models.operator_record import described, keep_operator, record_operator
from jfbfast.models.sharing import Shared
from jfbfast.operators.blur import SeparableBlur
from jfbfast.operators.convolution import Blur
from jfbfast.operators.iterative import linear_operator, with_solve
from jfbfast.solvers import Anderson, FixedPointSolution, FixedPointSolver, Status
from jfbfast.solvers.base import checked_solver
from jfbfast.spectrum import optimal_averaging, ritz_values

Network = TypeVar("Network", bound="ImplicitNetwork")

_OPTIONS = ("averaging", "solver", "gradient", "solve_dtype", "compile_solve", "cuda_graph")


def check_operator(blur: Any) -> None:
    """Raise ValueError if a network whose blur is None is used without an operator."""
    if blur is None:
        raise ValueError(
            "operator is None; a network whose blur is None takes one in each call, network(d, operator), or use "
            "network.with_operator(operator)"
        )


class ImplicitNetwork(Shared, nn.Module):
    """Restore measurements d = A x + noise as the fixed point of a layer T(x; d).

    A subclass defines T in `step`. It may define where a solve starts, `start`, what is the same at every evaluation,
    `injected`, and the `image` that belongs to a fixed point, if that is not itself an image. Every such network is a
    reconstructor of deepinv: ``network(y, physics)`` restores the measurements y of that physics.

    Args:
        blur: A, with ``adjoint``, or a linear physics of deepinv; None for a network whose every call brings its
            operator.
        averaging: α in (0, 1] of the layer T_α = (1 − α)x + αT(x), or "auto", as in `DEGrad`.
        solver: None takes `Anderson()`.
        gradient, solve_dtype, compile_solve, cuda_graph: as in `fixed_point`.

    Attributes:
        solution: the `FixedPointSolution` of the last forward.

    Raises:
        ValueError: a value out of its range.
        TypeError: an operator that cannot be called or has no ``adjoint``, or a solver that is not one.

    Example:
        >>> import torch, jfbfast
        >>> class Tikhonov(jfbfast.ImplicitNetwork):  # solves (AᵀA + I) x = Aᵀd by Richardson's iteration
        ...     def step(self, x, d):
        ...         return x - 0.5 * (self.blur.adjoint(self.blur(x) - d) + x)
        >>> blur = jfbfast.GaussianBlur()
        >>> d = torch.rand(1, 1, 8, 8)
        >>> restored = Tikhonov(blur, solver=jfbfast.Anderson(tol=1e-6))(d)
        >>> torch.allclose(restored, blur.solve(blur.adjoint(d), 1.0), atol=1e-5)
        True
    """

    solution: FixedPointSolution | None
    cuda_graph: bool = False  # of networks pickled before there was this option
    later_options = _OPTIONS
    card_tags = ("deblurring", "deep-equilibrium")

    def __init__(self, blur: Any, **options: Any) -> None:
        super().__init__()
        self.blur: Any = None if blur is None else linear_operator("blur", blur)
        self.averaging: float | Tensor
        self.set_options(**options)
        self.solution = None
        self.register_state_dict_post_hook(record_operator)
        self.register_load_state_dict_pre_hook(keep_operator)

    def set_options(  # type: ignore[override]  # it names the options
        self,
        *,
        averaging: float | Literal["auto"] = 1.0,
        solver: FixedPointSolver | None = None,
        gradient: str | GradientMethod = "jfb",
        solve_dtype: torch.dtype | None = None,
        compile_solve: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """Set all options of the constructor again; those that are left out get their defaults."""
        if averaging != "auto":
            checks.number("averaging", averaging, lambda a: 0 < a <= 1, "a number in (0, 1], or 'auto'")
        vars(self).pop("averaging", None)
        self._buffers.pop("averaging", None)
        if averaging == "auto":
            self.register_buffer("averaging", torch.tensor(torch.nan))
        else:
            self.averaging = averaging
        self.solver = checked_solver(solver) or Anderson()
        self.gradient = gradient_method(gradient)
        self.solve_dtype = checked_solve_dtype(solve_dtype)
        self.compile_solve = compile_solve
        self.cuda_graph = cuda_graph

    def step(self, x: Tensor, d: Tensor, *injected: Tensor) -> Tensor:
        """T(x; d) for the images x and the measurements d of one batch; ``injected`` is what `injected` returned."""
        raise NotImplementedError(f"{type(self).__name__} has no step; a subclass of ImplicitNetwork defines T there")

    def injected(self, d: Tensor) -> tuple[Tensor, ...]:
        """What the layer needs that is the same at every evaluation, (B, …) each: computed once, with its gradient."""
        return ()

    @torch.no_grad()
    def start(self, d: Tensor, *injected: Tensor) -> Tensor:
        """The default start of a solve: Aᵀd."""
        check_operator(self.blur)
        return self.blur.adjoint(d)

    def image(self, state: Tensor, d: Tensor, *injected: Tensor) -> Tensor:
        """The restored images of T's fixed points, in their shape; by default the fixed points themselves."""
        return state

    def layer(self, x: Tensor, d: Tensor, *injected: Tensor) -> Tensor:
        """T_α(x; d) = (1 − α)x + αT(x; d), the layer that is solved for its fixed point."""
        check_operator(self.blur)
        image = self.step(x, d, *injected)
        if isinstance(self.averaging, Tensor):
            return torch.lerp(x, image, self.averaging.nan_to_num(1.0).to(x.dtype))
        return image if self.averaging == 1 else torch.lerp(x, image, self.averaging)

    def set_measurement(self, blur: Any, noise: float) -> None:
        """Restore measurements with this blur and noise level from now on, whatever the model was trained for."""
        self.blur = blur

    def with_operator(self: Network, operator: Any) -> Network:
        """This network for measurements of another operator: it shares everything but ``blur``, and has no copies.

        ``network(d, operator)`` is ``network.with_operator(operator)(d)``. Use it where a function takes a network and
        d only, such as `jacobian_penalty` and `diagnostics.report`.

        Args:
            operator: A, with ``adjoint``, or a linear physics of deepinv. If it lacks ``solve`` or ``filter``, an
                `IterativeOperator` supplies both, with the settings of this network's own if it has one.

        Raises:
            TypeError: an operator that cannot be called or has no ``adjoint``.

        Example:
            >>> import torch, jfbfast
            >>> network = jfbfast.DEGrad(None, jfbfast.RED(torch.nn.Identity()), preconditioner="exact")
            >>> network.with_operator(jfbfast.GaussianBlur()).blur.sigma
            (1.0, 1.0)
        """
        operator = with_solve(linear_operator("operator", operator), like=self.blur)
        network = object.__new__(type(self))  # copy() refuses parametrised modules
        network.__dict__ = {**self.__dict__, "_modules": dict(self._modules)}
        network._modules.pop("blur", None)
        network.__dict__.pop("blur", None)  # an operator need not be a module
        network.blur = operator
        return network

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
        check_operator(self.blur)
        if not len(d):
            return
        before = self.averaging
        try:
            self._set_averaging(torch.nan)  # so that the layer is T itself
            implicit = ImplicitLayer(self.layer, (), JFB(), self.solver.tol)
            implicit.prepare()
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

    @untraced
    def forward(self, d: Tensor, operator: Any = None, *, x0: Tensor | None = None) -> Tensor:
        """The restored images T(x*) for the measurements d, in the shape of Aᵀd.

        With the padding mode "valid" they have a margin around the frame of d, of ``blur.margin`` pixels on each side.
        It is known only as far as the blur brought something of it into d.

        Args:
            d: (B, C, H, W), in the units that R was trained in.
            operator: A of this call, in place of ``blur`` and as in `with_operator`: an operator or a physics of
                deepinv, whose parameters may be one for each sample. Before backward, only
                buffers may change, and only by being replaced, as the ``update`` of deepinv does; after any other
                change the gradient is wrong.
            x0: the start; None for ``start(d)``.

        Raises:
            TypeError: d or x0 is not a tensor; an operator that cannot be called or has no ``adjoint``.
            ValueError: d does not have four dimensions; d has another dtype than the network's parameters (checked for
                the networks of this package, outside autocast); x0 has another shape, dtype or device than Aᵀd, which
                are those of d for a blur in any padding mode but "valid"; no operator, if ``blur`` is None.

        Warns:
            ConvergenceWarning: some samples did not converge; ``solution.status`` says which.
        """
        self.solution = None
        network = self if operator is None else self.with_operator(operator)
        check_operator(network.blur)
        restored, self.solution = network._restore(d, x0)
        return restored

    def _restore(self, d: Tensor, x0: Tensor | None) -> tuple[Tensor, FixedPointSolution]:
        self._check_arguments(d, x0)
        injected = self._usable_injected(d)  # computed once, since it is the same at every evaluation
        if x0 is None:
            x0 = self.start(d, *injected)
        self._check_dtype(x0)
        if self.averaging_is_due:
            self.update_averaging(d, x0)
        state, solution = solve_fixed_point(
            self.layer,
            x0,
            inputs=(d, *injected),
            solver=self.solver,
            gradient=self.gradient,
            solve_dtype=self.solve_dtype,
            compile_solve=self.compile_solve,
            cuda_graph=self.cuda_graph,
        )
        return self._image(state, d, injected, solution), solution

    def _image(self, state: Tensor, d: Tensor, injected: tuple[Tensor, ...], solution: FixedPointSolution) -> Tensor:
        """`image`; diverged samples get no gradient, which 0 times what was computed of NaN would make NaN."""
        diverged = solution.status == Status.DIVERGED
        own = type(self).image is not ImplicitNetwork.image
        if not (own and torch.is_grad_enabled() and bool(diverged.any())):
            return self.image(state, d, *injected)
        with torch.no_grad():
            whole = self.image(state, d, *injected)
        arguments = tree_map(lambda t: torch.where(per_sample(diverged, t), 0, t), (state, d, *injected))
        return torch.where(per_sample(diverged, whole), whole, self.image(*arguments))

    def _usable_injected(self, d: Tensor) -> tuple[Tensor, ...]:
        """`injected`; a sample of d that is not finite injects NaN without a gradient.

        Its cotangent is 0, but 0 times what was computed of NaN would give every parameter a NaN.
        """
        if not torch.is_grad_enabled():
            return self.injected(d)
        fidelity = getattr(self, "data_fidelity", None)  # which knows values of d that were not measured
        measured = d if fidelity is None else fidelity.measured(d, *fidelity.inputs(d))
        mark = (0 * measured.detach()).flatten(1).sum(1).real  # NaN for such a sample, 0 for the others
        injected = self.injected(torch.where(per_sample(mark.isnan(), d), 0, d))
        return tuple([each + per_sample(mark, each).to(each.dtype) for each in injected])

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

    def _check_dtype(self, state: Any) -> None:
        """Raise ValueError if a solve starts in another dtype than the parameters'; torch's own message is less clear.

        Only networks of this package are checked, and not under autocast or with a hook, which may cast.
        """
        x0 = next((leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)), None)  # all have one precision
        if x0 is None or torch.is_autocast_enabled(x0.device.type):
            return
        checked = set(registry.NETWORKS.values())
        for network in submodules(self):
            if type(network) not in checked or network._forward_pre_hooks:
                continue
            dtype = next(network.parameters()).dtype
            if x0.dtype.to_real() == dtype:
                continue
            name = "d" if isinstance(self.blur, SeparableBlur) else "Aᵀd"
            raise ValueError(f"{name} is {x0.dtype}; it takes the dtype of the network's parameters, {dtype}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "solution": None}

    def arguments(self) -> dict[str, Any]:
        """The arguments that make a network like this one, and its present options, which may have been assigned."""
        averaging = "auto" if isinstance(self.averaging, Tensor) else self.averaging
        found = {name: value for name, value in super().arguments().items() if name not in _OPTIONS}
        return {**found, **{name: getattr(self, name) for name in _OPTIONS}, "averaging": averaging}

    def trained_for(self) -> str:
        """The operator that the weights are for, in words."""
        return described(self.blur)
