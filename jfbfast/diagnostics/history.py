"""Residual and quality of each sample at every evaluation of a solve."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jfbfast.backends.precision import precision_for
from jfbfast.backends.tensors import flat
from jfbfast.imaging.quality import psnr
from jfbfast.implicit.frozen import frozen, materialised_weights, owner
from jfbfast.implicit.states import Packed, packed
from jfbfast.models.degrad import DEGrad
from jfbfast.models.implicit_network import ImplicitNetwork
from jfbfast.operators.frame import cut
from jfbfast.solvers import Anderson, FixedPointSolution, FixedPointSolver, Layer
from jfbfast.solvers.base import check_batch, checked_solver


class History(NamedTuple):
    """A solve, evaluation by evaluation; `jfbfast.diagnostics.plots.history` draws it.

    Attributes:
        residual: ‖T(x) − x‖ / ‖T(x)‖ at each of the E evaluations of T, (E, B).
        psnr: PSNR of the image of T(x) in dB at the true range 2, (E, B); None without a truth.
        solution: what the solve found.
    """

    residual: Tensor
    psnr: Tensor | None
    solution: FixedPointSolution


class Problem(NamedTuple):
    """The fixed point ``x = layer(x, *inputs)``, and how to solve for it; the fields are as in `fixed_point`.

    ``packed`` has the first three, and leads back to the user's states. The ``image`` of a state is compared with the
    truth, or the state itself without one; only what lies within a ``margin`` of (y, x) pixels counts.
    """

    layer: Layer
    start: Tensor
    inputs: tuple[Tensor, ...]
    solver: FixedPointSolver
    solve_dtype: torch.dtype | None
    packed: Packed
    margin: tuple[int, int] = (0, 0)
    image: Callable[..., Tensor] | None = None

    def images(self, state: Tensor) -> Tensor:
        """The images of states, to be compared with the truth."""
        return state if self.image is None else self.image(state, *self.inputs)

    def in_states(self, found: History) -> History:
        """The history with a solution of the user's own states."""
        return found._replace(solution=self.packed.of_states(found.solution))


def problem(
    model: ImplicitNetwork | Callable[..., Any],
    d: Any,
    x0: Any,
    inputs: Sequence[Any],
    solver: FixedPointSolver | None,
) -> Problem:
    """The `Problem` of an implicit network or of a layer; takes the arguments of `convergence_history`."""
    if isinstance(model, ImplicitNetwork):
        if not isinstance(d, Tensor) or len(inputs) or solver is not None:
            raise TypeError(
                f"model is a {type(model).__name__}, which takes the measurements d, and has its own inputs and solver"
            )
        if model.averaging_is_due:
            model = copy.deepcopy(model)
            model.update_averaging(d, x0)
        injected = () if isinstance(model, DEGrad) else model.injected(d)  # a DEGrad's layer computes its own
        x0, margin = model.start(d, *injected) if x0 is None else x0, getattr(model.blur, "margin", (0, 0))
        whole = Packed(model.layer, x0, (d, *injected))
        return Problem(*whole[:3], model.solver, model.solve_dtype, whole, margin, model.image)
    start = d if x0 is None and len(inputs) else x0
    if not callable(model) or isinstance(model, type) or start is None or isinstance(start, (str, bytes)):
        raise TypeError(
            f"model is {type(model).__name__} and x0 {type(start).__name__}; it takes a DEGrad and the measurements d, "
            "or a layer T(x, *inputs) with a state x0=… to start from and the tensors inputs=(…)"
        )
    whole = packed(model, start, inputs)
    check_batch(whole.start, whole.inputs)
    return Problem(*whole[:3], checked_solver(solver) or Anderson(), None, whole)


def check_truth(posed: Problem, x: Tensor | None) -> None:
    """Raise TypeError unless the truth is None, or a tensor for a state that is one."""
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it takes the true images; pass a layer's inputs as inputs=(…)")
    if x is not None and posed.packed.states is not None:
        raise TypeError("x is given; it takes None for a state or inputs that are not real tensors")


@torch.no_grad()
def convergence_history(
    model: ImplicitNetwork | Callable[..., Any],
    d: Any = None,
    x: Tensor | None = None,
    iterations: int = 300,
    x0: Any = None,
    *,
    inputs: Sequence[Any] = (),
    solver: FixedPointSolver | None = None,
) -> History:
    """Run a model's solver with tol = 0, to see whether it converges and whether quality stays once it has.

    The model is unchanged afterwards: if its averaging still has to be estimated, a copy is used. A sample that
    diverges keeps its last values.

    Args:
        model: a DE-GRAD or another `ImplicitNetwork`, or the layer ``T(x, *inputs)`` of any implicit network, with a
            state of any structure, as in `fixed_point`.
        d: for a DE-GRAD, the measurements, (B, C, H, W). For a layer with inputs, the start, in place of x0.
        x: the true images in [−1, 1], with the shape of the fixed points. With the padding mode "valid", the part of
            them within the frame of d counts. None for a state that is not one real tensor.
        iterations: number of evaluations of T.
        x0: the start, (B, …); by default a DE-GRAD's own start.
        inputs: for a layer, the tensors (B, …) that it depends on.
        solver: for a layer; by default `Anderson()`.

    Raises:
        TypeError: ``model`` is neither a DE-GRAD nor a layer, or gets the other one's arguments; a truth for a state
            that is not one real tensor.
        ValueError: ``iterations`` is below 1, or `FixedPointSolver.solve` raises it.

    Example:
        >>> import torch, jfbfast
        >>> x0, d = torch.zeros(1, 4), torch.ones(1, 4)
        >>> layer = lambda x, d: x / 2 + d
        >>> history = jfbfast.diagnostics.convergence_history(
        ...     layer, x0=x0, inputs=(d,), solver=jfbfast.Picard(), iterations=4
        ... )
        >>> history.residual.flatten()
        tensor([1.0000, 0.3333, 0.1429, 0.0667])
    """
    posed = problem(model, d, x0, inputs, solver)
    return posed.in_states(history_of(posed, x, iterations))


@torch.no_grad()
def history_of(posed: Problem, x: Tensor | None, iterations: int) -> History:
    """`convergence_history` of a `Problem`."""
    check_truth(posed, x)
    residuals: list[Tensor] = []
    qualities: list[Tensor] = []

    def recorded(value: Tensor) -> Tensor:  # captures the inputs, so that every sample stays in the batch
        image = posed.layer(value, *posed.inputs)
        residuals.append(flat(image - value).norm(dim=1) / flat(image).norm(dim=1))
        if x is not None:
            qualities.append(psnr(cut(posed.images(image), posed.margin), cut(x, posed.margin)))
        return image

    solver = replace(posed.solver, tol=0.0, atol=0.0, max_iter=iterations)
    module = owner(posed.layer)
    with frozen(module), materialised_weights(module), precision_for(0.0, posed.start.device):
        solution = solver.solve(recorded, posed.start)
    empty = [posed.start.new_zeros(0)]  # the solve of an empty batch evaluates nothing
    return History(torch.stack(residuals or empty), None if x is None else torch.stack(qualities or empty), solution)
