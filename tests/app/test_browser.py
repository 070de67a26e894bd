"""What a person does with the page, in a real browser."""

import base64
import os
import re
import shlex
import struct
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from helpers.command_line import run
from helpers.photographs import PROFILE, chunk, png, samples, tagged
from jfbfast.imaging.photographs import read_photograph

pytestmark = pytest.mark.slow

WAIT = 60_000  # milliseconds; far more than anything takes


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Small ones, and one that takes long."""
    folder = tmp_path_factory.mktemp("photographs")
    across = np.linspace(0, 1, 96)
    smooth = np.stack([np.outer(across[:80] ** k, np.sin(9 * across) ** 2) for k in (1, 2, 3)], -1)
    Image.fromarray((255 * smooth).astype(np.uint8)).save(folder / "small.png")
    (folder / "deep.tiff").write_bytes(tagged("tiff", samples("uint16", size=(80, 96)), 6))
    Image.fromarray(samples("uint8", size=(1000, 900))).save(folder / "long.jpg", quality=30)
    Image.fromarray(np.pad([[255]], 2).astype(np.uint8)).save(folder / "point.png")
    (folder / "broken.png").write_bytes((folder / "small.png").read_bytes()[:300])
    (folder / "heavy.png").write_bytes((folder / "small.png").read_bytes() + bytes(2_000_001))
    header = struct.pack(">2I5B", 30_000, 30_000, 8, 2, 0, 0, 0)
    plain = png(samples("uint8"))
    (folder / "bomb.png").write_bytes(plain[:8] + chunk(b"IHDR", header) + plain[33:])
    return folder


class Person:
    """Someone in front of the page."""

    def __init__(self, page, address):
        self.page, self.address, self.foreign, self.errors = page, address, [], []
        page.set_default_timeout(WAIT)
        host = urlsplit(address).netloc
        page.on("request", lambda request: self._saw(request.url, host))
        page.on("filechooser", lambda _: None)  # else Chromium may open one before Playwright listens
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _saw(self, url, host):
        if url.startswith("http") and urlsplit(url).netloc != host:
            self.foreign.append(url)

    def opens(self):
        self.page.goto(self.address)
        self.page.wait_for_selector("#status[role=status]")  # the page is ready
        return self

    def reads(self, text):
        """Wait until the status has this text or tells of an error, and return all of it."""
        shown = "(document.getElementById('status')?.innerText ?? '')"
        test = f"text => ({shown}.includes(text) || {shown}.includes('Error:')) && {shown}"
        told = self.page.wait_for_function(test, arg=text).json_value()
        assert text in told, told
        return told

    def chooses(self, photograph):
        self.page.set_input_files("#photograph input[type=file]", photograph)
        return self.reads("Press Restore")

    def restores(self):
        self.page.click("#restore")
        return self.reads("Restored in")

    def findings(self):
        names, values = (self.page.locator(f"#findings {tag}").all_inner_texts() for tag in ("dt", "dd"))
        return dict(zip(names, values, strict=True))

    def command(self):
        return self.page.inner_text("#findings code")

    def downloads(self, folder):
        with self.page.expect_download() as waiting:
            self.page.click("#download")
        path = folder / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path


@pytest.fixture
def someone(server, browser):
    """Make a person with a browser window of their own; in the end no other host was asked, and nothing failed."""
    people, contexts = [], []

    def make(**options):
        contexts.append(browser.new_context(**options))
        people.append(Person(contexts[-1].new_page(), server.address).opens())
        return people[-1]

    yield make
    for context in contexts:
        context.close()
    assert [(person.foreign, person.errors) for person in people] == [([], [])] * len(people)
    assert server.faults() == []


@pytest.fixture
def person(someone):
    return someone()


def test_the_page_opens_and_states_its_limits(person):
    assert person.page.title() == "jfbfast" and "Choose a photograph" in person.reads("Choose")
    assert "up to 2 MB and 1 megapixels" in person.page.inner_text("#title")
    person.page.click("#restore")
    assert "Error: choose a photograph first" in person.reads("Error")


def test_a_photograph_is_chosen_and_seen(person, photographs):
    assert "small.png: 96 × 80 pixels, uint8" in person.chooses(photographs / "small.png")
    picture = person.page.locator("#before img")
    picture.wait_for()
    assert picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [96, 80]


def test_a_photograph_is_dropped(person, photographs):
    encoded = base64.b64encode((photographs / "small.png").read_bytes()).decode()
    dropped = person.page.evaluate_handle(
        """encoded => {
            const bytes = Uint8Array.from(atob(encoded), each => each.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));
            return data;
        }""",
        encoded,
    )
    person.page.dispatch_event("#photograph button", "drop", {"dataTransfer": dropped})
    assert "dropped.png: 96 × 80 pixels" in person.reads("Press Restore")


@pytest.mark.parametrize(
    ("label", "typed", "told", "options"),
    [
        ("Gaussian", {"σ in pixels": "0.9"}, "a Gaussian of σ = 0.9 pixels", "--sigma 0.9"),
        ("Gaussian", {"σ in pixels": "0.8, 1.2"}, "a Gaussian of σ = 0.8, 1.2 pixels", "--sigma 0.8,1.2"),
        ("Motion", {"Length": "4", "Angle": "30"}, "a motion of 4 pixels at 30°", "--motion 4,30"),
        ("Defocus", {"Radius": "1.5"}, "a defocus of radius 1.5", "--defocus 1.5"),
        ("PSF file", {}, "the point spread function point.png", "--psf point.png"),
    ],
)
def test_each_kind_of_blur_is_chosen(person, photographs, label, typed, told, options):
    person.chooses(photographs / "small.png")
    person.page.get_by_label(label, exact=True).check()
    for name, value in typed.items():
        person.page.get_by_label(name).fill(value)
    if label == "PSF file":
        person.page.set_input_files("#psf input[type=file]", photographs / "point.png")
        person.page.locator("#psf", has_text="point").locator("a").wait_for()
    person.restores()
    assert person.findings()["Blur"] == told and person.command() == f"jfbfast restore small.png {options}"


def test_the_blur_is_estimated_by_default(person, photographs):
    person.chooses(photographs / "deep.tiff")
    person.restores()
    found = person.findings()
    assert re.fullmatch(r"[\d.]+ \(80% range [\d.]+ to [\d.]+\)", found["Estimated σ"]), found
    assert "Estimated noise" in found and "--sigma auto" in person.command()


def test_before_and_after_are_compared_and_the_residuals_read(person, photographs):
    person.chooses(photographs / "small.png")
    person.page.get_by_label("Gaussian", exact=True).check()
    person.restores()
    pictures = person.page.locator("#slider img")
    sizes = [
        pictures.nth(k).evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
        for k in (0, 1)
    ]
    assert sizes == [[96, 80]] * 2 and pictures.nth(0).get_attribute("src") != pictures.nth(1).get_attribute("src")
    handle = person.page.locator("#slider .inner").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    shown = pictures.nth(1).get_attribute("style")
    person.page.mouse.move(x, y)
    person.page.mouse.down()
    person.page.mouse.move(x - 100, y, steps=4)
    person.page.mouse.up()
    assert pictures.nth(1).get_attribute("style") != shown

    found = person.findings()
    assert found["Solves"] == "3 converged" and int(found["Evaluations"]) >= 3
    assert person.page.locator("#plot polyline").count() == 3
    assert person.page.get_by_role("img", name="Residuals of 3 solves").is_visible()
    person.page.click("#plot summary")
    assert [row.split()[1] for row in person.page.locator("#plot tbody tr").all_inner_texts()] == ["converged"] * 3


def test_the_downloaded_file_is_that_of_the_command_line(person, photographs, tmp_path, monkeypatch):
    person.chooses(photographs / "deep.tiff")
    person.page.get_by_label("Defocus", exact=True).check()
    person.page.get_by_label("Radius").fill("1.2")
    person.page.get_by_label("encoded").check()
    person.page.get_by_label("Noise").fill("0.01")
    person.restores()
    downloaded, command = person.downloads(tmp_path), shlex.split(person.command())
    found = read_photograph(downloaded)
    assert (downloaded.name, found.dtype, found.metadata.icc) == ("deep-restored.tiff", np.uint16, PROFILE)
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    os.symlink(photographs / "deep.tiff", "deep.tiff")
    assert run(*command[1:]).exit_code == 0
    assert Path(downloaded.name).read_bytes() == downloaded.read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.png", "Error: broken.png: broken PNG file (the chunk at byte"),
        ("bomb.png", "Error: bomb.png: has 30000 × 30000 pixels; it takes up to 1 million"),
    ],
)
def test_a_broken_or_too_large_photograph_is_one_sentence(person, photographs, name, message):
    person.page.set_input_files("#photograph input[type=file]", photographs / name)
    assert message in person.reads("Error:") and not person.page.locator("#download").is_visible()
    assert "Traceback" not in person.page.content()


def test_a_file_of_too_many_bytes_is_refused(person, photographs):
    person.page.set_input_files("#photograph input[type=file]", photographs / "heavy.png")
    person.page.get_by_text("exceed").or_(person.page.get_by_text("too large")).first.wait_for()
    assert "Choose a photograph" in person.reads("Choose")


def test_stop_ends_a_restoration(person, photographs, server):
    person.chooses(photographs / "long.jpg")
    person.page.get_by_label("Gaussian", exact=True).check()
    assert person.page.locator("#stop").is_disabled()
    person.page.click("#restore")
    person.reads("evaluation")
    person.page.click("#stop")
    assert person.reads("Stopped") and person.page.locator("#stop").is_disabled()
    person.page.locator("#photograph").get_by_label("Clear").click()
    person.chooses(photographs / "small.png")
    person.restores()  # there is one worker, which is free again


def test_two_people_at_once_get_their_own_results(someone, photographs, tmp_path):
    first, second = someone(), someone()
    for person, name, sigma in ((first, "small.png", "0.7"), (second, "deep.tiff", "1.1")):
        person.chooses(photographs / name)
        person.page.get_by_label("Gaussian", exact=True).check()
        person.page.get_by_label("σ in pixels").fill(sigma)
    for person in (first, second):
        person.page.click("#restore")
    for person, name, sigma in ((first, "small-restored.png", "0.7"), (second, "deep-restored.tiff", "1.1")):
        assert name in person.reads("Restored in") and f"--sigma {sigma}" in person.command()
        assert person.downloads(tmp_path).name == name
    shapes = [read_photograph(tmp_path / name).pixels.shape for name in ("small-restored.png", "deep-restored.tiff")]
    assert shapes == [(3, 80, 96), (3, 96, 80)]  # the second was turned upright


def test_all_of_it_works_with_the_keyboard_alone(person, photographs, tmp_path):
    press = person.page.keyboard.press

    def focus(what):
        person.page.evaluate("document.activeElement.blur()")
        for _ in range(60):
            press("Tab")
            if person.page.evaluate("what => document.activeElement.matches(what)", what):
                return
        raise AssertionError(f"Tab does not reach {what}")

    focus("#photograph button")
    with person.page.expect_file_chooser() as chooser:
        press("Enter")
    chooser.value.set_files(photographs / "small.png")
    person.reads("Press Restore")
    focus("#blur input[value=gaussian]")
    press("Space")
    focus("#sigma textarea, #sigma input")
    press("Control+A")
    person.page.keyboard.type("0.9")
    focus("#restore")
    assert person.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    press("Enter")
    person.reads("Restored in")
    assert person.findings()["Blur"] == "a Gaussian of σ = 0.9 pixels"
    shown = person.page.locator("#slider img").nth(1).get_attribute("style")
    focus("#share input[type=range]")
    press("ArrowRight")
    person.page.wait_for_function(
        "shown => document.querySelectorAll('#slider img')[1].style.cssText != shown", arg=shown
    )
    focus("#download")
    with person.page.expect_download() as waiting:
        press("Enter")
    assert waiting.value.suggested_filename == "small-restored.png"


def test_a_narrow_window_shows_everything(someone, photographs):
    person = someone(viewport={"width": 390, "height": 800})
    person.chooses(photographs / "small.png")
    person.restores()
    assert person.page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("#photograph", "#blur", "#restore", "#stop", "#slider", "#download", "#findings", "#plot"):
        box = person.page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, name


def test_a_reloaded_page_begins_anew_and_works(person, photographs):
    person.chooses(photographs / "small.png")
    person.restores()
    person.page.reload()
    assert "Choose a photograph" in person.reads("Choose") and not person.page.locator("#download").is_visible()
    person.chooses(photographs / "small.png")
    person.restores()
