"""The sides of the end-to-end benchmark: one training step by jfbfast and by what users write, or call, today."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jfbfast import Anderson, Implicit, backend, fixed_point
from jfbfast.backends import reference
from jfbfast.implicit.frozen import NormalisedConv2d
from jfbfast.models.red import log_parameter
from jfbfast.operators import inverse
from jfbfast.operators.blur import GaussianBlur
from jfbfast.operators.tables import Taps

from . import rivals
from .problem import Problem, has_batch_statistics, model

OURS, OURS_LOW, PUBLISHED = "jfbfast", "jfbfast, solve in bf16", "published loop"

TOL = 1e-3  # that our layer is prepared for, the default
_REGULARIZATION = 1e-10  # of the others' Gram matrices: of 1e-4, their default, to 1e-10 it takes fewest evaluations

See = Callable[[Tensor], None] | None  # is shown the layer's value at each evaluation of a solve


@dataclass(frozen=True)
class Side:
    """One way to take a training step.

    Attributes:
        forward: the restored images after so many evaluations of the layer, and once more with its gradient.
        parameters: what gets a gradient.
        least: evaluations.
        batch_statistics: whether its map normalises by the batch at hand.
        context: within which a whole step is taken.
    """

    forward: Callable[[int, See], Tensor]
    parameters: list[nn.Parameter]
    least: int = 1
    batch_statistics: bool = False
    context: Callable[[], AbstractContextManager[None]] = nullcontext

    def step(self, x: Tensor, evaluations: int) -> None:
        """Forward, mean squared error against x, backward."""
        for parameter in self.parameters:
            parameter.grad = None
        with self.context():
            F.mse_loss(self.forward(evaluations, None), x).backward()
        if x.is_cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Watched(Anderson):
    """Anderson's method that takes ``max_iter`` evaluations whatever its tolerance, and shows each value of the layer.

    The layer is prepared for the tolerance. Where the coarse layer's word is taken, all evaluations are of that one.
    """

    see: See = None

    def solve(
        self, layer: Any, x0: Tensor, inputs: Any = (), *, coarse: Any = None, verify: bool = True, **options: Any
    ) -> Any:
        if coarse is not None and not verify:
            layer, coarse = coarse, None
        if self.see is not None:
            layer, coarse = _shown(layer, self.see), None if coarse is None else _shown(coarse, self.see)
        exactly = replace(self, tol=0.0)
        return super(Watched, exactly).solve(layer, x0, inputs, coarse=coarse, verify=verify, **options)


def _shown(layer: Callable[..., Tensor], see: See) -> Callable[..., Tensor]:
    def shown(*arguments: Tensor) -> Tensor:
        f = layer(*arguments)
        if see is not None:
            see(f)
        return f

    return shown


def autocast(x: Tensor, half: bool) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=half)


class UsersLayer(nn.Module):
    """T(x; d) in plain PyTorch, in the form that takes least work.

    With RED and P = (AᵀA + λI)⁻¹ the preconditioned layer is P(Aᵀd + λD(x)). Its Aᵀd is computed once a
    solve, and so is z = P Aᵀd, where D takes that beside x. No rival offers P for zeros beyond the edge: an
    FFT is exact for circular padding alone, and conjugate gradients cost several blurs. So they get the
    definition of ours, in four products by the singular vectors of the two band matrices, by torch.matmul.

    Args:
        half: the denoiser, and it alone, runs under bfloat16 autocast.
        published: images and weights stay NCHW and the network in train(): its spectral norms step at each
            evaluation and its batch norms normalise by the batch. Else it is in eval(), channels-last, and
            its spectral norms are computed once a solve, as `torchdeq.norm` does.
    """

    def __init__(self, given: Problem, layer: str, half: bool, published: bool = False) -> None:
        super().__init__()
        weights, d = given.weights, given.d
        self.kind, self.low_precision = layer, half
        self.format = torch.contiguous_format if published else torch.channels_last
        self.denoiser = copy.deepcopy(weights.denoiser).to(memory_format=self.format).train(published)
        self.log_weight = log_parameter("weight", weights.weight)
        if layer == "paper":
            self.log_step_size = log_parameter("step_size", 1.0)
        self.norms = [] if published else [m for m in self.modules() if isinstance(m, NormalisedConv2d)]
        self.injection = bool(getattr(self.denoiser, "injection", False))
        self.restoration: Tensor | None = None
        self.blur = rivals.conv2d(weights.kernel_size, weights.sigma, d.contiguous(memory_format=self.format))
        taps: Taps = GaussianBlur(weights.kernel_size, weights.sigma).taps
        self.factors = inverse.factors(taps, (d.shape[-2], d.shape[-1]), d.dtype, d.device)
        self.to(d.device, d.dtype)

    def start(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Where the solve starts, and what the layer takes beside x: d, or Aᵀd."""
        with torch.no_grad():
            adjoint = self.blur(d.contiguous(memory_format=self.format))
            return (adjoint, d) if self.kind == "paper" else (self.solve(adjoint), adjoint)

    def solve(self, b: Tensor) -> Tensor:
        """P b."""
        return reference.tikhonov(b, self.log_weight.exp(), *self.factors)

    def denoise(self, x: Tensor, given: Tensor) -> Tensor:
        """D(x), or D(x, z)."""
        injected = self.injected(given)
        with autocast(x, self.low_precision):
            return self.denoiser(x, *injected).to(x.dtype)

    def injected(self, given: Tensor) -> tuple[Tensor, ...]:
        """(z,), or () without an injection."""
        if not self.injection:
            return ()
        if self.restoration is not None:
            return (self.restoration,)
        return (self.solve(self.blur(given) if self.kind == "paper" else given),)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self.format)
        weight = self.log_weight.exp()
        if self.kind == "paper":
            residual = self.blur(self.blur(x) - given)
            return x - self.log_step_size.exp() * (residual + weight * (x - self.denoise(x, given)))
        seen = x - weight * self.solve(x) if self.kind == "filtered" else x
        return self.solve(given + weight * self.denoise(seen, given))

    @torch.no_grad()
    def hold(self, given: Tensor) -> None:
        """Compute the spectral norms' weights and z now, for a whole solve."""
        for conv in self.norms:
            conv.materialise()
        self.restoration = next(iter(self.injected(given)), None)

    def release(self) -> None:
        """Compute them at each evaluation again."""
        for conv in self.norms:
            conv.release()
        self.restoration = None


Solve = Callable[[Callable[[Tensor], Tensor], Tensor, int], Tensor]


def _by_loop(given: Problem, layer: str, half: bool, solve: Solve, published: bool = False) -> Side:
    """A solve without gradients, then the layer with its gradient."""
    users = UsersLayer(given, layer, half, published)

    def forward(evaluations: int, see: See) -> Tensor:
        x0, beside = users.start(given.d)
        with torch.no_grad():
            users.hold(beside)
            x = solve(_shown(lambda x: users(x, beside), see), x0, evaluations)
        users.release()
        return users(x, beside)

    coupled = published and has_batch_statistics(users)
    return Side(forward, list(users.parameters()), batch_statistics=coupled)


def published(given: Problem, layer: str, half: bool) -> Side:
    """The paper's published loop: its Anderson, its network in train(), its zero-padded depthwise blur."""
    return _by_loop(given, layer, half, lambda f, x0, k: rivals.gilton_anderson(f, x0, 5, k), published=True)


def torchdeq(given: Problem, layer: str, half: bool) -> Side:
    """`torchdeq.get_deq` with its Anderson (its own memory of 6) and the gradient of one step.

    Its default regularisation, which does not scale with the residuals, keeps it from small errors.
    """
    deq = import_module("torchdeq").get_deq(
        core="sliced", f_solver="anderson", f_tol=0.0, f_stop_mode="rel", ift=False, grad=1, tau=1.0
    )
    users = UsersLayer(given, layer, half)

    def forward(evaluations: int, see: See) -> Tensor:
        x0, beside = users.start(given.d)
        users.hold(beside)

        def f(x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                users.release()
                return users(x, beside)
            return _shown(users, see)(x, beside)

        return deq(f, x0, solver_kwargs={"f_max_iter": evaluations, "lam": _REGULARIZATION})[0][-1]

    return Side(forward, list(users.parameters()), least=2)


def deepinv(given: Problem, layer: str, half: bool) -> Side:
    """`deepinv.optim.BaseOptim` as a DEQ, Jacobian-free, with its Anderson at a memory of 5, undamped.

    Its own damping and regularisation, 0.9 and 0.1, converge later.
    """
    optim = import_module("deepinv.optim")
    optimizers = optim.optimizers
    users = UsersLayer(given, layer, half)
    watcher: list[See] = [None]

    class LayerIteration(nn.Module):
        cost_fn, has_cost = None, False

        def forward(self, X: Mapping[str, Any], data: Any, prior: Any, params: Any, beside: Tensor, *_: Any) -> Any:
            if torch.is_grad_enabled():
                users.release()
                f = users(X["est"][0], beside)
            else:
                f = _shown(users, watcher[0])(X["est"][0], beside)
            return {"est": (f,), "cost": None}

    deq = optimizers.BaseOptim(
        LayerIteration(),
        params_algo={},
        prior=optim.Prior(),
        trainable_params=[],
        early_stop=False,
        DEQ=optimizers.DEQConfig(jacobian_free=True),
        anderson_acceleration=optimizers.AndersonAccelerationConfig(history_size=5, beta=1.0, eps=_REGULARIZATION),
    )

    def forward(evaluations: int, see: See) -> Tensor:
        x0, beside = users.start(given.d)
        watcher[0] = see
        deq.fixed_point.max_iter = evaluations
        users.hold(beside)
        return deq(beside, None, init=x0)

    return Side(forward, list(users.parameters()))


def compiled(given: Problem, layer: str, half: bool) -> Side:
    """The layer in plain PyTorch by torch.compile, under our solver's pure-PyTorch path."""
    users = UsersLayer(given, layer, half)
    whole = torch.compile(users, dynamic=False)

    def forward(evaluations: int, see: See) -> Tensor:
        x0, beside = users.start(given.d)
        solver = Watched(tol=0.0, max_iter=evaluations, see=see)
        return fixed_point(whole, x0, inputs=(beside,), solver=solver)

    return Side(forward, list(users.parameters()), context=partial(backend, "reference"))


def ours(given: Problem, layer: str, half: bool, kernels: str = "auto", **options: Any) -> Side:
    """`DEGrad`, as a user calls it; ``options`` as there."""
    net = model(given, layer, **options).train()

    def forward(evaluations: int, see: See) -> Tensor:
        net.solver = Watched(tol=TOL, max_iter=evaluations, see=see)
        with autocast(given.d, half):
            return net(given.d)

    return Side(forward, list(net.parameters()), context=partial(backend, kernels))


def sides(
    given: Problem, layer: str, half: bool, missing: set[str], compile_: bool = False
) -> Iterator[tuple[str, Callable[[], Side]]]:
    """Every side that is installed, ours first: its name, and what makes it."""
    yield OURS, partial(ours, given, layer, half)
    if not half:
        yield OURS_LOW, partial(ours, given, layer, half, solve_dtype=torch.bfloat16)
    if compile_:
        yield f"{OURS}, compiled", partial(ours, given, layer, half, compile_solve=True)
    yield "PyTorch", partial(ours, given, layer, half, kernels="reference")
    if compile_:
        yield "PyTorch, compiled", partial(compiled, given, layer, half)
    yield PUBLISHED, partial(published, given, layer, half)
    if "torchdeq" not in missing:
        yield "TorchDEQ", partial(torchdeq, given, layer, half)
    if "deepinv" not in missing:
        yield "deepinv", partial(deepinv, given, layer, half)


def jacobian_sides(given: Problem, layer: str) -> Iterator[tuple[str, Callable[[], Side]]]:
    """The exact gradient in place of JFB's, by solving with (I − ∂T/∂x)ᵀ; the paper's is CG on the normal equations."""
    for method in (Implicit("cg"), Implicit("gmres")):
        yield f"{OURS}, {method.solver.upper()}", partial(ours, given, layer, False, gradient=method)
