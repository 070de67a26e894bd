"""Make docs/restoring.jpg, docs/gallery.jpg, and the tables of docs/restoring.md, from photographs of scikit-image."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import Tensor

import jfbfast
from jfbfast.imaging.blurs import BlurChoice
from jfbfast.imaging.light import to_encoded, to_linear

NAMES = ("astronaut", "coffee", "chelsea", "rocket")  # in the public domain, or CC0
MARGIN, BORDER = 32, 10
SHOWN = {"astronaut": (60, 150), "rocket": (60, 190), "coffee": (60, 150), "chelsea": (60, 130)}  # top, left
SIDE = 110


def scene(name: str) -> Tensor:
    pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels[:, :300, :420].contiguous()


def photograph(
    sharp: Tensor,
    sigma: float | tuple[float, float] = 1.5,
    light: str = "linear",
    quality: int | None = None,
    exposure: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A blurred photograph in 8 bits or as a JPEG, cut out of a larger scene, and the sharp one."""
    largest = max(sigma) if isinstance(sigma, tuple) else sigma
    blur = jfbfast.GaussianBlur(2 * math.ceil(4 * largest) + 1, sigma, "reflect")
    bright = to_encoded(exposure * (to_linear(sharp) + 1) - 1)
    d = to_encoded(blur(to_linear(bright))) if light == "linear" else blur(bright)
    array = ((d + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    if quality is not None:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        array = np.asarray(Image.open(file))
    d = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1
    inner = slice(MARGIN, -MARGIN)
    return d[:, inner, inner].contiguous(), bright.clamp(-1, 1)[:, inner, inner].contiguous()


def gains(x: Tensor, d: Tensor, sharp: Tensor) -> tuple[float, float]:
    """The gain of x over d in dB: in the middle, and within 10 pixels of the border."""
    edge = torch.ones(d.shape[-2:], dtype=torch.bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    errors = [(image.clamp(-1, 1) - sharp).square() for image in (d, x)]
    middle, border = (10 * math.log10(errors[0][:, at].mean() / errors[1][:, at].mean()) for at in (~edge, edge))
    return middle, border


def trusting(d: Tensor, **options: object) -> Tensor:
    """Restore as if no pixel were clipped."""
    with patch.multiple("jfbfast.imaging.camera", WHITEST=9.0, BLACKEST=-9.0):
        return jfbfast.restore(d, **options).image  # type: ignore[arg-type]


def restore(d: Tensor, **options: object) -> Tensor:
    return jfbfast.restore(d, **options).image  # type: ignore[arg-type]


Method = tuple[str, Callable[[Tensor], Tensor]]
ROWS: list[tuple[str, str, dict[str, object], Method, Method]] = [
    (
        "wrong light",
        "astronaut",
        {"light": "linear"},
        ("--light encoded", lambda d: restore(d, sigma=1.5, light="encoded")),
        ("--light linear", lambda d: restore(d, sigma=1.5)),
    ),
    (
        "σ wrong by 20%",
        "chelsea",
        {},
        ("σ = 1.8, tolerance 0, noise 0.003", lambda d: restore(d, sigma=1.8, tolerance=0.0, noise=0.003)),
        ("σ = 1.8, as by default", lambda d: restore(d, sigma=1.8)),
    ),
    (
        "JPEG, quality 75",
        "coffee",
        {"quality": 75},
        ("noise 0.003", lambda d: restore(d, sigma=1.5, noise=0.003)),
        ("noise estimated, as by default", lambda d: restore(d, sigma=1.5)),
    ),
    (
        "saturated",
        "astronaut",
        {"exposure": 2.5},
        ("clipped pixels trusted", lambda d: trusting(d, sigma=1.5, noise=0.003)),
        ("not trusted", lambda d: restore(d, sigma=1.5, noise=0.003)),
    ),
]


def picture(path: Path) -> None:
    """Draw what goes wrong, one thing a row, and what restore does against it."""
    figure, axes = plt.subplots(4, 4, figsize=(9.6, 10.2), layout="constrained")
    for row, (what, name, made, wrong, right) in zip(axes, ROWS, strict=True):
        d, sharp = photograph(scene(name), **made)  # type: ignore[arg-type]
        top, left = (0, 0) if what == "saturated" else SHOWN[name]
        cells = [("photographed", d), *((label, method(d)) for label, method in (wrong, right)), ("sharp", sharp)]
        for axis, (label, image) in zip(row, cells, strict=True):
            gain = f", {gains(image, d, sharp)[0]:+.1f} dB" if label not in ("photographed", "sharp") else ""
            part = image.clamp(-1, 1)[:, top : top + SIDE, left : left + SIDE]
            axis.imshow(((part + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_title(f"{label}{gain}", fontsize=7.5)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(what, fontsize=10)
    figure.savefig(path, dpi=130, pil_kwargs={"quality": 88})


def table(checkpoint: str | None) -> None:
    """Print the mean gains over the photographs, by the shipped network or by Tikhonov regularisation."""
    print(
        "| the photograph | " + " | ".join(("told exactly", "the other light", "σ × 0.8", "σ × 1.2", "σ auto")) + " |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for sigma, light, quality in (
        (1.0, "encoded", None),
        (1.0, "linear", None),
        (1.0, "linear", 90),
        (2.0, "linear", 90),
        ((0.7, 1.3), "linear", None),
    ):
        made = [photograph(scene(name), sigma, light, quality) for name in NAMES]
        size = 1.0 if isinstance(sigma, tuple) else sigma  # an anisotropic blur is told as a round one
        other = "linear" if light == "encoded" else "encoded"
        cells = []
        for told, given in (
            (light, size),
            (other, size),
            (light, 0.8 * size),
            (light, 1.2 * size),
            (light, "auto"),
        ):
            options = {"sigma": given, "light": told, "checkpoint": checkpoint}
            found = [gains(restore(d, **options), d, sharp) for d, sharp in made]
            middle, border = (sum(each) / len(each) for each in zip(*found, strict=True))
            cells.append(f"{middle:.1f} / {border:.1f}".replace("-", "−"))
        kind = f"σ = {sigma}".replace("(", "").replace(")", "").replace(".0", "")
        row = f"{kind}, {light if light == 'linear' else 'encoded values'}"
        print(f"| {row}, {'8 bits' if quality is None else f'JPEG {quality}'} | {' | '.join(cells)} |", flush=True)


def shot(name: str, blur: jfbfast.Blur | jfbfast.GaussianBlur, noise: float, quality: int) -> tuple[Tensor, Tensor]:
    """A photograph that a camera took through this blur, as a JPEG, and the sharp one in its frame."""
    pixels = torch.from_numpy(getattr(data, name)()).float() / 127.5 - 1
    sharp = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()
    d = to_encoded(blur(to_linear(sharp[None])))[0]
    d = d + noise * torch.randn(d.shape, generator=torch.Generator().manual_seed(0))
    array = ((d + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, "JPEG", quality=quality, subsampling=0)
    pixels = torch.from_numpy(np.array(Image.open(file))).float() / 127.5 - 1
    y, x = blur.margin
    height, width = sharp.shape[-2:]
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1), sharp[:, y : height - y, x : width - x]


GALLERY: list[tuple[str, str, dict[str, object], float, int, dict[str, object], tuple[int, int]]] = [
    ("astronaut", "--sigma 1.5", {"sigma": 1.5}, 0.004, 92, {}, (10, 80)),
    ("coffee", "--defocus 3", {"defocus": 3.0}, 0.004, 92, {}, (60, 130)),
    ("rocket", "--motion 11,30", {"motion": (11.0, 30.0)}, 0.004, 92, {}, (200, 260)),
    ("chelsea", "--sigma auto", {"sigma": 2.0}, 0.004, 92, {"sigma": "auto"}, (0, 70)),
    ("camera", "--sigma 1.2, noisy", {"sigma": 1.2}, 0.06, 95, {}, (10, 110)),
    ("hubble_deep_field", "--sigma 1.5, JPEG of quality 60", {"sigma": 1.5}, 0.004, 60, {}, (400, 300)),
]


def gallery(path: Path, side: int = 150) -> None:
    """Draw six photographs before and after: each blurred in another way, in linear light, and saved as a JPEG."""
    figure, axes = plt.subplots(4, 3, figsize=(9.6, 13.2), layout="constrained")
    for k, (name, title, made, noise, quality, told, (top, left)) in enumerate(GALLERY):
        blur = BlurChoice(**made).operator("valid")  # type: ignore[arg-type]
        d, sharp = shot(name, blur, noise, quality)
        d, sharp = (each[:, top : top + 2 * side, left : left + 2 * side].contiguous() for each in (d, sharp))
        x, report = jfbfast.restore(d, **(told or made))  # type: ignore[arg-type]
        gain = 10 * math.log10((d - sharp).square().mean() / (x.clamp(-1, 1) - sharp).square().mean())
        found = f", σ = {report.estimated.sigma:.1f} found" if told and report.estimated else ""
        inner = slice(side // 2, side // 2 + side)
        for row, image, label in ((0, d, title), (1, x, f"restored{found}, {gain:+.1f} dB")):
            axis = axes[2 * (k // 3) + row, k % 3]
            part = ((image.clamp(-1, 1) + 1) / 2)[:, inner, inner].permute(1, 2, 0).numpy()
            axis.imshow(part.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(label, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        print(f"{name}: {title}: {gain:+.1f} dB; {report.method}, {report.evaluations} evaluations", flush=True)
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    torch.set_num_threads(1)
    jfbfast.keep_freed_memory()
    gallery(Path(__file__).with_name("gallery.jpg"))
    picture(Path(__file__).with_suffix(".jpg"))
    for method in (None, "tikhonov"):
        table(method)
