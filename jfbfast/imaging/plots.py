"""Pictures of restorations side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import torch.nn.functional as F

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor

SHOWN = 800  # pixels of the longer side of a whole image, about what a picture can show of it


def _pixels(image: Tensor) -> np.ndarray:
    return ((image.clamp(-1, 1) + 1) / 2).expand(3, -1, -1).permute(1, 2, 0).numpy()


def side_by_side(
    images: Mapping[str, Tensor], path: str | Path, detail: tuple[int, int, int], title: str = "", width: float = 2.6
) -> None:
    """Save labelled images in a row, each above an enlarged detail of itself, as a PNG.

    Args:
        images: label to (1 or 3, H, W) in [−1, 1].
        path: of the file to write, whatever its suffix.
        detail: top, left and side of the enlarged square, in pixels.
        title: above all.
        width: of each image, in inches.
    """
    top, left, side = detail
    height, across = next(iter(images.values())).shape[-2:]
    size = (width * len(images), width * (height / across + 1) + 0.6)
    ratios = {"height_ratios": [height / across, 1]}
    figure, axes = plt.subplots(2, len(images), figsize=size, squeeze=False, layout="constrained", gridspec_kw=ratios)
    for column, (label, image) in enumerate(images.items()):
        whole, enlarged = axes[:, column]
        step = -(-max(height, across) // SHOWN)
        shrunk = F.avg_pool2d(image[None], step, ceil_mode=True)[0] if step > 1 else image
        whole.imshow(_pixels(shrunk), extent=(-0.5, across - 0.5, height - 0.5, -0.5))
        whole.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="yellow", linewidth=1.2))
        whole.set_title(label, fontsize=9)
        enlarged.imshow(_pixels(image[:, top : top + side, left : left + side]), interpolation="nearest")
        for axis in (whole, enlarged):
            axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=140, format="png")
    plt.close(figure)
