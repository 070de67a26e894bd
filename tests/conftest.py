"""The tests run against the installed package, and only where its compiled module loaded."""

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
    if not native.AVAILABLE:
        pytest.exit(f"jfbfast is installed without its C++ kernels: {native.UNAVAILABLE_BECAUSE}", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


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
