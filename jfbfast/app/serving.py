"""Serve the page to this machine alone."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HOST = "127.0.0.1"
# Nothing from other hosts. Gradio's own scripts and styles are inline.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"
_FILES = "default-src 'none'; sandbox"  # no file is a page, whatever was uploaded
_FILE_PATH = "/gradio_api/file="


class Guarded:
    """An ASGI application with headers that forbid other hosts' content, and without Gradio's fetching of URLs."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if "://" in path or path.startswith(f"{_FILE_PATH}http"):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"This server fetches nothing from elsewhere."})
            return
        policy = _FILES if path.startswith(_FILE_PATH) else _POLICY
        added = {
            b"content-security-policy": policy.encode(),
            b"x-content-type-options": b"nosniff",
            b"referrer-policy": b"no-referrer",
        }

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *added.items()]}
            await send(message)

        await self.app(scope, receive, guarded)


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    raise ValueError(f"an upload is {url}; it takes a file, since this server fetches nothing from elsewhere")


def forbid_fetching(gradio: Any) -> None:
    """Refuse a request whose upload is the address of a file elsewhere, which Gradio would download."""
    gradio.processing_utils.async_ssrf_protected_download = _fetch_nothing


def serve(port: int, megabytes: float, megapixels: float, *, browser: bool, say: Callable[[str], object]) -> None:
    """Serve the page until Ctrl-C, and delete all files that it has made.

    Args:
        port: of 127.0.0.1; 0 for any free one.
        megabytes, megapixels: the largest upload.
        browser: whether to open the page.
        say: called with the address.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
        OSError: the port cannot be had.
    """
    try:
        listening = socket.create_server((_HOST, port))
    except OSError as error:
        raise OSError(f"--port is {port}; it takes one that is free ({error.strerror})") from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the files are deleted
    with listening, tempfile.TemporaryDirectory(prefix="jfbfast-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")  # Gradio reads it when it is imported
        import gradio as gr  # isort: skip  # the first, because the others come with it
        import fastapi
        import uvicorn
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from jfbfast.app.page import CSS, Page
        from jfbfast.app.restoring import Limits

        forbid_fetching(gr)
        limits = Limits(megabytes, megapixels)
        page = Page(limits, Path(folder))
        app = gr.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None),
            page.blocks,
            "",
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            show_error=False,
            max_file_size=limits.bytes,
            css=CSS,
            theme=gr.themes.Default(primary_hue="blue").set(  # white on Gradio's own orange has too little contrast
                button_primary_background_fill="*primary_700",
                button_primary_background_fill_hover="*primary_800",
                button_primary_background_fill_dark="*primary_700",
                button_primary_background_fill_hover_dark="*primary_800",
            ),
        )
        guarded = Guarded(TrustedHostMiddleware(app, allowed_hosts=[_HOST, "localhost"]))
        config = uvicorn.Config(guarded, log_level="error", timeout_graceful_shutdown=2)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        address = f"http://{_HOST}:{listening.getsockname()[1]}"
        say(f"The page is {address}, for this machine alone. Ctrl-C ends it.")
        if browser:
            webbrowser.open(address)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        finally:
            page.close()
