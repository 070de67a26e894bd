"""torchrun's processes as a team: what they agree on, and how they share work. A process alone is a team of one."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  # imported later, its defaults would keep a group and its threads for good

from jfbfast import checks
from jfbfast.experiments.processes import distributed, rank, world

T = TypeVar("T")

_START = 600.0  # seconds to wait until all processes have started


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def _lost(error: RuntimeError) -> bool:
    """Whether the error says that another process cannot be reached; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@contextmanager
def lost_process_is_named() -> Iterator[None]:
    """Within this context, a process of the team that ended or cannot be reached raises ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        if not _lost(error):
            raise
        why = re.sub(r"^\[[^]]*\] *", "", checks.one_line(error)).partition(". ")[0]  # without gloo's line and advice
        raise ConnectionError(f"another of torchrun's processes has ended or cannot be reached ({why})") from error


def _store() -> Any:
    """The key-value store of torchrun's processes."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    hosts = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=_START)
    kind: Any = dist.TCPStore  # type: ignore[attr-defined]
    return kind(address, int(port), world(), hosts, timeout, wait_for_workers=False, multi_tenant=True)


def _meeting(store: Any) -> str:
    """Wait until all processes are there; return a name that belongs to them alone.

    When torchrun restarts its processes, it can keep the store, with the addresses of those that were killed
    (torch 2.14: a process group that reads them waits forever), and its count of restarts can differ among machines.
    So each process writes a random word, and waits until all have seen the same words.
    """
    store.set(f"jfbfast/{rank()}", secrets.token_hex(8))
    seen, end = "", time.monotonic() + _START
    while time.monotonic() < end:
        words = ",".join(store.get(f"jfbfast/{each}").decode() for each in range(world()))
        arrived = store.add(words, int(words != seen))
        if arrived == world():
            return words
        seen = words
        time.sleep(0.05)
    raise ConnectionError(f"{world()} processes should have started, and {arrived} have within {_START:g} seconds")


@contextmanager
def team(patience: float, backend: str = "gloo") -> Iterator[None]:
    """Connect the processes of the team within this context.

    Args:
        patience: seconds to wait for another process, once all have started, before it counts as lost.
        backend: what connects them, of torch.distributed; with gloo for the CPU.

    Raises:
        ConnectionError: a process of the team ended, or cannot be reached.
    """
    if not distributed() or _connected():
        yield
        return
    with lost_process_is_named():
        store = _store()
        own = dist.PrefixStore(_meeting(store), store)  # type: ignore[attr-defined]
        timeout = timedelta(seconds=patience)
        dist.init_process_group(backend, store=own, rank=rank(), world_size=world(), timeout=timeout)
        yield
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """The device for this process: each of torchrun's processes on a machine takes a GPU of its own for "cuda"."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and distributed() else device


def restarted() -> bool:
    """Whether torchrun has started the processes again; its count of that can differ among machines."""
    return any(gathered(distributed() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))


def gathered(value: T) -> list[T]:
    """The values of all processes of the team, in the order of their ranks; each waits for all others."""
    if not _connected():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(prepare: Callable[[], tuple[T, Any]], differing: str = "") -> T:
    """What each process prepares, once all have done so; or an error for all, if one of them fails.

    Args:
        prepare: returns what is prepared, and what must be the same in all processes.
        differing: the sentence of the error if it is not.

    Raises:
        ValueError: in the first process, with the first error of all; the others exit with status 1, and print nothing.
    """
    if not _connected():
        return prepare()[0]
    found, same, problem = None, None, None
    try:
        found, same = prepare()
    except (ModuleNotFoundError, OSError, ValueError) as error:
        problem = error
    outcomes = gathered((None if problem is None else checks.one_line(problem), same))
    problems = {text: number for number, (text, _) in reversed([*enumerate(outcomes)]) if text is not None}
    if not problems and any(same != outcomes[0][1] for _, same in outcomes):
        problems = {differing: 0}
    if not problems:
        return found  # type: ignore[return-value]
    if rank():
        raise SystemExit(1)
    if problem is not None:
        raise problem
    text, number = next(iter(problems.items()))
    raise ValueError(f"process {number}: {text}" if number else text)


def shared(count: int) -> Iterator[int]:
    """Yield the numbers below ``count``; each goes to one process of the team, when that is free for the next."""
    if not _connected():
        yield from range(count)
        return
    store, key = _store(), [secrets.token_hex(8)]
    dist.broadcast_object_list(key)
    while (number := store.add(key[0], 1) - 1) < count:
        yield number
