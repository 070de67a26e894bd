"""The page: what one chooses, what one sees, and what happens at each press of a button.

Gradio rather than Streamlit, which was tried too (6.31 and 1.67). Neither asks for anything from another host. Gradio
has the slider between two pictures, a queue with a limit, and an HTTP interface that tests can use; it installs
200 MB, and Streamlit 340. Streamlit runs the whole script again at every change, and has no such slider.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from jfbfast.app import showing
from jfbfast.app.restoring import Choices, Limits, Outcome, Stopped, Work, checkpoints, without_folders, write_picture
from jfbfast.imaging.batch import FAILURES
from jfbfast.imaging.blurs import AUTO
from jfbfast.imaging.photographs import IMAGE_SUFFIXES, read_photograph

_BLURS = [
    ("Estimate it (a Gaussian)", AUTO),
    ("Gaussian", "gaussian"),
    ("Motion", "motion"),
    ("Defocus", "defocus"),
    ("PSF file", "psf"),
    ("The network's own", "own"),
]
_LIGHTS = [("linear: a lens or a motion", "linear"), ("encoded: a program", "encoded")]
_KEPT = 3600  # seconds that uploads and results are kept
_WAITING = 20  # restorations in the queue; more are refused
_TICK = 0.25  # seconds between two looks at a restoration

CSS = """
#title h1 { font-size: var(--text-xxl); font-weight: 600; margin: 0 0 0.3em; }
.gradio-container { max-width: 1200px !important; }
#share .min_value, #share .max_value { color: var(--body-text-color); }
#status p { margin: 0; font-size: var(--text-lg); overflow-wrap: anywhere; }
.error { color: #b91c1c; font-weight: 600; }
.warning { border-left: 4px solid #b45309; padding-left: 0.6em; margin: 0.4em 0; overflow-wrap: anywhere; }
.dark .error { color: #fca5a5; }
#findings dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15em 1em; margin: 0.5em 0; }
#findings dt { color: #52525b; }
.dark #findings dt { color: #d4d4d8; }
#findings dd { margin: 0; overflow-wrap: anywhere; }
#findings pre { overflow-x: auto; padding: 0.5em; background: var(--background-fill-secondary); }
#plot svg { width: 100%; max-width: 560px; height: auto; color: var(--body-text-color); font-size: 14px; }
#plot text { fill: currentColor; }
#plot .grid { stroke: currentColor; opacity: 0.2; }
#plot .tolerance { stroke: currentColor; stroke-dasharray: 5 4; }
#plot polyline { fill: none; stroke: var(--color-accent); stroke-width: 2; }
#plot circle { fill: var(--color-accent); }
#plot table { width: 100%; font-size: var(--text-sm); text-align: left; }
#plot td { vertical-align: top; padding-right: 1em; overflow-wrap: anywhere; }
"""
_HIDDEN = gr.update(visible=False)
_NOTHING: list[Any] = [gr.update(visible=False, value=None)] * 2 + [_HIDDEN, _HIDDEN, "", ""]  # beside the status
# A screen reader says what appears in a live region.
_JS = "() => { const s = document.getElementById('status'); s.setAttribute('role', 'status'); }"


class Page:
    """The page, and the restorations that it has started.

    Args:
        limits: on uploads.
        folder: for results; they are deleted once the page has them.
    """

    def __init__(self, limits: Limits, folder: Path) -> None:
        self.limits, self.folder = limits, folder
        self.stops: dict[str, threading.Event] = {}  # of the sessions that have pressed Restore
        self.worker = ThreadPoolExecutor(1, "restore")  # one at a time: a solve uses every core
        self.blocks = self._build()

    def close(self) -> None:
        """Stop all restorations, and wait until they have."""
        for stop in list(self.stops.values()):
            stop.set()
        self.worker.shutdown(cancel_futures=True)

    def _build(self) -> gr.Blocks:
        megabytes, megapixels = self.limits
        with gr.Blocks(title="jfbfast", analytics_enabled=False, delete_cache=(60, _KEPT)) as blocks:
            gr.HTML(
                "<h1>Undo the blur of a photograph</h1><p>Photographs are JPEG, PNG, TIFF, WebP, BMP, PGM or PPM of "
                f"up to {megabytes:g} MB and {megapixels:g} megapixels. They stay on this computer.</p>",
                elem_id="title",
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    photograph = gr.File(
                        label="Photograph",
                        file_types=sorted(IMAGE_SUFFIXES),
                        height=140,
                        elem_id="photograph",
                    )
                    blur = gr.Radio(_BLURS, value=AUTO, label="Blur", elem_id="blur")
                    with gr.Row(visible=False) as gaussian:
                        sigma = gr.Textbox("1.5", label="σ in pixels, or two: down, across", elem_id="sigma")
                    with gr.Row(visible=False) as motion:
                        length = gr.Number(9, label="Length in pixels", minimum=0, min_width=120)
                        angle = gr.Number(0, label="Angle in degrees", min_width=120)
                    with gr.Row(visible=False) as defocus:
                        radius = gr.Number(3, label="Radius in pixels", minimum=0, step=0.1)
                    with gr.Row(visible=False) as psf_row:
                        psf = gr.File(
                            label="Image of a point (.png, .tif or .npy)",
                            file_types=[".png", ".tif", ".tiff", ".npy"],
                            height=110,
                            elem_id="psf",
                        )
                    light = gr.Radio(_LIGHTS, value="linear", label="What blurred it", elem_id="light")
                    names = checkpoints()
                    with gr.Row():
                        checkpoint = gr.Dropdown(names, value=names[0], label="Restored by", min_width=150)
                        noise = gr.Textbox("", label="Noise on [−1, 1]", placeholder="estimated", min_width=150)
                    with gr.Row():
                        restore = gr.Button("Restore", variant="primary", elem_id="restore")
                        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
                with gr.Column(scale=3, min_width=320):
                    status = gr.HTML(showing.paragraph("Choose a photograph."), elem_id="status")
                    before = gr.Image(
                        label="Photograph", interactive=False, visible=False, buttons=["fullscreen"], elem_id="before"
                    )
                    slider = gr.ImageSlider(
                        label="Before and after",
                        interactive=False,
                        visible=False,
                        buttons=["fullscreen"],
                        max_height=700,
                        elem_id="slider",
                    )
                    position = gr.Slider(
                        0,
                        100,
                        50,
                        step=5,
                        label="Share of the picture that shows before",
                        visible=False,
                        elem_id="share",
                    )
                    download = gr.DownloadButton("Download", visible=False, elem_id="download")
                    findings = gr.HTML(elem_id="findings")
                    plot = gr.HTML(elem_id="plot")

            rows = [gaussian, motion, defocus, psf_row]
            blur.change(
                lambda kind: [gr.update(visible=kind == each) for each in ("gaussian", "motion", "defocus", "psf")],
                blur,
                rows,
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
            shown = [status, before, slider, position, download, findings, plot]
            photograph.change(
                self.look, photograph, shown, show_progress="hidden", concurrency_limit=2, api_name="look"
            )
            buttons = [restore, stop]
            inputs = [photograph, blur, sigma, length, angle, radius, psf, noise, light, checkpoint]
            begun = restore.click(
                self.begin, None, [status, *buttons], queue=False, show_progress="hidden", api_visibility="private"
            )
            begun.then(
                self.restore,
                inputs,
                [*shown, *buttons],
                concurrency_limit=1,
                show_progress="minimal",
                show_progress_on=[status],
                api_name="restore",
            )
            stop.click(self.stop, None, [status, stop], queue=False, show_progress="hidden", api_name="stop")
            position.input(  # for those who use no mouse
                lambda share: gr.ImageSlider(slider_position=share),
                position,
                slider,
                queue=False,
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
            blocks.unload(self.leave)
            blocks.load(None, None, None, js=_JS)
        blocks.queue(max_size=_WAITING)
        return blocks

    def look(self, path: str | None) -> Iterator[list[Any]]:
        """Show an uploaded photograph, or say in one sentence why it cannot be restored."""
        if path is None:
            yield [showing.paragraph("Choose a photograph."), *_NOTHING]
            return
        source = Path(path)
        with self._folder() as folder:
            picture = folder / "before.jpg"
            try:
                found = read_photograph(source, most_pixels=self.limits.pixels)
                write_picture(found, picture)
            except FAILURES as error:
                yield [showing.paragraph(without_folders(str(error), source, picture), "error"), *_NOTHING]
                return
            height, width = found.pixels.shape[-2:]
            told = f"{source.name}: {width} × {height} pixels, {found.dtype}. Press Restore."
            shown = gr.Image(value=str(picture), visible=True)
            yield [showing.paragraph(told), shown, *_NOTHING[1:]]

    def begin(self, request: gr.Request) -> list[Any]:
        """Let Stop work from now on, also while the restoration waits for its turn."""
        self.stops[_session(request)] = threading.Event()
        return [showing.paragraph("Waiting for the restoration to begin."), *_buttons(running=True)]

    def stop(self, request: gr.Request) -> list[Any]:
        """Ask the restoration of this session to end, which it does after the next evaluation of the network."""
        if (event := self.stops.get(_session(request))) is None:
            return [showing.paragraph("Nothing is being restored."), gr.Button(interactive=False)]
        event.set()
        return [showing.paragraph("Stopping."), gr.Button(interactive=False)]

    def leave(self, request: gr.Request) -> None:
        """Stop what someone started who has closed or reloaded the page."""
        if (event := self.stops.get(_session(request))) is not None:
            event.set()

    def restore(
        self,
        photograph: str | None,
        blur: str,
        sigma: str,
        length: float | None,
        angle: float | None,
        radius: float | None,
        psf: str | None,
        noise: str,
        light: str,
        checkpoint: str,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        """Restore a photograph, and show how far it is."""
        session = _session(request)
        stop = self.stops.setdefault(session, threading.Event())
        choices = Choices(blur, sigma, length, angle, radius, psf, noise, light, checkpoint)
        try:
            if photograph is None:
                yield _failed("choose a photograph first")
                return
            with self._folder() as folder:
                yield from self._restored(Work(Path(photograph), folder, choices, self.limits, stop))
        finally:
            stop.set()  # if the page has gone, this generator ends before the restoration does
            if self.stops.get(session) is stop:
                del self.stops[session]

    def _restored(self, work: Work) -> Iterator[list[Any]]:
        started, future = time.perf_counter(), self.worker.submit(work.run)
        while True:
            try:
                outcome = future.result(_TICK)
            except NotYet:
                told = showing.progress(work, time.perf_counter() - started)
                skipped = [gr.skip()] * 5
                yield [told, *skipped, showing.residuals(work.residuals), *_buttons(running=True)]
            except Stopped:
                yield [showing.paragraph("Stopped."), *[gr.skip()] * 5, "", *_buttons(running=False)]
                return
            except ValueError as error:
                yield _failed(str(error))
                return
            except Exception:  # a fault of jfbfast, which the page must survive
                logging.getLogger(__name__).exception("the restoration of %s failed", work.source)
                yield _failed("jfbfast failed; the terminal where it was started has the details")
                return
            else:
                yield _succeeded(outcome)
                return

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """A folder for results; Gradio takes copies of them before its generator continues."""
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
            yield Path(folder)


def _session(request: gr.Request) -> str:
    return request.session_hash or ""


def _buttons(running: bool) -> list[Any]:
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]


def _failed(sentence: str) -> list[Any]:
    told = showing.paragraph(sentence, "error")
    return [told, *[gr.skip()] * 4, "", "", *_buttons(running=False)]


def _succeeded(outcome: Outcome) -> list[Any]:
    solves = outcome.report["solves"]
    return [
        showing.paragraph(f"Restored in {outcome.report['seconds']:.1f} s: {outcome.file.name}"),
        gr.Image(value=None, visible=False),
        gr.ImageSlider(value=(str(outcome.before), str(outcome.after)), slider_position=50, visible=True),
        gr.Slider(value=50, visible=True),
        gr.DownloadButton(f"Download {outcome.file.name}", value=str(outcome.file), visible=True),
        showing.findings(outcome),
        showing.residuals([each["residuals"] for each in solves]) + showing.table(solves),
        *_buttons(running=False),
    ]
