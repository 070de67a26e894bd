"""Image files of many kinds, written without the library's own encoders where others can."""

import io
import struct
import zlib

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageCms

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DPI = (300.0, 150.0)
ORIENTATION, ARTIST, DETAILS, GPS, WIDTH = 274, 315, 0x8769, 0x8825, 40962  # tags of EXIF

# What a viewer does to show each orientation upright.
UPRIGHT = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def samples(dtype, channels=3, size=(6, 9), seed=0):
    """Random samples, (H, W, channels)."""
    values = np.random.default_rng(seed).random((*size, channels))
    white = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    return (values * white).astype(dtype)


def to_floats(array):
    return array.astype(np.float64) / (1 if array.dtype.kind == "f" else np.iinfo(array.dtype).max)


def exif_bytes(orientation=1, width=9):
    """EXIF data in TIFF's form: an artist's name that is not ASCII, a width, and a latitude."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[ARTIST] = "Zoë ©".encode()
    exif.get_ifd(DETAILS)[WIDTH] = width
    exif.get_ifd(GPS)[2] = (52.0, 30.0, 15.25)
    return exif.tobytes().removeprefix(b"Exif\0\0")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


SIGNATURE, END = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")


def png(array, *chunks, depth=None):
    """A PNG of samples (H, W, channels), or of packed grey rows (H, bytes) of another depth; with more chunks."""
    rows = array.astype(array.dtype.newbyteorder(">")).view(np.uint8).reshape(len(array), -1)
    height, width, channels = (array.shape[0], array.shape[1] * 8 // depth, 1) if depth else array.shape
    depth = depth or 8 * array.itemsize
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0))
    parts = [chunk(*each) for each in (*chunks, (b"IDAT", data))]
    return b"".join([SIGNATURE, header, *parts, END])


def tiff(array, **options):
    """A TIFF of (H, W, channels) or (H, W), by tifffile."""
    out = io.BytesIO()
    channels = 1 if array.ndim == 2 else array.shape[2]
    options = {"photometric": "rgb" if channels > 2 else "minisblack", "software": False, **options}
    if channels in (2, 4):
        options = {"extrasamples": ["unassalpha"], "planarconfig": "contig", **options}
    tifffile.imwrite(out, array[:, :, 0] if array.ndim == 3 and channels == 1 else array, metadata=None, **options)
    return out.getvalue()


def pillow(image, kind, **options):
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def lzw_tiff(array):
    return cv2.imencode(".tiff", array[:, :, ::-1])[1].tobytes()


def tagged(kind, array, orientation):
    """Write a file with profile, EXIF and resolution, in the format of its suffix."""
    exif = exif_bytes(orientation, array.shape[1])
    if kind == "png":
        resolution = struct.pack(">2IB", *(round(value / 0.0254) for value in DPI), 1)
        profile = b"any\0\0" + zlib.compress(PROFILE)
        return png(array, (b"iCCP", profile), (b"pHYs", resolution), (b"eXIf", exif))
    if kind == "tiff":
        artist = (ARTIST, 2, 0, "Zoë ©".encode() + b"\0", True)
        tags = [(ORIENTATION, 3, 1, orientation, True), artist]
        return tiff(array, extratags=tags, iccprofile=PROFILE, resolution=DPI, resolutionunit=2)
    options = {"exif": b"Exif\0\0" + exif, "icc_profile": PROFILE}
    if kind == "jpeg":
        return pillow(array, "JPEG", quality=100, subsampling=0, dpi=DPI, **options)
    return pillow(array, "WEBP", lossless=True, exact=True, **options)
