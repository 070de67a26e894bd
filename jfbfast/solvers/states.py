"""States of any structure, packed into one real tensor (B, N), which is what the solvers work on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jfbfast.backends.tensors import flat


class Packing:
    """The way between a state and one real tensor (B, N) of all its numbers, sample by sample.

    Complex numbers become pairs of real ones. So a norm over (B, N) is that of a sample's whole state, and gradients
    are PyTorch's own for complex tensors.

    Args:
        state: a tuple, list, dict or any other pytree of torch of tensors (B, …) of one precision on one device; a
            tensor alone too.
        name: what errors call the state.

    Raises:
        TypeError: a leaf that is no tensor, or no leaf.
        ValueError: a leaf without a batch dimension, neither floating point nor complex, or of another batch size,
            precision or device than the first.
    """

    def __init__(self, state: Any, name: str = "x0") -> None:
        self.name = name
        paths, self.structure = pytree.tree_flatten_with_path(state)
        self.names = [name + pytree.keystr(path) for path, _ in paths]
        leaves = [leaf for _, leaf in paths]
        if not leaves:
            raise TypeError(f"{name} is an empty {type(state).__name__}; it takes a tensor, or a structure of tensors")
        for told, leaf in zip(self.names, leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{told} is a {type(leaf).__name__}; it takes a tensor")
            if leaf.dim() < 1 or not (leaf.is_floating_point() or leaf.is_complex()):
                raise ValueError(
                    f"{told} is {leaf.dtype} of shape {tuple(leaf.shape)}; it takes a floating-point or complex tensor "
                    "of shape (B, …)"
                )
            first = leaves[0]
            for what, found, expected in (
                ("batch size", len(leaf), len(first)),
                ("precision", leaf.dtype.to_real(), first.dtype.to_real()),
                ("device", leaf.device, first.device),
            ):
                if found != expected:
                    raise ValueError(f"{told} has the {what} {found}; it takes that of {self.names[0]}, {expected}")
        self.shapes = [leaf.shape[1:] for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.sizes = [
            shape.numel() * (1 + dtype.is_complex) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def pack(self, state: Any, name: str | None = None) -> Tensor:
        """The tensor (B, N) of a state like this one.

        Args:
            state: of the same structure and shapes, with any batch size; a dict may have another order. Real tensors
                become complex where this state is.
            name: what errors say the state is; by default the argument itself.

        Raises:
            TypeError: another structure, or a leaf that is no tensor.
            ValueError: a leaf of another shape, or a complex one where this state is real.
        """
        told = name or "the state"
        try:
            leaves = self.structure.flatten_up_to(state)
        except ValueError as error:
            raise TypeError(f"{told} has another structure than {self.name}: {error}") from error
        rows = []
        for leaf, known, shape, dtype in zip(leaves, self.names, self.shapes, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{told} has a {type(leaf).__name__} for {known}; it takes a tensor")
            if leaf.shape[1:] != shape or leaf.shape[:1] != leaves[0].shape[:1]:
                raise ValueError(
                    f"{told} has shape {tuple(leaf.shape)} for {known}; it takes (B, {', '.join(map(str, shape))}), "
                    "the shape that this has"
                )
            if leaf.is_complex() and not dtype.is_complex:
                raise ValueError(f"{told} is complex for {known}, which is {dtype}; it takes a complex {known}")
            leaf = leaf.to(dtype)
            rows.append(flat(torch.view_as_real(leaf.resolve_conj()) if dtype.is_complex else leaf))
        return torch.cat(rows, 1) if len(rows) > 1 else rows[0]

    def unpack(self, x: Tensor) -> Any:
        """The state of a tensor (B, N), as copies, for any batch size."""
        leaves = []
        for part, shape, dtype in zip(x.split(self.sizes, 1), self.shapes, self.dtypes, strict=True):
            part = part.clone(memory_format=torch.contiguous_format)
            if dtype.is_complex:
                leaves.append(torch.view_as_complex(part.view(len(x), *shape, 2)))
            else:
                leaves.append(part.view(len(x), *shape))
        return self.structure.unflatten(leaves)


def is_plain(state: Any) -> bool:
    """Whether a state is one real tensor, which needs no packing (or nothing that could be packed)."""
    return isinstance(state, Tensor) and not state.is_complex()
