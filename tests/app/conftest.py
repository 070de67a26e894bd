"""A server of the page, as a user starts it, and a browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Chromium asks for nothing by itself, so that a request to another host is the page's.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LIMITS = {"megabytes": 2, "megapixels": 1}


class Server(NamedTuple):
    """A running `jfbfast app`."""

    address: str
    temporary: Path
    errors: Path

    def files(self) -> list[str]:
        """The temporary files that it has."""
        return sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*") if path.is_file())

    def faults(self) -> list[str]:
        """What it wrote to stderr of restorations that failed by a fault of jfbfast."""
        return [line for line in self.errors.read_text("utf-8").splitlines() if line.startswith("the restoration of")]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page with small limits, served until the last test; then its files must be gone."""
    if find_spec("gradio") is None:
        pytest.skip("the page takes the extra app")
    folder = tmp_path_factory.mktemp("server")
    temporary, errors = folder / "temporary", folder / "stderr"
    temporary.mkdir()
    limits = [word for name, value in LIMITS.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "jfbfast", "app", "--no-browser", "--port", "0", *limits]
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8"
        )
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found is not None, errors.read_text()
        server = Server(found[0], temporary, errors)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
        assert process.stdout is not None
        process.stdout.close()
    assert (code, server.files()) == (128 + signal.SIGTERM, [])


@pytest.fixture(scope="module")  # it holds an event loop, which must not run in other tests
def browser() -> Iterator[Any]:
    """Chromium without a window: an installed one, or Playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        executable = installed or playwright.chromium.executable_path
        if not Path(executable).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        running = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield running
        running.close()
