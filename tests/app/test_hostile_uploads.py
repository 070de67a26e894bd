"""Two hundred uploads that nobody should make, over HTTP: each is restored or refused in a sentence."""

import html
import io
import json
import re
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.photographs import SIGNATURE, chunk, lzw_tiff, pillow, png, samples, tagged, tiff
from jfbfast.imaging.photographs import IMAGE_SUFFIXES

pytestmark = pytest.mark.slow

UPLOADS = 200
NAMES = (
    "../../../outside.png",
    "..\\outside.png",
    "/etc/outside.png",
    "two\nlines.png",
    "quote\"s'and$(touch x);.png",
    "<img src=x onerror=alert(1)>.png",
    "naïve 😀 写真.png",
    "x" * 300 + ".png",
    ".png",
    "no suffix",
    "-overwrite.png",
    "NUL.png",
    "a\0b.png",
    "*.png",
    "{name}.png",
    "x-restored.png",
)


def sound():
    """Images of many kinds, as (suffix, content)."""
    eight, deep = samples("uint8", size=(24, 33)), samples("uint16", size=(24, 33))
    colours = Image.fromarray(eight)
    yield "png", png(eight)
    yield "png", png(deep)
    yield "png", png(samples("uint8", 4, (24, 33)))
    yield "png", pillow(colours.quantize(16), "PNG")
    yield "png", pillow(colours.convert("1"), "PNG")
    yield "jpg", pillow(eight, "JPEG")
    yield "jpg", tagged("jpeg", eight, 6)
    yield "jpg", pillow(colours.convert("CMYK"), "JPEG")
    yield "tif", tiff(eight)
    yield "tif", tagged("tiff", deep, 3)
    yield "tif", tiff(samples("float32", size=(24, 33)))
    yield "tif", lzw_tiff(eight)
    yield "webp", pillow(eight, "WEBP", lossless=True)
    yield "bmp", pillow(eight, "BMP")
    yield "ppm", b"P6 33 24 255\n" + eight.tobytes()


def bombs_and_others():
    """What no photograph is: too large, not finite, several in one, or another kind of file; as (suffix, content)."""
    eight = samples("uint8", size=(24, 33))
    header = struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    yield "png", SIGNATURE + chunk(b"IHDR", header) + png(eight)[33:]
    yield "png", pillow(np.zeros((4000, 4000), np.uint8), "PNG")  # 16 megapixels in 16 kB
    yield "jpg", re.sub(rb"(?<=\xff\xc0...)....", b"\xff\xdc" * 2, pillow(eight, "JPEG"), flags=re.DOTALL)
    yield "ppm", b"P6 60000 60000 255\n"
    yield "tif", tiff(np.zeros((3000, 3000), np.uint8), compression="zlib")
    yield "bmp", pillow(eight, "BMP")[:18] + struct.pack("<2i", 60_000, 60_000) + pillow(eight, "BMP")[26:]
    yield "webp", pillow(np.zeros((2000, 2000, 3), np.uint8), "WEBP")
    yield "tif", tiff(np.full((9, 9), np.nan, np.float32))
    yield "tif", tiff(np.full((9, 9), np.inf, np.float32))
    frames = [Image.fromarray(samples("uint8", size=(9, 9), seed=seed)) for seed in range(3)]
    for suffix, kind in (("webp", "WEBP"), ("png", "PNG"), ("tif", "TIFF"), ("gif", "GIF")):
        yield suffix, pillow(frames[0], kind, save_all=True, append_images=frames[1:])
    for height, width in ((1, 1), (1, 900), (900, 1), (2, 3)):
        yield "png", png(samples("uint8", size=(height, width)))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../outside.png", png(eight))
    yield "png", packed.getvalue()
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    yield "html", b"<script>alert(1)</script>"
    yield "png", b"<script>alert(1)</script>"
    yield "png", b""
    yield "tif", b"II*\0\x08\0\0\0\xff\xff" + bytes(40)
    yield "npy", b"\x93NUMPY\x01\0v\0{'descr': '<f8', 'fortran_order': False, 'shape': (9999999, 9999), }".ljust(128)


def uploads():
    """`UPLOADS` of them, as (name, content): sound ones with odd names, odd ones, and damaged ones of each kind."""
    random, images = np.random.default_rng(0), list(sound())
    yield from ((name, images[k % len(images)][1]) for k, name in enumerate(NAMES))
    given = len(NAMES)
    for suffix, content in [*images, *bombs_and_others()]:
        yield f"upload.{suffix}", content
        given += 1
    while given < UPLOADS:
        suffix, content = images[given % len(images)]
        damage = given // len(images) % 4
        changed = bytearray(content)
        if damage == 0:
            changed = changed[: random.integers(1, len(changed))]
        elif damage == 1:
            for place in random.integers(0, len(changed), random.integers(1, 20)):
                changed[place] ^= 1 << random.integers(8)
        elif damage == 2:
            suffix = images[random.integers(len(images))][0]
        else:
            start = random.integers(0, len(changed))
            changed[start : start + 16] = random.bytes(16)
        yield f"damaged {given}.{suffix}", bytes(changed)
        given += 1


class Client:
    """Someone who speaks to the server without a browser."""

    def __init__(self, server):
        import httpx

        self.http = httpx.Client(base_url=f"{server.address}/gradio_api", timeout=120, trust_env=False)

    def upload(self, name, content):
        """The path of the upload on the server, or None if it was refused."""
        reply = self.http.post("/upload", files={"files": (name, content)})
        assert reply.status_code < 500 and "Traceback" not in reply.text, (name, reply.text)
        return reply.json()[0] if reply.status_code == 200 else None

    def call(self, function, *values):
        """What the page would show at last: its values, or None if the request itself was refused."""
        begun = self.http.post(f"/call/{function}", json={"data": values})
        assert begun.status_code < 500, (values, begun.text)
        if begun.status_code != 200:
            return None
        told = self.http.get(f"/call/{function}/{begun.json()['event_id']}").text
        assert "Traceback" not in told, told
        kind, data = re.findall(r"event: (\w+)\ndata: (.*)", told)[-1]
        return json.loads(data) if kind == "complete" else None

    def restore(self, path, psf=None):
        """The sentence that the page shows at last, and the restored file on the server, if there is one."""
        photograph, point = (
            None if each is None else {"path": each, "meta": {"_type": "gradio.FileData"}} for each in (path, psf)
        )
        blur = "gaussian" if psf is None else "psf"
        found = self.call("restore", photograph, blur, "1", 1, 1, 1, point, "0.01", "encoded", "tikhonov")
        if found is None:
            return None
        assert len(re.findall("<p", found[0])) == 1, found[0]
        told, download = html.unescape(re.sub("<[^>]*>", "", found[0])), found[4]
        return told, download["value"]["path"] if isinstance(download.get("value"), dict) else None


@pytest.fixture
def client(server):
    made = Client(server)
    yield made
    made.http.close()
    assert server.faults() == []


def test_200_hostile_uploads_are_restored_or_refused_in_a_sentence(client, server):
    def one(upload):
        name, content = upload
        path = client.upload(name, content)
        return upload, path, None if path is None else client.restore(path)

    given = list(uploads())
    assert len(given) == UPLOADS
    with ThreadPoolExecutor(4) as several:
        results = list(several.map(one, given))
    restored = 0
    for (name, _), path, result in results:
        if path is None:
            continue
        assert path.startswith(str(server.temporary)) and ".." not in Path(path).parts, (name, path)
        if result is None:  # refused by its name alone
            assert Path(path).suffix not in IMAGE_SUFFIXES, (name, path)
            continue
        told, download = result
        assert "\n" not in told and str(server.temporary) not in told, (name, told)
        assert re.match(r"Restored in|Error: .{10}", told), (name, told)
        assert (download is not None) == told.startswith("Restored"), (name, told)
        assert download is None or download.startswith(str(server.temporary)), (name, download)
        restored += download is not None
    kinds = len(list(sound()))
    impossible = [result for _, _, result in results[len(NAMES) + kinds :][:9]]  # too large, or not finite
    assert [download for _, download in impossible] == [None] * 9, impossible
    assert UPLOADS // 4 < restored < 3 * UPLOADS // 4
    assert client.restore(client.upload("good.png", png(samples("uint8", size=(24, 33)))))[0].startswith("Restored in")


def test_a_hostile_point_spread_function_is_refused_in_a_sentence(client):
    photograph = client.upload("good.png", png(samples("uint8", size=(24, 33))))
    for number, (suffix, content) in enumerate(bombs_and_others()):
        result = client.restore(photograph, client.upload(f"point.{suffix}", content))
        if result is None:  # refused by its name alone
            assert suffix not in ("png", "tif", "npy")
            continue
        told, download = result
        assert told.startswith(("Error: ", "Restored in")) and len(told) < 400, told
        assert download is None or number >= 9, told  # the first are too large, or not finite


def test_an_upload_that_is_an_address_is_refused_and_not_fetched(client, server):
    path = "https://jfbfast.invalid/x.png"
    assert client.call("look", {"path": path, "meta": {"_type": "gradio.FileData"}}) is None
    assert f"an upload is {path}; it takes a file" in server.errors.read_text("utf-8")


def test_only_uploads_are_read_and_no_upload_is_served_as_a_page(client, server):
    for path in ("/etc/passwd", "../../etc/passwd", f"{server.temporary}/../stderr", "http://127.0.0.1:1/x.png", ""):
        assert client.restore(path) is None or client.restore(path)[0].startswith("Error: ")
        assert client.http.get(f"/file={path}").status_code in (403, 404)
    for suffix, content in (("svg", b"<svg><script>alert(1)</script></svg>"), ("html", b"<script>alert(1)</script>")):
        path = client.upload(f"page.{suffix}", content)
        reply = client.http.get(f"/file={path}")
        assert "sandbox" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["content-disposition"].startswith("attachment")
    reply = client.http.post("/upload", files={"files": ("heavy.png", bytes(2_000_001))})
    assert 400 <= reply.status_code < 500 and "Traceback" not in reply.text
    assert client.http.get("/../", headers={"host": "elsewhere.example"}).status_code == 400
