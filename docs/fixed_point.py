"""Make docs/fixed_point.jpg, docs/fixed_point.csv, and the tables of docs/fixed_point.md.

python docs/fixed_point.py PHOTOGRAPHS --network "fixed point=FILE" --network "applied once=FILE" … [--ffdnet FILE]

PHOTOGRAPHS is a directory of photographs of at least 256 × 256 pixels, such as Kodak's 24. `docs/fixed_point.md` says
how the networks were trained.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jfbfast
from jfbfast import Blur, GaussianBlur, SeparableBlur, point_spread
from jfbfast.imaging.datasets import Photographs
from jfbfast.imaging.images import to_floats
from jfbfast.imaging.photographs import IMAGE_SUFFIXES
from jfbfast.models.universal import KnownBlur

SIDE = 192
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # applications of the layer in the second part of the picture
OUTPUT = Path(__file__).parent


class Setting(NamedTuple):
    """A blur and a noise level on [−1, 1]; ``trained`` where the small networks saw its kind."""

    name: str
    blur: KnownBlur
    noise: float
    trained: bool


def gaussian(sigma: float) -> GaussianBlur:
    return GaussianBlur(None, sigma, "valid")


def separable(*taps: float) -> SeparableBlur:
    normalised = [tap / sum(taps) for tap in taps]
    return SeparableBlur(normalised, normalised, "valid")


def any_blur(psf: Tensor) -> Blur:
    return Blur(psf, "valid")


SETTINGS = (
    Setting("Gaussian 1.0, 0.01", gaussian(1.0), 0.01, True),
    Setting("Gaussian 1.6, 0.0157", gaussian(1.6), 0.0157, True),
    Setting("Gaussian 2.5, 0.02", gaussian(2.5), 0.02, True),
    Setting("Gaussian 1.6, 0.06", gaussian(1.6), 0.06, True),
    Setting("Gaussian 1.6, 0.2", gaussian(1.6), 0.2, True),
    Setting("box 5 × 5, 0.01", separable(*[1] * 5), 0.01, False),
    Setting("box 9 × 9, 0.01", separable(*[1] * 9), 0.01, False),
    Setting("ghosts at 6 pixels, 0.02", separable(1, 0, 0, 0, 0, 0, 1), 0.02, False),
    Setting("triangle of 9, 0.002", separable(1, 2, 3, 4, 5, 4, 3, 2, 1), 0.002, False),
    Setting("motion of 15, 0.01", any_blur(point_spread.motion(15, 30)), 0.01, False),
    Setting("defocus of 3, 0.01", any_blur(point_spread.defocus(3)), 0.01, False),
)
CURVES = ("Gaussian 1.6, 0.0157", "box 5 × 5, 0.01", "ghosts at 6 pixels, 0.02")

Method = Callable[[Setting, Tensor], tuple[Tensor, int]]  # d of one photograph → x and the evaluations of a network


class FFDNet(nn.Module):
    """The denoiser of Zhang et al. (2018) for colour images on [0, 1], for its published weights."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        widths = [13, *[96] * 11, 12]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])
        self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def forward(self, x: Tensor, noise: float) -> Tensor:
        height, width = x.shape[-2:]
        seen = F.pixel_unshuffle(F.pad(x, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        out = self.model(torch.cat([seen, torch.full_like(seen[:, :1], noise)], 1))
        return F.pixel_shuffle(out, 2)[..., :height, :width]


def plug_and_play(weights: Path) -> Method:
    denoiser = FFDNet(weights).eval()
    model = jfbfast.PlugAndPlay(lambda x, noise: 2 * denoiser((x + 1) / 2, noise / 2) - 1, steps=24)

    def method(setting: Setting, d: Tensor) -> tuple[Tensor, int]:
        model.set_measurement(setting.blur, setting.noise)
        return model(d), model.steps

    return method


def by_network(model: jfbfast.DEGrad) -> Method:
    def method(setting: Setting, d: Tensor) -> tuple[Tensor, int]:
        model.set_measurement(setting.blur, setting.noise)
        image = model(d)
        applications = getattr(model.gradient, "steps", None) if isinstance(model.gradient, jfbfast.Unrolled) else None
        return image, applications or int(model.solution.iterations[0])

    return method


def framed(image: Tensor, blur: KnownBlur) -> Tensor:
    """The part of a scene that lies in the frame of its measurement."""
    y, x = blur.margin
    return image[..., y : image.shape[-2] - y, x : image.shape[-1] - x]


def tikhonov(weight: float) -> Method:
    def method(setting: Setting, d: Tensor) -> tuple[Tensor, int]:
        mean = d.mean((2, 3), keepdim=True)
        return setting.blur.solve(setting.blur.adjoint(d - mean), weight) + mean, 0

    return method


def measured(photographs: list[Tensor], setting: Setting) -> list[tuple[Tensor, Tensor]]:
    """The centre of each photograph, and its measurement, whose surroundings are unknown."""
    y, x = setting.blur.margin
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for photograph in photographs:
        top, left = photograph.shape[1] // 2 - SIDE // 2 - y, photograph.shape[2] // 2 - SIDE // 2 - x
        scene = photograph[None, :, top : top + SIDE + 2 * y, left : left + SIDE + 2 * x].contiguous()
        d = setting.blur(scene)
        pairs.append((framed(scene, setting.blur), d + setting.noise * torch.randn(d.shape, generator=generator)))
    return pairs


def psnr(image: Tensor, sharp: Tensor) -> float:
    return float(10 * torch.log10(4 / (image.clamp(-1, 1) - sharp).square().mean()))


class Row(NamedTuple):
    """One restoration; ``seconds`` of processor time."""

    setting: str
    method: str
    photograph: int
    psnr: float
    evaluations: int
    seconds: float


def run(setting: Setting, name: str, method: Method, pairs: list[tuple[Tensor, Tensor]]) -> list[Row]:
    rows = []
    for k, (sharp, d) in enumerate(pairs):
        started = time.process_time()
        image, evaluations = method(setting, d)
        seconds = time.process_time() - started
        found = psnr(framed(image, setting.blur), sharp)
        rows.append(Row(setting.name, name, k, found, evaluations, seconds))
    return rows


def best_tikhonov(setting: Setting, pairs: list[tuple[Tensor, Tensor]]) -> list[Row]:
    """The best λ is that with the best mean PSNR over these photographs."""
    runs = [run(setting, "Tikhonov", tikhonov(float(w)), pairs) for w in np.geomspace(1e-4, 0.3, 12)]
    return max(runs, key=lambda rows: sum(row.psnr for row in rows))


def interval(values: np.ndarray) -> float:
    """Half the width of the 95% confidence interval of the mean, by the normal approximation."""
    return 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))


def tables(rows: list[Row], names: list[str]) -> None:
    """Print mean PSNRs, the differences of each method to the first, with confidence intervals, and the work."""
    by: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by[row.setting, row.method].append(row)
    print("| blur, noise | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for setting in SETTINGS:
        first = np.array([row.psnr for row in by[setting.name, names[0]]])
        cells = [f"{first.mean():.2f}"]
        for name in names[1:]:
            found = np.array([row.psnr for row in by[setting.name, name]])
            difference = found - first
            cells.append(f"{found.mean():.2f} ({difference.mean():+.2f} ± {interval(difference):.2f})")
        seen = "" if setting.trained else "*"
        print(f"| {setting.name}{seen} | " + " | ".join(cells).replace("-", "−") + " |")
    for what, unit in (("evaluations", ".1f"), ("seconds", ".2f")):
        means = [np.mean([getattr(row, what) for row in rows if row.method == name]) for name in names]
        print(f"| {what} | " + " | ".join(format(mean, unit) for mean in means) + " |")


@torch.no_grad()
def curve(model: jfbfast.DEGrad, setting: Setting, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Mean PSNR after each of `COUNTS` applications of the layer, without acceleration."""
    model.set_measurement(setting.blur, setting.noise)
    trained_with, model.gradient = model.gradient, jfbfast.Unrolled(steps=1)
    sums: list[float] = []
    image: list[Any] = [None] * len(pairs)
    for count in range(1, max(COUNTS) + 1):
        image = [model(d, x0=x) for (_, d), x in zip(pairs, image, strict=True)]
        if count in COUNTS:
            found = [psnr(framed(x, setting.blur), sharp) for x, (sharp, _) in zip(image, pairs, strict=True)]
            sums.append(float(np.mean(found)))
    model.gradient = trained_with
    return sums


def picture(rows: list[Row], curves: dict[tuple[str, str], list[float]], names: list[str], path: Path) -> None:
    """Draw the gain over Tikhonov in each setting, and PSNR against the number of applications."""
    figure = plt.figure(figsize=(10, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    axis = top.subplots()
    shown = [name for name in names if name != "Tikhonov"]
    by = defaultdict(list)
    for row in rows:
        by[row.setting, row.method].append(row.psnr)
    for k, name in enumerate(shown):
        gains = [np.subtract(by[s.name, name], by[s.name, "Tikhonov"]) for s in SETTINGS]
        at = np.arange(len(SETTINGS)) + (k - (len(shown) - 1) / 2) * 0.8 / len(shown)
        means, errors = [gain.mean() for gain in gains], [interval(gain) for gain in gains]
        axis.bar(at, means, 0.8 / len(shown), yerr=errors, label=name, error_kw={"linewidth": 0.8})
    labels = [s.name.replace(", ", "\n") for s in SETTINGS]
    axis.set_xticks(range(len(SETTINGS)), labels, fontsize=7.5)
    unseen = sum(s.trained for s in SETTINGS) - 0.5
    axis.axvline(unseen, color="grey", linewidth=0.8, linestyle=":")
    axis.axhline(0, color="black", linewidth=0.6)
    lowest, highest = axis.get_ylim()
    axis.set_ylim(max(lowest, -4), highest)
    axis.text(unseen + 0.06, 0.99 * highest, "not in the training of the first three", va="top", fontsize=8)
    axis.set_ylabel("gain over Tikhonov, dB")
    axis.legend(fontsize=8, loc="upper left")
    settings = list(dict.fromkeys(setting for setting, _ in curves))
    for axis, setting in zip(bottom.subplots(1, len(settings)), settings, strict=True):
        for (at_setting, name), values in curves.items():
            if at_setting == setting:
                axis.plot(COUNTS, values, marker=".", label=name)
        drawn = [value for (at_setting, _), values in curves.items() if at_setting == setting for value in values]
        axis.set_ylim(max(min(drawn) - 0.3, max(drawn) - 6), max(drawn) + 0.3)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axis.set_title(setting, fontsize=9)
        axis.set_xlabel("applications of the layer")
        axis.set_ylabel("PSNR, dB")
        axis.legend(fontsize=7.5, loc="lower left")
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 88})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path, help="directory")
    parser.add_argument("--network", action="append", required=True, help="NAME=FILE; the first is the reference")
    parser.add_argument("--ffdnet", type=Path, help="FFDNet's published weights for colour (ffdnet_color.pth)")
    parser.add_argument("--count", type=int, help="of photographs, the first by name (default: all)")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="directory of the CSV and the picture")
    return parser.parse_args()


def main(given: argparse.Namespace) -> None:
    files = sorted(file for file in given.photographs.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    read = Photographs(files[: given.count], least=256, purpose="its centre with what lies around it")
    photographs = [to_floats(read[k]) for k in range(len(read))]
    networks = dict(network.split("=", 1) for network in given.network)
    models = {name: jfbfast.UniversalDEGrad.from_pretrained(file) for name, file in networks.items()}
    models["universal"] = jfbfast.UniversalDEGrad.from_pretrained("universal")
    methods = {name: by_network(model) for name, model in models.items()}
    if given.ffdnet:
        methods["plug-and-play"] = plug_and_play(given.ffdnet)
    rows: list[Row] = []
    curves: dict[tuple[str, str], list[float]] = {}
    with torch.no_grad():
        for setting in SETTINGS:
            pairs = measured(photographs, setting)
            rows += best_tikhonov(setting, pairs)
            for name, method in methods.items():
                rows += run(setting, name, method, pairs)
                print(setting.name, name, f"{np.mean([row.psnr for row in rows[-len(pairs) :]]):.2f}", flush=True)
            if setting.name in CURVES:
                curves |= {(setting.name, name): curve(models[name], setting, pairs[:6]) for name in networks}
    names = [*networks, "Tikhonov", *(name for name in methods if name not in networks)]
    with (given.out / "fixed_point.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows((*row[:3], f"{row.psnr:.3f}", row.evaluations, f"{row.seconds:.3f}") for row in rows)
    tables(rows, names)
    picture(rows, curves, names, given.out / "fixed_point.jpg")


if __name__ == "__main__":
    warnings.simplefilter("ignore", jfbfast.ConvergenceWarning)
    torch.set_num_threads(1)
    jfbfast.keep_freed_memory()
    main(arguments())
