"""Pictures for people: an image shrunk to a thumbnail, and its mask as an outline to lay over it."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from unetpp.predictor import Image

THUMBNAIL_PX = 384

OUTLINES = np.array(
    [(255, 214, 0), (0, 229, 255), (255, 64, 160), (118, 255, 3), (255, 145, 0), (179, 136, 255)], np.uint8
)
"""RGB of the outlines of classes 1, 2, ...; classes beyond take them in turn."""


def thumbnail(image_HWC: Image, side_px: int = THUMBNAIL_PX) -> Pillow.Image:
    """The image in 8-bit RGB, its longer side at most `side_px`.

    Values of other types are stretched between their 0.5 and 99.5 percentiles, since screens show 8 bits.
    """
    if image_HWC.dtype != np.uint8:
        values_HWC = image_HWC.astype(np.float32)
        low, high = np.percentile(values_HWC, (0.5, 99.5))
        scaled = (values_HWC - low) / max(float(high - low), 1e-9)
        image_HWC = np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)
    rgb_HW3 = np.repeat(image_HWC[..., :1], 3, axis=2) if image_HWC.shape[2] < 3 else image_HWC[..., :3]
    picture = Pillow.fromarray(np.ascontiguousarray(rgb_HW3))
    picture.thumbnail((side_px, side_px), Pillow.Resampling.LANCZOS)
    return picture


def outline(mask_HW: NDArray[np.uint8], size: tuple[int, int]) -> Pillow.Image:
    """The borders of a mask's classes at `size` (width, height), transparent elsewhere."""
    small = np.asarray(Pillow.fromarray(mask_HW).resize(size, Pillow.Resampling.NEAREST))
    padded = np.pad(small, 1, mode="edge")
    inner = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    border = (inner > 0) & np.logical_or.reduce([inner != neighbour for neighbour in neighbours])
    rgba = np.zeros((*small.shape, 4), np.uint8)
    rgba[border, :3] = OUTLINES[(small[border].astype(int) - 1) % len(OUTLINES)]
    rgba[border, 3] = 255
    return Pillow.fromarray(rgba)


def as_data_uri(picture: Pillow.Image) -> str:
    """The picture as PNG inside a URI, so that a page needs no other file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")  # optimised it is a tenth smaller and takes ten times as long
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
