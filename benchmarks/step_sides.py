"""The sides of the benchmark `step`: one training step by jfbfast, and as users write or call it today."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jfbfast import Anderson, GaussianBlur, Implicit, backend, fixed_point
from jfbfast.backends import reference
from jfbfast.implicit.frozen import NormalisedConv2d, materialised_weights
from jfbfast.models.red import log_parameter
from jfbfast.operators import inverse

from . import rivals
from .problem import Problem, batch_norms, model
from .report import OURS

OURS_LOW, PUBLISHED = "jfbfast, solve in bf16", "published loop"
OURS_GRAPH = f"{OURS}, CUDA graph"
CG, GMRES = f"{OURS}, CG", f"{OURS}, GMRES"

TOL = 1e-3  # the default; our layer is prepared for it
_REGULARIZATION = 1e-10  # of the rivals' Gram matrices; their default of 1e-4 needs more evaluations


@dataclass(frozen=True)
class Side:
    """One way to take a training step."""

    forward: Callable[[int], Tensor]  # restores with so many evaluations, and one more with its gradient
    parameters: list[nn.Parameter]  # those that get a gradient
    least: int = 1  # the least number of evaluations that this side can take
    batch_statistics: bool = False  # whether its layer normalises by the current batch
    context: Callable[[], AbstractContextManager[None]] = nullcontext  # entered for a whole step

    def step(self, x: Tensor, evaluations: int) -> None:
        """Forward, mean squared error against x, backward; waits for the device."""
        for parameter in self.parameters:
            parameter.grad = None
        with self.context():
            F.mse_loss(self.forward(evaluations), x).backward()
        if x.is_cuda:
            torch.cuda.synchronize()


class Counted(Anderson):
    """Anderson's method with exactly ``max_iter`` evaluations; the tolerance only decides how the layer is prepared.

    A solve that does not verify the coarse layer's solution evaluates only the coarse layer.
    """

    def solve(
        self, layer: Any, x0: Tensor, inputs: Any = (), *, coarse: Any = None, verify: bool = True, **options: Any
    ) -> Any:
        if coarse is not None and not verify:
            layer, coarse = coarse, None
        exactly = replace(self, tol=0.0)
        return super(Counted, exactly).solve(layer, x0, inputs, coarse=coarse, verify=verify, **options)


class UsersLayer(nn.Module):
    """T(x; d) in plain PyTorch, in the form that takes least work.

    With RED and P = (AᵀA + λI)⁻¹ the preconditioned layer is P(Aᵀd + λD(x)). Aᵀd is computed once per solve, and so
    is z = P Aᵀd if D takes z beside x. No rival offers P for zero padding: an FFT is exact only for circular padding,
    and conjugate gradients cost several blurs. So the rivals get our definition of P: four matrix products by the
    singular vectors of the two band matrices.

    Args:
        given: the problem.
        published: keep images and weights NCHW and the network in train(), so that spectral norms advance at each
            evaluation and batch norms normalise by the batch. Otherwise the network is in eval() and channels-last,
            and computes its spectral norms once per solve, like `torchdeq.norm`.
    """

    def __init__(self, given: Problem, published: bool = False) -> None:
        super().__init__()
        weights, d = given.weights, given.d
        self.given = given
        self.format = torch.contiguous_format if published else torch.channels_last
        self.denoiser = copy.deepcopy(weights.denoiser).to(memory_format=self.format).train(published)
        self.log_weight = log_parameter("weight", weights.weight)
        if given.layer == "paper":
            self.log_step_size = log_parameter("step_size", 1.0)
        self.normalised = not published and any(isinstance(m, NormalisedConv2d) for m in self.modules())
        self.fixed = ExitStack()  # holds the normalised weights during a solve
        self.injection = bool(getattr(self.denoiser, "injection", False))
        self.z: tuple[Tensor, ...] | None = None  # kept during a solve
        self.blur = rivals.conv2d(weights.kernel_size, weights.sigma, d.contiguous(memory_format=self.format))
        taps = GaussianBlur(weights.kernel_size, weights.sigma).taps
        self.factors = inverse.factors(taps, (d.shape[-2], d.shape[-1]), d.dtype, d.device)
        self.to(d.device, d.dtype)

    @torch.no_grad()
    def start(self) -> tuple[Tensor, Tensor]:
        """Begin a solve: return its start and the layer's other input, which is d, or Aᵀd with P.

        Spectral norms and z are computed here and kept until the evaluation with the gradient.
        """
        d = self.given.d
        adjoint = self.blur(d.contiguous(memory_format=self.format))
        x0, beside = (adjoint, d) if self.given.layer == "paper" else (self.solve(adjoint), adjoint)
        if self.normalised:
            self.fixed.enter_context(materialised_weights(self))
        self.z = self.restored(beside)
        return x0, beside

    def release(self) -> None:
        """Compute spectral norms and z at each evaluation again."""
        self.fixed.close()
        self.z = None

    def evaluate(self, x: Tensor, beside: Tensor) -> Tensor:
        """T(x); the evaluation with the gradient computes spectral norms and z again."""
        if torch.is_grad_enabled():
            self.release()
        return self(x, beside)

    def solve(self, b: Tensor) -> Tensor:
        """P b."""
        return reference.tikhonov(b, self.log_weight.exp(), *self.factors)

    def restored(self, beside: Tensor) -> tuple[Tensor, ...]:
        """(z,), or () if D takes no z."""
        return (self.solve(self.blur(beside) if self.given.layer == "paper" else beside),) if self.injection else ()

    def denoise(self, x: Tensor, beside: Tensor) -> Tensor:
        """D(x), or D(x, z)."""
        z = self.restored(beside) if self.z is None else self.z
        with self.given.autocast():
            return self.denoiser(x, *z).to(x.dtype)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self.format)
        weight = self.log_weight.exp()
        if self.given.layer == "paper":
            residual = self.blur(self.blur(x) - beside)
            return x - self.log_step_size.exp() * (residual + weight * (x - self.denoise(x, beside)))
        seen = x - weight * self.solve(x) if self.given.layer == "filtered" else x
        return self.solve(beside + weight * self.denoise(seen, beside))


Run = Callable[[Callable[[Tensor], Tensor], Tensor, int], Tensor]  # layer, start, evaluations → restored images


def _users_side(given: Problem, run: Run, published: bool = False, least: int = 1) -> Side:
    users = UsersLayer(given, published)

    def forward(evaluations: int) -> Tensor:
        x0, beside = users.start()
        return run(lambda x: users.evaluate(x, beside), x0, evaluations)

    return Side(forward, list(users.parameters()), least, published and bool(batch_norms(users)))


def published(given: Problem) -> Side:
    """The paper's published loop: its Anderson, its network in train(), its zero-padded depthwise blur."""

    def run(layer: rivals.Layer, x0: Tensor, evaluations: int) -> Tensor:
        with torch.no_grad():
            x = rivals.gilton_anderson(layer, x0, 5, evaluations)
        return layer(x)

    return _users_side(given, run, published=True)


def torchdeq(given: Problem) -> Side:
    """`torchdeq.get_deq` with its Anderson (with its own memory of 6) and the gradient of one step."""
    deq = import_module("torchdeq").get_deq(
        core="sliced", f_solver="anderson", f_tol=0.0, f_stop_mode="rel", ift=False, grad=1, tau=1.0
    )

    def run(layer: rivals.Layer, x0: Tensor, evaluations: int) -> Tensor:
        return deq(layer, x0, solver_kwargs={"f_max_iter": evaluations, "lam": _REGULARIZATION})[0][-1]

    return _users_side(given, run, least=2)


def deepinv(given: Problem) -> Side:
    """`deepinv.optim.BaseOptim` as a Jacobian-free DEQ, with its Anderson; its default damping converges later."""
    optim = import_module("deepinv.optim")
    configs = optim.optimizers
    layers: list[rivals.Layer] = []

    class LayerIteration(nn.Module):
        cost_fn, has_cost = None, False

        def forward(self, X: dict[str, Any], *_: Any) -> dict[str, Any]:
            return {"est": (layers[-1](X["est"][0]),), "cost": None}

    deq = configs.BaseOptim(
        LayerIteration(),
        params_algo={},
        prior=optim.Prior(),
        trainable_params=[],
        early_stop=False,
        DEQ=configs.DEQConfig(jacobian_free=True),
        anderson_acceleration=configs.AndersonAccelerationConfig(history_size=5, beta=1.0, eps=_REGULARIZATION),
    )

    def run(layer: rivals.Layer, x0: Tensor, evaluations: int) -> Tensor:
        layers[:] = [layer]
        deq.fixed_point.max_iter = evaluations
        return deq(x0, None, init=x0)

    return _users_side(given, run)


def compiled(given: Problem) -> Side:
    """The layer in plain PyTorch under torch.compile, solved by our Anderson in plain PyTorch."""
    users = UsersLayer(given)
    whole = torch.compile(users, dynamic=False)

    def forward(evaluations: int) -> Tensor:
        x0, beside = users.start()
        users.release()  # the compiled layer is also the one with the gradient
        return fixed_point(whole, x0, inputs=(beside,), solver=Anderson(tol=0.0, max_iter=evaluations))

    return Side(forward, list(users.parameters()), context=partial(backend, "reference"))


def ours(given: Problem, kernels: str = "auto", **options: Any) -> Side:
    """`DEGrad` as a user calls it; ``options`` as there."""
    net = model(given, **options).train()

    def forward(evaluations: int) -> Tensor:
        net.solver = Counted(tol=TOL, max_iter=evaluations)
        with given.autocast():
            return net(given.d)

    return Side(forward, list(net.parameters()), context=partial(backend, kernels))


def sides(
    given: Problem, missing: Collection[str] = (), compiling: bool = False, exact: bool = False
) -> dict[str, Callable[[], Side]]:
    """What makes each side, by its name; jfbfast is the first.

    ``missing`` names the libraries to leave out, "torchdeq" or "deepinv". ``compiling`` adds the sides that use
    torch.compile. ``exact`` adds the exact gradient instead of JFB, by solving with (I − ∂T/∂x)ᵀ; the paper solves
    the normal equations by CG.
    """
    every: dict[str, Callable[[], Side]] = {
        OURS: partial(ours, given),
        OURS_LOW: partial(ours, given, solve_dtype=torch.bfloat16),
        OURS_GRAPH: partial(ours, given, cuda_graph=True),
        f"{OURS}, compiled": partial(ours, given, compile_solve=True),
        "PyTorch": partial(ours, given, kernels="reference"),
        "PyTorch, compiled": partial(compiled, given),
        PUBLISHED: partial(published, given),
        "TorchDEQ": partial(torchdeq, given),
        "deepinv": partial(deepinv, given),
        CG: partial(ours, given, gradient=Implicit("cg")),
        GMRES: partial(ours, given, gradient=Implicit("gmres")),
    }
    out = {name for name in every if name.lower() in missing}
    out |= {OURS_LOW} if given.half else set()
    out |= set() if given.d.is_cuda else {OURS_GRAPH}
    out |= set() if compiling else {f"{OURS}, compiled", "PyTorch, compiled"}
    out |= set() if exact else {CG, GMRES}
    return {name: make for name, make in every.items() if name not in out}
