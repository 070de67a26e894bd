"""Start each solve of a training set from the sample's last fixed point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, TypeVar

import torch
from torch import Tensor

from jfbfast import checks
from jfbfast.backends.tensors import flat
from jfbfast.solvers import FixedPointSolution, Status
from jfbfast.solvers.states import Packing, is_plain

State = TypeVar("State")

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class WarmStart:
    """A cache of fixed points by sample index, for training on measurements that stay the same.

    Between two visits of a sample the weights change little, and so does its fixed point. The cache is useless if
    the measurement behind an index changes (fresh noise, random crops).

    Args:
        max_entries: the most samples to store; None for all. Further samples are not stored. (Each sample comes once
            an epoch, so the first ones are as useful as any others.)
        dtype: to store in. The rounding of float16, 5e-4 of a value, is below the usual tolerance; None
            takes the solution's dtype.
        device: to store on; None for the solution's device.

    Raises:
        ValueError: ``max_entries`` negative; a dtype that is not floating point.

    Example:
        >>> import torch, jfbfast
        >>> model = jfbfast.DEGrad(jfbfast.GaussianBlur(), jfbfast.RED(torch.nn.Identity()), step_size=0.5)
        >>> cache, indices, d = jfbfast.WarmStart(), [7, 2], torch.rand(2, 3, 8, 8)
        >>> for epoch in range(2):
        ...     restored = model(d, x0=cache.get(indices, model.start(d)))
        ...     cache.put(indices, model.solution)
        >>> len(cache)
        2
    """

    def __init__(
        self,
        max_entries: int | None = None,
        dtype: torch.dtype | None = torch.float16,
        device: torch.device | str | None = "cpu",
    ) -> None:
        if max_entries is not None:
            checks.integer("max_entries", max_entries, 0)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; it takes None or a floating-point dtype")
        self.max_entries = max_entries
        self.dtype = dtype
        self.device = device
        self._values: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Samples stored."""
        return len(self._values)

    def get(self, indices: Tensor | Sequence[int], default: State) -> State:
        """The stored fixed point of each sample, or its row of ``default`` if none is stored.

        Args:
            indices: B integers, one for each sample.
            default: (B, …), the starts of samples that are not stored; it is not changed. It may have any structure
                that `fixed_point` takes.

        Returns:
            (B, …), of the structure, the dtype and on the device of ``default``.

        Raises:
            ValueError: indices that are not B integers; a stored sample of another shape.
        """
        if not is_plain(default):
            packing = Packing(default, "default")
            found: State = packing.unpack(self._get(indices, packing.pack(default)))
            return found
        assert isinstance(default, Tensor)
        return self._get(indices, default)

    def _get(self, indices: Tensor | Sequence[int], default: Tensor) -> Any:
        keys = _keys(indices, default)
        start = default.detach().clone()
        found = [(row, self._values[key]) for row, key in enumerate(keys) if key in self._values]
        if found:
            rows, values = zip(*found, strict=True)
            for row, value in found:
                if value.shape != default.shape[1:]:
                    raise ValueError(
                        f"default has samples of shape {tuple(default.shape[1:])}; "
                        f"the one stored for index {keys[row]} has {tuple(value.shape)}"
                    )
            start[list(rows)] = torch.stack(values).to(start)
        return start

    @torch.no_grad()
    def put(self, indices: Tensor | Sequence[int], solution: FixedPointSolution) -> None:
        """Store the fixed points of a solve.

        A sample that diverged, or has a value that is not finite in the stored dtype, keeps what was stored before.

        Raises:
            ValueError: indices that are not one integer for each sample.
        """
        value: Any = solution.value
        value = value if is_plain(value) else Packing(value, "value").pack(value)
        keys = _keys(indices, value)
        values = value.to(device=self.device, dtype=self.dtype)
        finite = flat(values).isfinite().all(1)
        usable = (finite & (solution.status != Status.DIVERGED).to(finite.device)).tolist()
        for key, value, stored in zip(keys, values, usable, strict=True):
            if stored and (key in self._values or self.max_entries is None or len(self) < self.max_entries):
                self._values[key] = value.clone()  # a view would keep the whole batch alive

    def clear(self) -> None:
        """Forget every sample."""
        self._values.clear()

    def state_dict(self) -> dict[str, Any]:
        """The stored samples, {"values": {index: tensor}}, for torch.save."""
        return {"values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the stored samples by those of ``state_dict``, in this cache's dtype and on its device."""
        kept = list(state["values"].items())[: self.max_entries]
        self._values = {int(key): value.to(device=self.device, dtype=self.dtype) for key, value in kept}


def _keys(indices: Tensor | Sequence[int], samples: Tensor) -> list[int]:
    if isinstance(indices, Tensor) and (indices.dim() != 1 or indices.dtype not in _INTEGERS):
        raise ValueError(f"indices is {indices.dtype} of shape {tuple(indices.shape)}; it takes integers of shape (B,)")
    try:
        keys = indices.tolist() if isinstance(indices, Tensor) else [index(i) for i in indices]
    except TypeError as error:
        raise ValueError(f"indices is {indices!r}; it takes one integer for each sample") from error
    if len(keys) != len(samples):
        raise ValueError(f"indices has {len(keys)} entries; it takes one for each of the {len(samples)} samples")
    return keys
