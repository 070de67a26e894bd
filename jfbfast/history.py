"""What every evaluation of a solve did: residual and quality of each sample against iterations."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from jfbfast.degrad import DEGrad
from jfbfast.fixed_map import fixed_map, materialised_weights
from jfbfast.quality import psnr
from jfbfast.reference import flat
from jfbfast.solvers import FixedPointSolution


class History(NamedTuple):
    """A solve, evaluation by evaluation.

    Attributes:
        residual: ‖T(x) − x‖ / ‖T(x)‖ at every evaluation of T, (E, B).
        psnr: of T(x) against the truth, in dB at the true range 2, (E, B); None without a truth.
        solution: what the solve found.
    """

    residual: Tensor
    psnr: Tensor | None
    solution: FixedPointSolution


@torch.no_grad()
def convergence_history(
    model: DEGrad, d: Tensor, x: Tensor | None = None, iterations: int = 300, x0: Tensor | None = None
) -> History:
    """The model's own solver run on with tol = 0: does it converge, and does quality stay once it has?

    The model is held still, and stays as it is: an averaging that is to be estimated is so for this alone. A sample
    that diverges keeps its last values.

    Args:
        model: a DE-GRAD.
        d: the measurements, (B, C, H, W).
        x: the truth, like d, in [−1, 1].
        iterations: evaluations of T.
        x0: the start; where None the model's own.
    """
    if model.averaging_is_due:
        model = copy.deepcopy(model)
        model.update_averaging(d, x0)
    residuals: list[Tensor] = []
    qualities: list[Tensor] = []

    def recorded(value: Tensor) -> Tensor:  # has captured d, so that no sample leaves the batch
        image = model.layer(value, d)
        residuals.append(flat(image - value).norm(dim=1) / flat(image).norm(dim=1))
        if x is not None:
            qualities.append(psnr(image, x))
        return image

    solver = replace(model.solver, tol=0.0, atol=0.0, max_iter=iterations)
    with fixed_map(model), materialised_weights(model):
        solution = solver.solve(recorded, model.start(d) if x0 is None else x0)
    empty = [d.new_zeros(0)]  # the solve of an empty batch evaluates nothing
    return History(torch.stack(residuals or empty), None if x is None else torch.stack(qualities or empty), solution)
