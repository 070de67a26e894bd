"""Solvers of x = T(x; inputs), sample by sample, without gradients."""

from jfbfast.convergence import ConvergenceWarning
from jfbfast.solvers.anderson import Anderson
from jfbfast.solvers.base import FixedPointSolver
from jfbfast.solvers.broyden import Broyden
from jfbfast.solvers.estimate import InverseEstimate, LowRank
from jfbfast.solvers.loop import Iteration, Layer
from jfbfast.solvers.picard import Inertial, Picard
from jfbfast.solvers.solution import FixedPointSolution, Status

__all__ = [
    "Anderson",
    "Broyden",
    "ConvergenceWarning",
    "FixedPointSolution",
    "FixedPointSolver",
    "Inertial",
    "InverseEstimate",
    "Iteration",
    "Layer",
    "LowRank",
    "Picard",
    "Status",
]
