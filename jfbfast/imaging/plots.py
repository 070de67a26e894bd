"""Pictures of restorations side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor


def side_by_side(images: Mapping[str, Tensor], path: str | Path, detail: tuple[int, int, int], title: str) -> None:
    """Save labelled images in a row, each above an enlarged detail of itself.

    Args:
        images: label to (3, H, W) in [−1, 1].
        path: of the PNG to write.
        detail: top, left and side of the enlarged square, in pixels.
        title: above all.
    """
    top, left, side = detail
    figure, axes = plt.subplots(2, len(images), figsize=(2.6 * len(images), 5.9), squeeze=False, layout="constrained")
    for column, (label, image) in enumerate(images.items()):
        pixels = ((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()
        whole, enlarged = axes[:, column]
        whole.imshow(pixels)
        whole.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="yellow", linewidth=1.2))
        whole.set_title(label, fontsize=9)
        enlarged.imshow(pixels[top : top + side, left : left + side], interpolation="nearest")
        for axis in (whole, enlarged):
            axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)
