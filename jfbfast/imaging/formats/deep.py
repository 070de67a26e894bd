"""Samples of more than 8 bits, which Pillow would cut: OpenCV decodes them."""

from __future__ import annotations

import cv2
import numpy as np

from jfbfast.imaging.formats.metadata import ImageError


def decode_deep(content: bytes, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """The samples of a PNG or TIFF as its file stores them, in RGB order.

    Args:
        content: of the file.
        shape: (H, W, channels), what the array is to have.
        dtype: of its samples.
    """
    array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.dtype != dtype or array.size != np.prod(shape):
        raise ImageError("its pixels cannot be decoded")
    array = array.reshape(shape)
    return array[:, :, [2, 1, 0, 3][: shape[2]]] if shape[2] > 2 else array
