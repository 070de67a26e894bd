"""A layer on states of any structure, as a layer on real tensors (B, N)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jfbfast.backends.tensors import compute_dtype
from jfbfast.implicit.frozen import owner
from jfbfast.solvers import FixedPointSolution
from jfbfast.solvers.loop import TINY, norms
from jfbfast.solvers.states import Packing, is_plain

Callback = Callable[[int, Any, Tensor], object]


class StateLayer:
    """A layer T(x, *inputs) in the form that the solvers take: real tensors (B, N) and tensors as inputs.

    Args:
        layer: T, which takes and returns a state, and returns (state, aux) if ``has_aux``.
        packing: of the states; None for a state that is one real tensor.
        inputs: the structure of the layer's inputs.
        has_aux: whether the layer returns auxiliary outputs.
        batch: B, the size of the whole batch.
        callback: called after each evaluation on the whole batch, as in `fixed_point`.

    Attributes:
        aux: the auxiliary outputs of the last evaluation on the whole batch, without gradients.
    """

    def __init__(
        self,
        layer: Callable[..., Any],
        packing: Packing | None,
        inputs: pytree.TreeSpec,
        batch: int,
        has_aux: bool = False,
        callback: Callback | None = None,
    ) -> None:
        self.__self__ = owner(layer)  # by which `owner` finds the module whose parameters get a gradient
        self.layer, self.packing, self.inputs, self.batch = layer, packing, inputs, batch
        self.has_aux, self.callback = has_aux, callback
        self.aux: Any = None
        self.evaluations = 0

    def __call__(self, x: Tensor, *inputs: Tensor) -> Tensor:
        found = self.layer(self.unpacked(x), *self.inputs.unflatten(inputs))
        if self.has_aux:
            if not isinstance(found, tuple) or len(found) != 2:
                raise TypeError(
                    f"has_aux is True and the layer returns a {type(found).__name__}; it takes (state, aux)"
                )
            found, aux = found
            if len(x) == self.batch:
                self.aux = _detached(aux)
        image: Tensor = found if self.packing is None else self.packing.pack(found, "what the layer returns")
        if self.callback is not None and len(x) == self.batch:
            self._call_back(self.callback, x.detach(), image)
        return image

    @property
    def watched(self) -> bool:
        """Whether the user sees something of each evaluation, for which the batch stays whole."""
        return self.has_aux or self.callback is not None

    def unpacked(self, x: Tensor) -> Any:
        """The state of a tensor that the solvers work on."""
        return x if self.packing is None else self.packing.unpack(x)

    @torch.no_grad()
    def _call_back(self, callback: Callback, x: Tensor, image: Tensor) -> None:
        self.evaluations += 1
        residual, size = norms(x, image.detach())
        callback(
            self.evaluations, self.unpacked(x.clone()), (residual / size.clamp_min(TINY)).to(compute_dtype(x.dtype))
        )


class Packed(NamedTuple):
    """A fixed-point problem as the solvers take it: x = layer(x, *inputs) from ``start``, real tensors (B, …).

    Attributes:
        states: the layer, where the problem had to be packed; None where it is as it was given.
    """

    layer: Callable[..., Tensor]
    start: Tensor
    inputs: tuple[Tensor, ...]
    states: StateLayer | None = None

    def pack(self, state: Any, name: str) -> Any:
        """A state like the start, such as a point or a cotangent, in the form of ``start``."""
        packing = None if self.states is None else self.states.packing
        return state if packing is None else packing.pack(state, name)

    def unpack(self, x: Any) -> Any:
        """The state of a tensor in the form of ``start``."""
        return x if self.states is None else self.states.unpacked(x)

    def of_states(self, solution: FixedPointSolution) -> FixedPointSolution:
        """The solution with the user's states, and the auxiliary outputs of the last evaluation."""
        if self.states is None:
            return solution
        following = solution.following
        return solution._replace(
            value=self.unpack(solution.value),
            following=None if following is None else self.unpack(following),
            aux=self.states.aux,
        )


def packed(
    layer: Callable[..., Any],
    x0: Any,
    inputs: Sequence[Any] = (),
    *,
    has_aux: bool = False,
    callback: Callback | None = None,
) -> Packed:
    """Pack a problem whose state or inputs have a structure; any other is left as it is.

    Args:
        layer: T(x, *inputs); returns (state, aux) if ``has_aux``.
        x0: the start: a tensor (B, …), real or complex, or a structure of them (`Packing`).
        inputs: tensors (B, …), or structures of them.
        has_aux, callback: as in `fixed_point`.

    Raises:
        TypeError, ValueError: as `Packing`; an input's leaf that is no tensor.
    """
    if isinstance(inputs, Tensor):
        raise TypeError("inputs is a tensor; it takes a sequence of tensors, such as inputs=(d,)")
    given = tuple(inputs)
    structured = not all(isinstance(value, Tensor) for value in given)
    plain = is_plain(x0)
    if plain and not structured and not has_aux and callback is None:
        return Packed(layer, x0, given)
    paths, structure = pytree.tree_flatten_with_path(given)
    for path, leaf in paths:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"inputs{pytree.keystr(path)} is a {type(leaf).__name__}; it takes a tensor")
    packing = None if plain else Packing(x0)
    start: Tensor = x0 if packing is None else packing.pack(x0).detach()
    for path, leaf in paths:
        if leaf.shape[:1] != start.shape[:1]:
            raise ValueError(
                f"inputs{pytree.keystr(path)} has shape {tuple(leaf.shape)}; "
                f"it takes the batch size of x0, ({len(start)}, …)"
            )
    wrapped = StateLayer(layer, packing, structure, len(start), has_aux, callback)
    return Packed(wrapped, start, tuple(leaf for _, leaf in paths), wrapped)


def _detached(aux: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux)
