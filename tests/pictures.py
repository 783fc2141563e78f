"""Files in memory as `Picture` opens them."""

from typing import Any

from unetpp.decoders import MAX_PIXELS
from unetpp.regions import Picture


def picture(data: bytes, *, max_pixels: int = MAX_PIXELS, **how: Any) -> Picture:
    """The picture of a file whose bytes are all at hand."""
    return Picture(lambda spans: [data[start:stop] for start, stop in spans], len(data), max_pixels, **how)


def size_of(data: bytes, **how: Any) -> tuple[int, int]:
    """Height and width of a file, from its header alone."""
    seen = picture(data, **how)
    return seen.height, seen.width
