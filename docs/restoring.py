"""Make docs/restoring.jpg, and the table of docs/restoring.md, from photographs of scikit-image."""

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
from jfbfast.imaging.light import to_encoded, to_linear

NAMES = ("astronaut", "coffee", "chelsea", "rocket")  # in the public domain, or CC0
MARGIN, BORDER = 32, 10
SHOWN = {"astronaut": (60, 150), "rocket": (60, 190), "coffee": (60, 150), "chelsea": (60, 130)}  # top, left
SIDE = 110


def scene(name: str) -> Tensor:
    pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels[:, :300, :420].contiguous()


def photograph(
    sharp: Tensor, sigma: float = 1.5, light: str = "linear", quality: int | None = None, exposure: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A blurred photograph in 8 bits or as a JPEG, cut out of a larger scene, and the sharp one."""
    blur = jfbfast.GaussianBlur(2 * math.ceil(4 * sigma) + 1, sigma, "reflect")
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
        ("noise 0.01, as by default", lambda d: restore(d, sigma=1.5)),
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


def table() -> None:
    """Print the mean gains over the photographs."""
    print("| the photograph | " + " | ".join(("told exactly", "wrong light", "σ × 0.8", "σ × 1.2")) + " |")
    for sigma, light, quality in (
        (1.0, "encoded", None),
        (1.0, "linear", None),
        (1.0, "linear", 90),
        (2.0, "linear", 90),
    ):
        made = [photograph(scene(name), sigma, light, quality) for name in NAMES]
        other = "linear" if light == "encoded" else "encoded"
        cells = []
        for told, share in ((light, 1.0), (other, 1.0), (light, 0.8), (light, 1.2)):
            found = [gains(restore(d, sigma=share * sigma, light=told), d, sharp) for d, sharp in made]
            middle, border = (sum(each) / len(each) for each in zip(*found, strict=True))
            cells.append(f"{middle:+.1f} / {border:+.1f}")
        kind = f"σ = {sigma:g}, {light}, {'8 bits' if quality is None else f'JPEG {quality}'}"
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    picture(Path(__file__).with_suffix(".jpg"))
    table()
