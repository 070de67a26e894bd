"""Everything with weights, and the files that hold them."""

from jfbfast.models import (  # each registers what files can name
    degrad,
    denoisers,
    feed_forward,
    plug_and_play,
    unet,
    universal,
)

__all__ = ["degrad", "denoisers", "feed_forward", "plug_and_play", "unet", "universal"]
