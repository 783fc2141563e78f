"""Masks from the shapes of a COCO file: polygons and run lengths, plain or compressed.

- Categories, in the order of their ids, are the classes 1, 2, ...; 0 is background. A binary model sees one foreground.
- Where shapes of one image overlap, the smaller one is on top, so that what is inside something else stays visible.
- A crowd (`iscrowd` 1) is drawn below all others as its category; where pixels may be ignored, as those: its outline is
  rough.
- An image without shapes is background.

Polygons are drawn by COCO's own library, so that masks are those of other tools. Run lengths are not given to it: of
broken ones it makes pixels out of memory that is not theirs.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from jobs.coco import Annotations, Shape, annotations
from jobs.labelled import CocoImage
from unetpp.decoders import MAX_PIXELS, check_size
from unetpp.errors import ImageError


def draw_mask(source: CocoImage, num_classes: int, *, ignore: int | None = None) -> NDArray[np.uint8]:
    """Class ids `mask_HW` of an image, as `unetpp.images.decode_mask` gives them.

    Raises ImageError for a shape that is none, and for a class that is not below `num_classes`.
    """
    return draw_shapes(annotations(source.uri, source.etag), source.image_id, num_classes, ignore=ignore)


def draw_shapes(
    found: Annotations, image_id: int | str, num_classes: int, *, ignore: int | None = None
) -> NDArray[np.uint8]:
    """The same for an image of a COCO file that has been read."""
    entry = found.entries[image_id]
    check_size(entry.height, entry.width, MAX_PIXELS)
    layers: list[tuple[bool, int, int, _Patch]] = []
    for shape in found.shapes.get(image_id, []):
        number = 1 if num_classes == 1 else found.classes[shape.category_id]
        if number >= max(num_classes, 2):
            raise ImageError(
                "decode",
                f"category {shape.category_id} is class {number} of {len(found.classes)}, the model has classes 0 to "
                f"{num_classes - 1}",
            )
        value = ignore if shape.iscrowd and ignore is not None else number
        patch = _patch(shape, entry.height, entry.width)
        layers.append((not shape.iscrowd, -int(patch.inside_hw.sum()), value, patch))
    mask_HW = np.zeros((entry.height, entry.width), np.uint8)
    for _, _, value, (y, x, inside_hw) in sorted(layers, key=lambda layer: layer[:2]):
        height, width = inside_hw.shape
        mask_HW[y : y + height, x : x + width][inside_hw] = value
    return mask_HW


class _Patch(NamedTuple):
    """The part of an image that a shape lies in, and which of its pixels are inside: there may be thousands."""

    y: int
    x: int
    inside_hw: NDArray[np.bool_]


def _patch(shape: Shape, height: int, width: int) -> _Patch:
    match shape.segmentation:
        case [_, *_] as polygons:
            return _patch_of_polygons(polygons, height, width, shape.id)
        case {"size": size, "counts": str() | list() as counts}:
            if size != [height, width]:
                raise _bad(shape.id, f"its size is {size}, the image's [{height}, {width}] (height, width)")
            runs = _decompressed(counts, shape.id) if isinstance(counts, str) else counts
            return _patch_of_runs(runs, height, width, shape.id)
    raise _bad(shape.id, "it has no segmentation: wanted polygons, or run lengths with size and counts")


def _patch_of_polygons(polygons: list[Any], height: int, width: int, id_: int | str) -> _Patch:
    reach = 2 * max(height, width)
    for polygon in polygons:
        # What is drawn takes memory by its length: a number that is none, or far away, would take all there is.
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise _bad(id_, "a polygon must be a list of x, y, x, y, ... with three points or more")
        if not all(
            isinstance(value, int | float) and math.isfinite(value) and abs(value) <= reach for value in polygon
        ):
            raise _bad(id_, f"a polygon leaves the image, which is {height} x {width} pixels (height x width), by far")
    points_N2 = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    (left, top), (right, bottom) = np.floor(points_N2.min(axis=0)), np.ceil(points_N2.max(axis=0))
    x, y, x_end, y_end = 0, 0, width, height
    if left >= 0 and top >= 0 and right <= width and bottom <= height:  # else it is cut at the image's borders
        x, y = min(int(left), width - 1), min(int(top), height - 1)
        x_end, y_end = max(int(right), x + 1), max(int(bottom), y + 1)
    moved = [_moved(np.reshape(polygon, (-1, 2)), x, y).ravel().tolist() for polygon in polygons]
    inside_hw = np.zeros((y_end - y, x_end - x), bool)
    for drawn in coco_mask.frPyObjects(moved, *inside_hw.shape):
        part = _patch_of_runs(_decompressed(drawn["counts"].decode("ascii"), id_), *inside_hw.shape, id_)
        part_height, part_width = part.inside_hw.shape
        inside_hw[part.y : part.y + part_height, part.x : part.x + part_width] |= part.inside_hw
    return _Patch(y, x, inside_hw)


def _moved(points_N2: NDArray[np.float64], x: int, y: int) -> NDArray[np.float64]:
    """Points of a patch that begins at (x, y), on the fifths of pixels to which COCO's library rounds whole images'.

    A subtraction leaves dust, by which decimals such as 119.7 fall on the other side.
    """
    return (np.trunc(5 * points_N2 + 0.5) - (5 * x, 5 * y)) / 5 if x or y else points_N2


def _patch_of_runs(runs: list[Any], height: int, width: int, id_: int | str) -> _Patch:
    """Lengths of runs outside, inside, outside, ... down the columns from the left; the columns with any inside."""
    if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != height * width:
        raise _bad(id_, f"its run lengths do not add up to {height} x {width} pixels")
    lengths = np.array(runs, np.int64)
    ends = lengths.cumsum()
    inside = np.flatnonzero((np.arange(len(runs)) % 2 == 1) & (lengths > 0))
    if not inside.size:
        return _Patch(0, 0, np.zeros((0, 0), bool))
    x, x_end = int(ends[inside[0]] - lengths[inside[0]]) // height, -(-int(ends[inside[-1]]) // height)
    within = np.clip(ends, x * height, x_end * height)
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, np.diff(within, prepend=x * height))
    columns_wh = pixels.reshape(x_end - x, height)
    rows = np.flatnonzero(columns_wh.any(axis=0))
    return _Patch(int(rows[0]), x, columns_wh[:, rows[0] : rows[-1] + 1].T)


def _decompressed(text: str, id_: int | str) -> list[int]:
    """Run lengths of COCO's text form: 5 bits a character from "0", the lowest first, bit 5 says that more follow.

    The last one's bit 4 is the sign. From the fourth number on each is the difference to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise _bad(id_, "its counts are no run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise _bad(id_, "its counts are cut short")
    return runs


def _bad(id_: int | str, why: str) -> ImageError:
    return ImageError("decode", f"annotation {id_!r}: {why}")
