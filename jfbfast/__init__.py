"""Implicit networks that undo image blur, trained by Jacobian-free backpropagation.

Example:
    >>> import torch, jfbfast
    >>> blur = jfbfast.GaussianBlur(kernel_size=5, sigma=1.0)
    >>> denoiser = jfbfast.NonexpansiveDenoiser(channels=3, features=4, depth=2)
    >>> regularizer = jfbfast.RED(denoiser, filter_damping="weight")
    >>> model = jfbfast.DEGrad(blur, regularizer, preconditioner="exact")
    >>> restored = model(blur(torch.rand(1, 3, 16, 16)))  # a solve without gradients, and one layer
    >>> restored.sum().backward()  # through that one layer
    >>> model.solution.status  # of each sample: 0 is Status.CONVERGED
    tensor([0])
"""

from importlib.metadata import PackageNotFoundError, version

from jfbfast import diagnostics, spectrum
from jfbfast.backends.dispatch import backend
from jfbfast.config import keep_freed_memory, show_config
from jfbfast.experiments.training import train
from jfbfast.imaging.classical import direct_inverse, gradient_descent, tikhonov, tv
from jfbfast.imaging.estimation import Estimate, estimate
from jfbfast.imaging.restoration import restore
from jfbfast.implicit.fixed_point import fixed_point, solve_fixed_point
from jfbfast.implicit.methods import JFB, GradientMethod, Implicit, Neumann, Phantom, Shine, Unrolled
from jfbfast.models.deadmm import DEADMM
from jfbfast.models.degrad import DEGrad
from jfbfast.models.denoisers import DnCNN, NonexpansiveDenoiser, freeze_statistics
from jfbfast.models.deprox import DEProx
from jfbfast.models.implicit_network import ImplicitNetwork
from jfbfast.models.inference import inference_module
from jfbfast.models.penalty import jacobian_penalty
from jfbfast.models.plug_and_play import PlugAndPlay
from jfbfast.models.pretrained import pretrained_names
from jfbfast.models.red import RED
from jfbfast.models.unet import UNet
from jfbfast.models.universal import UniversalDEGrad
from jfbfast.operators import data_fidelity, point_spread
from jfbfast.operators.adjoint_check import check_adjoint
from jfbfast.operators.blur import GaussianBlur, SeparableBlur
from jfbfast.operators.convolution import Blur
from jfbfast.operators.iterative import IterativeOperator
from jfbfast.solvers import (
    Anderson,
    Broyden,
    ConvergenceWarning,
    FixedPointSolution,
    FixedPointSolver,
    Inertial,
    Picard,
    Status,
)
from jfbfast.solvers.warm_start import WarmStart

try:
    __version__ = version("jfbfast")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "DEADMM",
    "JFB",
    "RED",
    "Anderson",
    "Blur",
    "Broyden",
    "ConvergenceWarning",
    "DEGrad",
    "DEProx",
    "DnCNN",
    "Estimate",
    "FixedPointSolution",
    "FixedPointSolver",
    "GaussianBlur",
    "GradientMethod",
    "Implicit",
    "ImplicitNetwork",
    "Inertial",
    "IterativeOperator",
    "Neumann",
    "NonexpansiveDenoiser",
    "Phantom",
    "Picard",
    "PlugAndPlay",
    "SeparableBlur",
    "Shine",
    "Status",
    "UNet",
    "UniversalDEGrad",
    "Unrolled",
    "WarmStart",
    "backend",
    "check_adjoint",
    "data_fidelity",
    "diagnostics",
    "direct_inverse",
    "estimate",
    "fixed_point",
    "freeze_statistics",
    "gradient_descent",
    "inference_module",
    "jacobian_penalty",
    "keep_freed_memory",
    "point_spread",
    "pretrained_names",
    "restore",
    "show_config",
    "solve_fixed_point",
    "spectrum",
    "tikhonov",
    "train",
    "tv",
]
