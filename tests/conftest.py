"""The tests run against the installed package.

They need its compiled module, unless JFBFAST_PURE_PYTHON=1 says that it was installed without one: tests that are
marked ``compiled`` are skipped then.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

import torch  # noqa: E402

with warnings.catch_warnings():  # torch 2.11's compiler imports this module, which uses what torch deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch.utils.mkldnn

from jfbfast.backends import native  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    if not native.AVAILABLE and os.environ.get("JFBFAST_PURE_PYTHON") != "1":
        pytest.exit(f"jfbfast is installed without its C++ kernels: {native.UNAVAILABLE_BECAUSE}", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {"gpu": "torch sees no CUDA device"} if not torch.cuda.is_available() else {}
    missing |= {"compiled": native.UNAVAILABLE_BECAUSE} if not native.AVAILABLE else {}
    for item in items:
        needs = {mark.name for mark in item.iter_markers()} | ({"compiled"} if "native" in item.name else set())
        for marker in missing.keys() & needs:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here and in subprocesses, for sizes whose arithmetic is too little to share."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Out of the source tree, which a subprocess would import in place of the installed package."""
    monkeypatch.chdir(tmp_path)
