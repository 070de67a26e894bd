"""Counts what a GPU would be given to do: the operations of a computation on the CPU that takes itself for one.

Every operation of torch that computes counts as one launch (a convolution with a bias two, as cuDNN adds it afterwards;
a convolution's backward one for each gradient), each of our kernels as one, a view as none. The host waits where it
reads a number from the device. Tensors in pinned memory, and what is computed from such alone, are the host's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from jfbfast.backends import conv3x3, cuda, dispatch, reference
from jfbfast.operators import ops
from jfbfast.solvers.loop import Phase

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
_READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal"}
_IMPLEMENTATION = torch._C.DispatchKey.CompositeExplicitAutograd


class Launches(TorchDispatchMode):
    """Within the context, count launches and waits by the part of the solve they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "outside"
        self.launches: dict[str, Counter[str]] = {}
        self.waits: Counter[str] = Counter()
        self.evaluations: list[int] = []  # the launches of each

    def add(self, name: str, count: int = 1) -> None:
        self.launches.setdefault(self.part, Counter())[name] += count

    def total(self, part: str) -> int:
        return sum(self.launches.get(part, Counter()).values())

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "jfbfast":  # an operator of ours: what it is made of counts
            with self:
                return func._op_dk(_IMPLEMENTATION, *args, **kwargs)
        if name == "cudnn_convolution_relu":
            self.add(name)
            return torch.conv2d(*args).relu_()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        of_the_host = bool(given) and all(getattr(tensor, "of_the_host", False) for tensor in given)
        out = func(*args, **kwargs)
        if of_the_host:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    leaf.of_the_host = True
            return out
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name in _READS:
            self.waits[f"{self.part}: {name}"] += 1
        if not view and name not in _FREE:
            self.add(name, _count(name, args))
        return out


def _count(name: str, args: tuple[Any, ...]) -> int:
    if name == "convolution":
        return 1 + (args[2] is not None)
    if name == "convolution_backward":
        return sum(args[-1])
    return 1


class _Event:
    """A torch.cuda.Event that counts how often the host waits for it."""

    def __init__(self, counter: Launches) -> None:
        self.counter = counter

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        self.counter.waits["following the device"] += 1

    def query(self) -> bool:
        return True


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, module: Any) -> Iterator[Launches]:
    """Count the launches within the context; ``module`` is jfbfast._cuda with emulated kernels."""
    counter = Launches()

    def empty(*shape: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = plain_empty(*shape, **kwargs)
        if pin_memory:
            made.of_the_host = True
        return made

    class Stub:
        """One launch of the Triton kernels."""

        MAX_RADIUS = 31

        @staticmethod
        def blur(*args: Any) -> Tensor:
            counter.add("blur")
            with _disable_current_modes():
                return reference.blur(*args)

        @staticmethod
        def gradient(*args: Any) -> Tensor:
            counter.add("gradient")
            with _disable_current_modes():
                return reference.gradient(*args)

        @staticmethod
        def add_relu(*args: Any) -> Tensor:
            counter.add("add_relu")
            with _disable_current_modes():
                return reference.add_relu(*args)

    def kernels(device: torch.device, op: str, **facts: Any) -> Any:
        if op in ("blur", "add_relu"):
            return Stub
        if op == "conv3x3":
            return reference
        return rule(torch.device("cuda", 0) if "solve" in op else device, op, **facts)

    class Anderson(cuda.AndersonSolve):
        def step(self, x: Tensor, f: Tensor) -> Tensor:
            with counter.within("Anderson"):
                counter.add("step", 3)
                with _disable_current_modes():
                    return super().step(x, f)

        def running(self) -> Tensor:
            with counter.within("Anderson"):
                running = super().running()
            running.of_the_host = True
            return running

    def evaluate(phase: Phase, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        before = counter.total("evaluations")
        with counter.within("evaluations"):
            image = plain_evaluate(phase, x, inputs)
        counter.evaluations.append(counter.total("evaluations") - before)
        return image

    def tolist(tensor: Tensor) -> Any:
        if not getattr(tensor, "of_the_host", False):
            counter.waits[f"{counter.part}: tolist"] += 1
        return plain_list(tensor)

    rule, plain_empty, plain_evaluate, plain_list = dispatch.kernels, torch.empty, Phase.evaluate, torch.Tensor.tolist
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_load", lambda: (module, ""))
        patch.setattr(cuda, "unavailable_because", lambda device: "")
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "Event", lambda: _Event(counter))
        patch.setattr(dispatch, "kernels", kernels)
        patch.setattr(ops, "kernels", kernels)
        patch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(conv3x3, "_onednn_fuses_relu", lambda *_: False)
        patch.setattr(torch.Tensor, "tolist", tolist)
        patch.setattr(cuda, "AndersonSolve", Anderson)
        patch.setattr(Phase, "evaluate", evaluate)
        with counter:
            yield counter
