"""The networks that restore a tile of a photograph: what each was trained for, and what it takes to use it.

A network that is told its blur, by ``set_measurement(blur, noise)``, restores any photograph as it is. The networks
for a Gaussian of one kernel size were trained on images with known surroundings; `GaussianNetwork` makes up for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jfbfast.imaging.blurs import AUTO, AnyBlur, BlurChoice
from jfbfast.imaging.camera import Solve as RestoreTile
from jfbfast.imaging.report import Solve
from jfbfast.models.config import ANY_BLUR, ModelConfig
from jfbfast.models.implicit_network import ImplicitNetwork
from jfbfast.models.plug_and_play import PlugAndPlay
from jfbfast.models.pretrained import load_model, measurement_setting, set_network
from jfbfast.solvers import FixedPointSolution, FixedPointSolver, Status
from jfbfast.solvers.loop import TINY, Layer, norms

Watch = Callable[[int, float | None], object]

SOLVE_TOL = 3e-2  # of a network: 1e-3 takes half as many evaluations more, and changes the results by at most 0.02 dB


class Watched:
    """A solver that tells of each evaluation, and otherwise is the solver that it is made of.

    Args:
        solver: solves.
        evaluated: called with ‖T(x) − x‖ / ‖T(x)‖ after each evaluation of T, for a batch of one.
    """

    def __init__(self, solver: FixedPointSolver, evaluated: Callable[[float], object]) -> None:
        self.solver, self.evaluated = solver, evaluated
        self.tol, self.atol, self.max_iter = solver.tol, solver.atol, solver.max_iter

    def solve(self, layer: Layer, x0: Tensor, inputs: Sequence[Tensor] = (), **options: Any) -> FixedPointSolution:
        if (coarse := options.get("coarse")) is not None:
            options["coarse"] = self._watched(coarse)
        return self.solver.solve(self._watched(layer), x0, inputs, **options)

    def _watched(self, layer: Layer) -> Layer:
        def evaluate(x: Tensor, *inputs: Tensor) -> Tensor:
            f = layer(x, *inputs)
            residual, size = norms(x, f)
            self.evaluated(float(residual / size.clamp_min(TINY)))
            return f

        return evaluate


def unwatched(evaluation: int, residual: float | None) -> None:
    """Do nothing after an evaluation."""


class ChannelWise:
    """A network's restoration of one image at a time, with any number of channels.

    Args:
        model: maps measurements (1, C, h, w) to images; an `ImplicitNetwork` starts from the image that it is given.
        channels: the model's number; other images are restored channel by channel, as grey ones.
        watch: of `Restoration`.

    Attributes:
        solves: of the network.
    """

    def __init__(self, model: nn.Module, channels: int, watch: Watch) -> None:
        self.model, self.channels, self._watch = model, channels, watch
        self.solves: list[Solve] = []
        self._residuals: list[float] = []

    def _evaluated(self, residual: float) -> None:
        self._residuals.append(residual)
        self._watch(len(self._residuals), residual)

    def _solve(self, d: Tensor, start: Tensor | None) -> Tensor:
        if isinstance(self.model, PlugAndPlay):
            self.solves.append(Solve(self.model.steps))
            return self.model(d, callback=lambda step, _: self._watch(step, None))
        if not isinstance(self.model, ImplicitNetwork):
            return self.model(d)
        self._residuals.clear()
        solver, graph = self.model.solver, self.model.cuda_graph
        self.model.solver = Watched(solver, self._evaluated)  # type: ignore[assignment]  # it is used as one
        self.model.cuda_graph = False  # a solve that is replayed cannot be watched
        try:
            x, found = self.model(d, x0=start), self.model.solution
        finally:
            self.model.solver, self.model.cuda_graph = solver, graph
        assert found is not None
        residuals = *self._residuals, float(found.residual)
        self.solves.append(Solve(int(found.iterations), Status(int(found.status)).name, residuals))
        return x

    @torch.inference_mode()
    def __call__(self, d: Tensor, start: Tensor | None = None) -> Tensor:
        """Restore a measurement (1, C, h, w), from the image ``start`` or from the network's own start."""
        if d.shape[1] == self.channels:
            return self._solve(d, start)
        greys = []
        for channel in range(d.shape[1]):
            part, begin = (
                None if each is None else each[:, channel : channel + 1].expand(-1, self.channels, -1, -1).contiguous()
                for each in (d, start)
            )
            assert part is not None
            greys.append(self._solve(part, begin).mean(1, keepdim=True))
        return torch.cat(greys, dim=1)


class AnyBlurNetwork:
    """A network that can be set for any blur and noise level.

    Its form is "universal" or "plug-and-play": the method ``set_measurement(blur, noise)`` takes A with
    padding_mode="valid" (or "zeros"). The model maps d to the scene x, in the shape of Aᵀd.

    Args:
        name: of the network, for messages.
        model, config: as loaded. An `ImplicitNetwork` solves to a tolerance of `SOLVE_TOL`.
        watch: of `Restoration`.

    Attributes:
        extends: whether the photograph has to be extended beyond its edges.
    """

    extends = False

    def __init__(self, name: str, model: nn.Module, config: ModelConfig, watch: Watch = unwatched) -> None:
        self.name, self.model, self.config = name, model, config
        if isinstance(model, ImplicitNetwork):
            model.solver = replace(model.solver, tol=max(model.solver.tol, SOLVE_TOL))
        self._restore = ChannelWise(model, config.channels, watch)

    @property
    def solves(self) -> list[Solve]:
        """The solves since `prepare`."""
        return self._restore.solves

    def prepare(self, noise: float, blur: AnyBlur, warn: Callable[[str], object]) -> RestoreTile:
        """Set the network for this blur and noise level, and return its restoration of tiles.

        It warns of noise beyond the range of the network, and sets it for the most that it takes.
        """
        low, high = self.config.noise_range or (0.0, math.inf)
        if noise > high:
            warn(f"noise of {noise:.2g} is more than {self.name} was trained for; it restores for {high:g}")
        self.model.set_measurement(blur, min(max(noise, low), high))  # type: ignore[operator]  # a method
        self._restore.solves.clear()
        return self._restore


class GaussianNetwork:
    """A network for Gaussian blurs of one kernel size, such as those trained on faces with mid-grey surroundings.

    A photograph is a piece of a larger scene. So it is extended beyond its edges, and A reflects the extended image. A
    network that was trained with zeros beyond the edges expects images that darken towards them, as the blur A1 of a
    constant does, so it gets d · A1. It restores measurements that really have zeros beyond their edges as they are.

    Args:
        name, model, config: as of `AnyBlurNetwork`.
        given: kernel_size, sigma and noise, where None stands for the network's own value; and whether there are zeros
            beyond the edges: padding_mode "zeros", or any other one.
        say: called with a sentence if the network was trained for other measurements.
        watch: of `Restoration`.

    Raises:
        ValueError: a noise level other than the network's own.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        config: ModelConfig,
        given: Mapping[str, Any],
        say: Callable[[str], object],
        watch: Watch = unwatched,
    ) -> None:
        if given["noise"] not in (None, config.noise):
            raise ValueError(
                f"noise is {given['noise']}; {name} was trained for noise of {config.noise:g}, so it takes none"
            )
        zeros = given["padding_mode"] == "zeros"
        setting = measurement_setting({**given, "padding_mode": "zeros" if zeros else None}, [config])
        set_network(name, model, config, setting, say)
        self.name, self.model, self.config, self.setting = name, model, config, setting
        self.extends = not zeros and setting.padding_mode != "valid"
        self._dims = setting.blur() if self.extends else None
        self.choice = BlurChoice(sigma=setting.sigma, kernel_size=setting.kernel_size)
        self.blur = self.choice.operator("reflect" if self.extends else setting.padding_mode)
        self._restore = ChannelWise(model, config.channels, watch)

    @property
    def solves(self) -> list[Solve]:
        """The solves since `prepare`."""
        return self._restore.solves

    def prepare(self, noise: float, blur: AnyBlur, warn: Callable[[str], object]) -> RestoreTile:
        """Return the network's restoration of tiles; it is the same for every noise level."""
        self._restore.solves.clear()

        def solve(d: Tensor, start: Tensor | None) -> Tensor:
            if self._dims is not None:
                d = d * self._dims(torch.ones_like(d[:, :1]))
            return self._restore(d, start)

        return solve


def load_network(
    name: str,
    blur: BlurChoice | None,
    noise: float | str | None,
    padding_mode: str,
    device: torch.device,
    say: Callable[[str], object],
    watch: Watch = unwatched,
) -> AnyBlurNetwork | GaussianNetwork:
    """Load the network that a name or a file stands for, and set it for this blur and noise level.

    Args:
        name: a shipped network's name, or a network's file.
        blur: None for the network's own.
        noise: None for the network's own, or 0.01.
        padding_mode: "zeros", or any other one.
        device: where it is to restore.
        say: called with a sentence if the network was trained for other measurements.
        watch: of `Restoration`.

    Raises:
        CheckpointError: no such checkpoint.
        ValueError: a network that is not for this blur or noise level.
    """
    model, config = load_model(name)
    if config.form == "denoiser":
        raise ValueError(f"checkpoint is {name}, a denoiser alone; it takes a network that undoes blur")
    model = model.to(device)
    if config.form in ANY_BLUR:
        if blur is None:
            raise ValueError(f"the blur is not given; {name} takes one of sigma, psf, motion, defocus")
        return AnyBlurNetwork(name, model, config, watch)
    sigma = None if blur is None else blur.sigma
    if noise == AUTO:
        raise ValueError(f"noise is 'auto'; {name} takes a number, or none")
    if blur is not None and not isinstance(sigma, (int, float)):
        raise ValueError(f"the blur is {blur}; {name} is for Gaussian blurs with one σ")
    given = {"kernel_size": None if blur is None else blur.kernel_size, "sigma": sigma, "noise": noise}
    return GaussianNetwork(name, model, config, {**given, "padding_mode": padding_mode}, say, watch)
