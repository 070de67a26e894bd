"""Image files of every kind: samples are read as defined, metadata survives, and the rest is refused."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from helpers.photographs import (
    ARTIST,
    DETAILS,
    DPI,
    END,
    GPS,
    ORIENTATION,
    PROFILE,
    SIGNATURE,
    UPRIGHT,
    WIDTH,
    chunk,
    exif_bytes,
    lzw_tiff,
    pillow,
    png,
    samples,
    tagged,
    tiff,
    to_floats,
)
from jfbfast.imaging.photographs import ImageError, Metadata, Photograph, read_photograph, write_photograph


def read(path, content):
    path.write_bytes(content)
    return read_photograph(path)


def short_png(array):
    """A PNG without its last rows, all checksums right."""
    whole, short = png(array), png(array[:3])
    return whole[:33] + short[33:]  # the header of one, the data of the other


def with_an_empty_strip(array):
    """A TIFF that gives one of its strips no bytes."""
    out = io.BytesIO(tiff(array, compression="zlib", rowsperstrip=2))
    with tifffile.TiffFile(out, mode="r+b") as file:
        tag = file.pages.first.tags["StripByteCounts"]
        tag.overwrite((tag.value[0], 0, tag.value[2]))
    return out.getvalue()


def values(photograph):
    """(H, W, channels), alpha last."""
    parts = [photograph.pixels] if photograph.alpha is None else [photograph.pixels, photograph.alpha]
    return torch.cat(parts).permute(1, 2, 0).numpy()


def stored(path):
    """The samples and the metadata of a written file, as others read them."""
    content = path.read_bytes()
    exif = Image.Exif()
    if path.suffix == ".tiff":
        page = tifffile.TiffFile(io.BytesIO(content)).pages[0]
        array, profile = page.asarray(), page.tags[34675].value
        dpi = tuple(page.tags[tag].value[0] / page.tags[tag].value[1] for tag in (282, 283) if tag in page.tags)
        exif.load(content)
    else:
        image = Image.open(io.BytesIO(content))
        array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if array.ndim == 3:
            array = array[:, :, [2, 1, 0, 3][: array.shape[2]]]
        profile, dpi, exif = image.info["icc_profile"], image.info.get("dpi"), image.getexif()
    return array.reshape(*array.shape[:2], -1), profile, dpi, exif


KINDS = [
    *[("png", dtype, channels) for dtype in ("uint8", "uint16") for channels in (1, 2, 3, 4)],
    *[("tiff", dtype, channels) for dtype in ("uint8", "uint16", "float32") for channels in (1, 3, 4)],
    ("jpeg", "uint8", 1),
    ("jpeg", "uint8", 3),
    ("webp", "uint8", 3),
]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(("kind", "dtype", "channels"), KINDS)
def test_photographs_come_back_upright_with_profile_exif_and_resolution(tmp_path, kind, dtype, channels, orientation):
    array = samples(dtype, channels)
    content = tagged(kind, array[:, :, 0] if kind == "jpeg" and channels == 1 else array, orientation)
    if kind == "jpeg":
        array = np.asarray(Image.open(io.BytesIO(content))).reshape(6, 9, -1)
    upright = UPRIGHT.get(orientation, lambda a: a)(array)
    photograph = read(tmp_path / f"source.{kind}", content)
    assert photograph.dtype == dtype
    np.testing.assert_allclose(values(photograph), to_floats(upright), atol=1e-6)
    for suffix in (".png", ".tiff"):
        if (suffix == ".png" and dtype == "float32") or (suffix == ".tiff" and channels == 2):
            continue  # the format cannot hold it
        write_photograph(tmp_path / f"out{suffix}", photograph)
        found, profile, dpi, exif = stored(tmp_path / f"out{suffix}")
        np.testing.assert_array_equal(found, upright[:, :, [0, 0, 0, 1]] if channels == 2 else upright)
        assert profile == PROFILE
        assert exif.get(ORIENTATION, 1) == 1 and exif[ARTIST].encode("latin-1").decode() == "Zoë ©"
        if kind != "webp":
            assert dpi == pytest.approx(DPI[::-1] if 5 <= orientation <= 8 else DPI, abs=0.02)
        if kind != "tiff":
            assert exif.get_ifd(DETAILS)[WIDTH] == upright.shape[1]
            assert tuple(map(float, exif.get_ifd(GPS)[2])) == (52.0, 30.0, 15.25)


def test_a_jpeg_keeps_metadata_too(tmp_path):
    photograph = read(tmp_path / "source.png", tagged("png", samples("uint8"), 6))
    write_photograph(tmp_path / "out.jpg", photograph)
    image = Image.open(io.BytesIO((tmp_path / "out.jpg").read_bytes()))
    assert image.info["icc_profile"] == PROFILE and image.info["dpi"] == DPI[::-1] and image.size == (6, 9)
    assert image.getexif()[ARTIST].encode("latin-1").decode() == "Zoë ©" and ORIENTATION not in image.getexif()


def test_a_tag_that_points_nowhere_is_left_out(tmp_path):
    exif = b"MM\0*\0\0\0\x08\0\2" + struct.pack(">HHLL", 271, 2, 9, 999) + struct.pack(">HHLL", GPS, 4, 1, 999)
    photograph = read(tmp_path / "a.png", png(samples("uint8"), (b"eXIf", exif + bytes(4))))
    assert photograph.metadata.exif == b""


def test_a_file_without_metadata_gets_none(tmp_path):
    for name, content in (("a.jpg", pillow(samples("uint8"), "JPEG")), ("b.png", png(samples("uint16")))):
        assert read(tmp_path / name, content).metadata == Metadata()


def test_a_png_keeps_its_colour_space_and_other_formats_refuse_it(tmp_path):
    linear = (b"gAMA", struct.pack(">I", 100_000))
    for array in (samples("uint8"), samples("uint16")):
        photograph = read(tmp_path / "linear.png", png(array, linear))
        write_photograph(tmp_path / "out.png", photograph)
        assert chunk(*linear) in (tmp_path / "out.png").read_bytes()
        with pytest.raises(ImageError, match=r"out\.tiff: \.tiff cannot hold the definition of its colours \(gAMA\)"):
            write_photograph(tmp_path / "out.tiff", photograph)
    write_photograph(tmp_path / "out.tiff", read(tmp_path / "s.png", png(samples("uint8"), (b"sRGB", b"\0"), linear)))


GREY, RGB, DEEP = samples("uint8", 1), samples("uint8"), samples("uint16")
PALETTE = Image.fromarray(RGB).quantize(16)
HALVES = np.array([[512, 0], [1023, 1]])[:, :, None]
PRIMARIES = np.array([[[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]])
JPEG_TIFF = cv2.imencode(".tiff", cv2.resize(RGB, (36, 24)), [cv2.IMWRITE_TIFF_COMPRESSION, 7])[1].tobytes()
BMP_555 = b"BM" + struct.pack("<LHHLLllHHLLllLL", 62, 0, 0, 54, 40, 4, 1, 1, 16, 0, 8, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    {
        "10-bit PGM": (b"P5 2 2 1023\n" + HALVES.astype(">u2").tobytes(), HALVES / 1023),
        "7-bit PGM": (b"P5\n# 3 4\n2 1\n# comment\n100\n" + bytes([50, 100]), np.array([[[0.5], [1]]])),
        "16-bit PPM": (b"P6\n9 6\n65535\n" + DEEP.astype(">u2").tobytes(), to_floats(DEEP)),
        "4-bit PNG": (png(np.array([[0x0F, 0x30]], np.uint8), depth=4), np.array([[[0], [15], [3], [0]]]) / 15),
        "palette PNG": (pillow(PALETTE, "PNG"), to_floats(np.asarray(PALETTE.convert("RGB")))),
        "transparent colour": (
            png(RGB, (b"tRNS", struct.pack(">3H", *map(int, RGB[0, 0])))),
            to_floats(np.dstack((RGB, 255 * np.any(RGB[0, 0] != RGB, axis=2).astype(np.uint8)))),
        ),
        "sBIT": (png(DEEP, (b"sBIT", b"\x0a\x0a\x0a")), to_floats(DEEP)),
        "BMP of 5 bits": (BMP_555 + struct.pack("<4H", 0x7FFF, 0x7C00, 0x03E0, 0x001F), PRIMARIES),
        "white is zero": (tiff(GREY, photometric="miniswhite"), 1 - to_floats(GREY)),
        "16-bit white is zero": (tiff(DEEP[:, :, :1], photometric="miniswhite"), 1 - to_floats(DEEP[:, :, :1])),
        "16-bit grey with alpha": (tiff(samples("uint16", 2)), to_floats(samples("uint16", 2))),
        "YCbCr in JPEG": (JPEG_TIFF, to_floats(cv2.imdecode(np.frombuffer(JPEG_TIFF, np.uint8), 1)[:, :, ::-1])),
        "palette TIFF": (pillow(PALETTE, "TIFF"), to_floats(np.asarray(PALETTE.convert("RGB")))),
        "LZW": (lzw_tiff(DEEP), to_floats(DEEP)),
        "big-endian": (tiff(DEEP, byteorder=">"), to_floats(DEEP)),
        "predictor": (tiff(DEEP, compression="zlib", predictor=2, rowsperstrip=2), to_floats(DEEP)),
        "tiles": (tiff(DEEP, compression="zlib", tile=(16, 16)), to_floats(DEEP)),
        "a phone's two pictures": (
            pillow(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB[::-1])]),
            to_floats(np.asarray(Image.open(io.BytesIO(pillow(RGB, "JPEG"))))),
        ),
    }.values(),
)
def test_samples_are_interpreted_as_the_format_defines(tmp_path, content, expected):
    np.testing.assert_allclose(values(read(tmp_path / "a.png", content)), expected, atol=1e-6)


def test_interlaced_rows_are_put_in_order(tmp_path):
    array = samples("uint16", 3, (5, 6))
    parts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for y, x, down, across in parts for row in array[y::down, x::across] if len(row)]
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    header = chunk(b"IHDR", struct.pack(">2I5B", 6, 5, 16, 2, 0, 0, 1))
    content = SIGNATURE + header + chunk(b"IDAT", data) + END
    process = subprocess.run(
        [sys.executable, "-P", "-c", READING, str(tmp_path / "b.png")], input=content, capture_output=True, check=True
    )
    assert not process.stdout + process.stderr  # the decoder's own remarks stay with it
    np.testing.assert_allclose(values(read(tmp_path / "a.png", content)), to_floats(array), atol=1e-6)


READING = """
import pathlib, sys
from jfbfast.imaging.photographs import read_photograph
path = pathlib.Path(sys.argv[1])
path.write_bytes(sys.stdin.buffer.read())
read_photograph(path)
"""


def with_a_damaged_tag(content, tag):
    """The TIFF with a type of that tag that there is not."""
    (start,) = struct.unpack_from("<L", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    damaged = bytearray(content)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", content, entry)[0] == tag:
            struct.pack_into("<H", damaged, entry + 2, 99)
    assert damaged != content
    return bytes(damaged)


BOTH = Image.fromarray(RGB[::-1])
RGBA16 = samples("uint16", 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pillow(RGB, "GIF"), "begins with b'GIF87a"),
        (pillow(RGB, "PNG", save_all=True, append_images=[BOTH]), "an animation"),
        (pillow(RGB, "WEBP", save_all=True, append_images=[BOTH]), "an animation of 2 frames"),
        (b"\0\0\0\x20ftypavif" + bytes(90), "begins with .*ftypavif.*; it takes JPEG, PNG, TIFF, WebP, BMP"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "begins with"),
        (b"P3 1 1 255 0 1 2", "begins with b'P3"),
        (b"P5 2 2 100\n" + bytes([0, 1, 101, 2]), "a sample of 101, above its maximum, 100"),
        (b"P5 2 2 255\n" + bytes(3), "ends too early"),
        ((b"P5 2 2 255\n" + bytes(4)) * 2, "more than its pixels"),
        (pillow(Image.fromarray(RGB).convert("CMYK"), "JPEG"), "its colours are CMYK"),
        (pillow(RGB, "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "12-bit"),
        (pillow(RGB, "JPEG")[:-40], "truncated"),
        (png(DEEP, (b"tRNS", bytes(6))), "a transparent colour and 16 bits a sample"),
        (png(np.zeros((1, 4), np.uint8), (b"tRNS", b"\0\1"), depth=4), "a transparent colour and 4 bits"),
        (SIGNATURE + chunk(b"IHDR", struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)) + END, "60000 × 60000"),
        (b"P5 20000 20000 255\n", r"20000 × 20000 pixels; it takes up to 250 million"),
        (png(RGB)[:-12], "it ends too early"),
        (short_png(RGB), "fewer rows than it tells of"),
        (
            tiff(np.zeros((16, 16, 16), np.uint8), photometric="minisblack", volumetric=True, tile=(16, 16, 16)),
            "a volume",
        ),
        (tiff(GREY, photometric="palette", colormap=np.full((3, 256), 255, np.uint16)), "its palette has 8 bits"),
        (tiff(np.moveaxis(DEEP, 2, 0), photometric="rgb", planarconfig="separate"), "its channels one after the other"),
        (tiff(RGBA16, photometric="separated", extrasamples=[]), "photometric interpretation is 5"),
        (tiff(RGBA16, extrasamples=["assocalpha"]), r"kind \(1,\); .* alpha not multiplied in"),
        (tiff(RGBA16, extrasamples=["unspecified"]), r"kind \(0,\)"),
        (lzw_tiff(RGBA16[:, :, [2, 1, 0, 3]][:, :, ::-1]), "4 samples a pixel, and no tag says what each is"),
        (pillow(Image.fromarray(RGB).convert("YCbCr"), "TIFF"), "YCbCr without JPEG compression"),
        (with_an_empty_strip(DEEP), "some of its pixels are missing"),
        (tiff(np.stack([RGB, RGB]), photometric="rgb"), "2 pages"),
        (tiff(RGB, subfiletype=1), "a preview of another image"),
        (with_a_damaged_tag(tiff(RGB, compression="zlib"), 259), "tag 259 is damaged"),
        (SIGNATURE + chunk(b"IHDR", struct.pack(">2I5B", 5, 5, 8, 0, 0, 0, 0)) * 2 + END, "broken PNG file"),
        *[(tiff(np.zeros((6, 9), kind)), "neither 8-bit") for kind in ("int8", "int16", "uint32", "float16", "double")],
        (pillow(Image.fromarray(RGB).convert("1"), "TIFF"), "neither 8-bit"),
        (b"II*\0\x08\0\0\0\xff\0", "ends too early, or is damaged"),
        (pillow(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff"), "EXIF data"),
    ],
)
def test_files_that_would_be_misread_are_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(ImageError, match=rf"a\.png: .*{message}") as error:
        read(tmp_path / "a.png", content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("array", [RGB, DEEP])
def test_damage_that_a_checksum_detects_is_refused(tmp_path, array):
    for content, start in ((png(array), 8), (tiff(array, compression="zlib"), None)):
        if start is None:
            start = tifffile.TiffFile(io.BytesIO(content)).pages[0].dataoffsets[0]
        for at in range(start, len(content)):
            damaged = bytearray(content)
            damaged[at] ^= 4
            try:
                found = values(read(tmp_path / "a.png", bytes(damaged)))
            except ImageError:
                continue
            np.testing.assert_allclose(found, to_floats(array), atol=1e-6, err_msg=f"byte {at}")


@pytest.mark.parametrize(
    ("kind", "dtype"), [("png", "uint8"), ("png", "uint16"), ("tiff", "uint16"), ("jpeg", "uint8"), ("webp", "uint8")]
)
def test_a_broken_file_raises_nothing_but_an_image_error(tmp_path, kind, dtype):
    content, random = tagged(kind, samples(dtype), 6), np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(content[: random.integers(len(content) // 2, len(content))])
        broken[random.integers(len(broken))] = random.integers(256)
        path = tmp_path / "a"
        path.write_bytes(bytes(broken))
        try:
            read_photograph(path)
        except ImageError as error:
            assert str(error).startswith(f"{path}: ")


def test_a_target_that_cannot_hold_a_photograph_is_refused_before_writing(tmp_path):
    small, eight = torch.zeros(3, 4, 4), np.dtype("uint8")
    for name, photograph, message in (
        ("a.webp", Photograph(small, None, eight), r"\.webp is no format to write; \.png, \.tiff and \.jpg are"),
        ("a.jpg", Photograph(torch.zeros(1, 1, 65_501), None, eight), "a side of 65501 pixels"),
        ("a.jpg", Photograph(small, None, eight, Metadata(exif=exif_bytes() + bytes(70_000))), "cannot be written"),
        ("a.tiff", Photograph(small[:1], small[:1], eight, Metadata(PROFILE)), "its profile is not for"),
        ("none/a.png", Photograph(small, None, eight), "there is no directory"),
        (f"{'a' * 255}.png", Photograph(small, None, eight), "too long"),
    ):
        with pytest.raises(ImageError, match=message):
            write_photograph(tmp_path / name, photograph)
    assert not list(tmp_path.iterdir())
