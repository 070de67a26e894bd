"""What the page does with an upload, without a browser and without Gradio."""

import os
import shlex
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from helpers.command_line import run
from helpers.photographs import SIGNATURE, chunk, samples, tagged
from jfbfast.app import showing
from jfbfast.app.restoring import Choices, Limits, Outcome, Stopped, Work, checkpoints
from jfbfast.app.serving import Guarded
from jfbfast.imaging.photographs import read_photograph

SIZE = (40, 48)


def work(folder, content, choices, name="photo.png", limits=Limits(), stop=None):  # noqa: B008
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    (folder / "in" / name).write_bytes(content)
    return Work(folder / "in" / name, folder / "out", choices, limits, stop or threading.Event())


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "choices"),
    [
        ("deep.tiff", "tiff", "uint16", Choices("defocus", radius=1.5, checkpoint="tikhonov")),
        ("two words.jpg", "jpeg", "uint8", Choices("gaussian", sigma="1.2, 0.8", noise="0.01", light="encoded")),
    ],
)
def test_the_page_writes_the_file_that_its_command_line_writes(tmp_path, monkeypatch, name, kind, dtype, choices):
    outcome = work(tmp_path, tagged(kind, samples(dtype, size=SIZE), 6), choices, name).run()
    monkeypatch.chdir(tmp_path / "in")
    program, *arguments = shlex.split(outcome.command)
    result = run(*arguments)
    assert program == "jfbfast" and result.exit_code == 0, result.output
    assert Path(outcome.file.name).read_bytes() == outcome.file.read_bytes()
    assert read_photograph(outcome.file).dtype == np.dtype(dtype) and read_photograph(outcome.file).metadata.icc
    assert read_photograph(outcome.before).pixels.shape == read_photograph(outcome.after).pixels.shape == (3, 48, 40)


def test_every_solve_is_told_with_its_residuals(tmp_path):
    done = work(tmp_path, tagged("png", samples("uint8", size=SIZE), 1), Choices("gaussian", sigma="1"))
    outcome = done.run()
    solves = outcome.report["solves"]
    assert len(solves) == 3 and {solve["status"] for solve in solves} == {"CONVERGED"}
    assert sum(solve["evaluations"] for solve in solves) == done.evaluations == outcome.report["evaluations"]
    for solve, seen in zip(solves, done.residuals, strict=True):
        assert list(solve["residuals"][:-1]) == seen and len(seen) == solve["evaluations"]
        assert min(solve["residuals"]) <= 3e-2 < seen[0]
    plot = showing.residuals([solve["residuals"] for solve in solves])
    assert plot.count("<polyline") == 3 and plot.count("<circle") == done.evaluations + 3
    told = showing.findings(outcome)
    assert "<dd>3 converged</dd>" in told and f"<dd>{done.evaluations}</dd>" in told
    assert "--sigma 1" in told and showing.table(solves).count("<tr>") == 4


@pytest.mark.parametrize(("checkpoint", "evaluations"), [("universal", 2), ("plug-and-play", 3)])
def test_a_stop_ends_the_restoration_after_the_next_evaluation(tmp_path, monkeypatch, checkpoint, evaluations):
    stop = threading.Event()
    content = tagged("png", samples("uint8", size=SIZE), 1)
    stopped = work(tmp_path, content, Choices("gaussian", sigma="1", checkpoint=checkpoint), stop=stop)
    watch = stopped._watch
    monkeypatch.setattr(
        stopped, "_watch", lambda *told: (stopped.evaluations + 1 == evaluations and stop.set(), watch(*told))
    )
    with pytest.raises(Stopped):
        stopped.run()
    assert stopped.evaluations == evaluations and os.listdir(stopped.folder) == []
    stopped.evaluations = 0
    with pytest.raises(Stopped):
        stopped.run()
    assert stopped.evaluations == 0


def test_a_large_photograph_is_refused_before_it_is_decoded(tmp_path):
    header = struct.pack(">2I5B", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    message = r"^photo\.png: has 20000 × 20000 pixels; it takes up to 0\.5 million$"
    with pytest.raises(ValueError, match=message):
        work(tmp_path, bomb, Choices(), limits=Limits(1, 0.5)).run()


def test_choices_are_those_of_the_command_line():
    chosen = {
        "--sigma auto": Choices("auto"),
        "--sigma 1.2,2 --noise auto": Choices("gaussian", sigma=" 1.2, 2 ", noise="auto"),
        "--motion 9,-30.5 --light encoded": Choices("motion", length=9, angle=-30.5, light="encoded"),
        "--defocus 2.1": Choices("defocus", radius=2.1),
        "--psf point.png": Choices("psf", psf="/somewhere/point.png"),
        "--checkpoint gaussian5-sigma1": Choices("own", checkpoint="gaussian5-sigma1"),
    }
    for options, choices in chosen.items():
        assert choices.command("x.png") == f"jfbfast restore x.png {options}"
    assert Choices().command("-a b.png").startswith("jfbfast restore './-a b.png'")
    assert Choices(noise=" 0.01").level() == 0.01 and Choices().level() is None and Choices("own").choice() is None
    assert checkpoints()[0] == "universal" and checkpoints()[-1] == "tikhonov"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices("gaussian"), "σ is empty; it takes a number of pixels, two of them"),
        (Choices("gaussian", sigma="much"), "σ is much; it takes"),
        (Choices("gaussian", sigma="-1"), "sigma is -1.0"),
        (Choices("motion", length=9), "the angle is empty; it takes a number"),
        (Choices("defocus", radius=1e9), "radius is 1000000000.0"),
        (Choices("psf"), "the PSF file is missing"),
        (Choices("psf", psf="/none/point.png"), r"No such file or directory: 'point\.png'"),
        (Choices("own"), "the blur is not given; universal takes one of sigma"),
        (Choices(noise="loud"), "noise is loud; it takes a number, or auto"),
        (Choices(light="red"), "light is 'red'"),
        (Choices(checkpoint="none"), "none: there is no such file"),
    ],
)
def test_a_wrong_choice_is_one_sentence(choices, message, tmp_path):
    with pytest.raises(ValueError, match=message) as refused:
        work(tmp_path, tagged("png", samples("uint8", size=SIZE), 1), choices).run()
    assert "\n" not in str(refused.value) and str(tmp_path) not in str(refused.value)


def test_no_name_and_no_message_becomes_part_of_the_page(tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    report = {"method": bad, "blur": bad, "estimated": None, "noise": 0.1, "clipped": 0, "residual": 0.1, "solves": []}
    outcome = Outcome(tmp_path, tmp_path, tmp_path, {**report, "tiles": 1, "seconds": 1}, [], [bad], bad)
    for html in (showing.findings(outcome), showing.paragraph(bad), showing.paragraph(bad, "error")):
        assert "<img" not in html and "&lt;img" in html
    assert showing.residuals([]) == "" and "<svg" in showing.residuals([[1.0, 0.0, float("nan")]])


def test_responses_forbid_other_hosts_and_no_file_is_a_page():
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def headers(path):
        sent = []

        async def send(message):
            sent.append(message)

        with pytest.raises(StopIteration):  # it waits for nothing
            Guarded(inner)({"type": "http", "path": path}, None, send).send(None)
        return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}

    status, found = headers("/")
    assert status == 200 and found["content-security-policy"].startswith("default-src 'self' ")
    status, found = headers("/gradio_api/file=/tmp/x.svg")
    assert status == 200 and found["content-security-policy"] == "default-src 'none'; sandbox"
    assert found["x-content-type-options"] == "nosniff"
    assert headers("/gradio_api/file=http://example.org/x")[0] == 403


def test_a_missing_gradio_is_reported_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    result = run("app", "--no-browser", "--port", 0)
    assert result.exit_code == 1 and "pip install 'jfbfast[app]'" in result.stderr, result.output
    assert "--megapixels is -1.0" in run("app", "--megapixels", -1).stderr
