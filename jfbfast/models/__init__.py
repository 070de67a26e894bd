"""Everything with weights, and the files that hold them."""

from jfbfast.models import degrad, denoisers, feed_forward, unet, universal  # each registers what files can name

__all__ = ["degrad", "denoisers", "feed_forward", "unet", "universal"]
