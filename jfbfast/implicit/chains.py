"""A Sequential as a solve and the application after it evaluate it: batch norms and ReLUs in the convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from jfbfast.implicit.frozen import NormalisedConv2d, grouped, parameters_of

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


class Step(NamedTuple):
    """One module of a Sequential as it is evaluated.

    Attributes:
        module: the module.
        norm: the batch norm that is folded into it, if any.
        parameters: the weight and the bias to convolve with, of a convolution; None to call the module.
        sources: the `tensors` of both from which they were computed.
        relu: whether a ReLU follows, which the convolution may apply.
        plain: whether it is a convolution that does nothing else, and so may add a tensor.
    """

    module: Any
    norm: nn.BatchNorm2d | None
    parameters: tuple[Tensor, Tensor | None] | None
    sources: list[Any]
    relu: bool
    plain: bool

    def apply(self, input: Any) -> Any:
        """Evaluate the module and the norm, but not the ReLU."""
        if self.parameters is None:
            return self.module(input)
        if any(a is not b for a, b in zip(self.sources, tensors(self.module, self.norm), strict=True)):
            # The layer replaces them while it runs, by torch.func.functional_call for example.
            out = self.module(input)
            return out if self.norm is None else self.norm(out)
        return self.module._conv_forward(input, *self.parameters)


def steps(
    sequential: nn.Sequential,
    pairs: dict[nn.Conv2d, nn.BatchNorm2d],
    parameters_of_pairs: dict[Pair, tuple[Tensor, Tensor]],
) -> list[Step]:
    """The members of a Sequential with batch norms folded, and ReLUs fused, into the convolutions before."""
    members = [m for m in sequential._modules.values() if m is not None]
    found = []
    while members:
        module, *members = members
        parameters: tuple[Tensor, Tensor | None] | None = None
        plain, relu = isinstance(module, nn.Conv2d) and _plain_convolution(module), False
        norm: nn.BatchNorm2d | None = None
        if plain:
            if module in pairs and (module, pairs[module]) in parameters_of_pairs:
                norm, members = pairs[module], members[1:]
                parameters = parameters_of_pairs[module, norm]
            elif isinstance(module, NormalisedConv2d):  # which another thread may release
                parameters = weight_of(module), module.bias
            relu = bool(members) and type(members[0]) is nn.ReLU and _plain(members[0])
            members = members[relu:]
        sources = tensors(module, norm) if parameters is not None and isinstance(module, nn.Conv2d) else []
        found.append(Step(module, norm, parameters, sources, relu, plain))
    return found


def tensors(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> list[Any]:
    """The tensors of a convolution, and of the batch norm behind it."""
    own = [held.get(name) for held in (conv._parameters, vars(conv)) for name in ("weight", "bias")]
    return own if norm is None else [*own, *norm._parameters.values(), *norm._buffers.values()]


def foldable_pairs(sequential: nn.Sequential) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """The convolutions of a Sequential that a batch norm in eval() follows, which can be folded into them.

    A convolution that occurs twice stays as it is.
    """
    members = list(sequential._modules.values())
    return {
        conv: norm
        for conv, norm in pairwise(members)
        if type(norm) is nn.BatchNorm2d
        and isinstance(conv, nn.Conv2d)
        and norm.running_mean is not None
        and _plain(norm)
        and _plain_convolution(conv)
        and members.count(conv) == 1
        and all(p.dtype == norm.running_mean.dtype for p in parameters_of(conv))
    }


def folded(pairs: list[Pair]) -> dict[Pair, tuple[Tensor, Tensor]]:
    """The weight and the bias of each convolution with the batch norm behind it; pairs alike are folded together."""
    weights = {conv: weight_of(conv) for conv, _ in pairs}
    found: dict[Pair, tuple[Tensor, Tensor]] = {}

    def kind(pair: Pair) -> tuple[Any, ...]:
        conv, norm = pair
        weight, none = weights[conv], [t is None for t in (conv.bias, norm.weight, norm.bias)]
        return weight.shape, weight.dtype, weight.device, norm.eps, *none

    for group in grouped(pairs, kind):
        convolutions, norms = zip(*group, strict=True)
        conv, norm = group[0]
        scale = torch.rsqrt(_stacked(norms, "running_var") + norm.eps)
        scale = scale if norm.weight is None else scale * _stacked(norms, "weight")
        mean = _stacked(norms, "running_mean")
        shift = -mean if conv.bias is None else _stacked(convolutions, "bias") - mean
        shift = shift * scale if norm.bias is None else torch.addcmul(_stacked(norms, "bias"), shift, scale)
        weight = torch.stack([weights[conv] for conv in convolutions]) * scale[:, :, None, None, None]
        found.update(zip(group, zip(weight, shift, strict=True), strict=True))
    return found


def _stacked(modules: Sequence[nn.Module], name: str) -> Tensor:
    """The modules' tensors of one name, in one tensor (modules, …)."""
    return torch.stack([getattr(module, name) for module in modules])


def _plain_convolution(conv: nn.Conv2d) -> bool:
    """Whether calling a convolution does nothing but convolve with its weight, which may be computed."""
    return (
        _plain(conv)
        and type(conv)._conv_forward is nn.Conv2d._conv_forward
        and type(conv).forward in (nn.Conv2d.forward, NormalisedConv2d.forward)
    )


def _plain(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    return "forward" not in vars(module) and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def weight_of(conv: nn.Conv2d) -> Any:
    """The weight that a convolution uses; None where a class of a user's has none."""
    return conv.current_weight() if isinstance(conv, NormalisedConv2d) else getattr(conv, "weight", None)


def initialised(weight: Any) -> bool:
    """Whether it is a tensor that has its shape, unlike those of torch's lazy modules."""
    return isinstance(weight, Tensor) and not isinstance(weight, UninitializedTensorMixin)
