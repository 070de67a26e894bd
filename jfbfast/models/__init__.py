"""Everything with weights, and the files that hold them."""

from jfbfast.models import conditional, degrad, denoisers, feed_forward, unet  # each registers what files can name

__all__ = ["conditional", "degrad", "denoisers", "feed_forward", "unet"]
