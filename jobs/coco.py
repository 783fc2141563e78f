"""Labelled sets as COCO JSON: `images/<file_name>`, and a file that names the images and the shapes in them.

An image's id is its file_name without the ending. Split and groups come from a splits.csv beside images/, else from the
entries of the images: the key `split`, and every other key with a text or a number that is not COCO's own.

A mask is drawn from the shapes of an image, polygons and run lengths (plain or compressed), so:

- categories, in the order of their ids, are the classes 1, 2, ...; 0 is background. A binary model sees one foreground;
- where shapes of one image overlap, the smaller one is on top, so that what is inside something else stays visible;
- a crowd (`iscrowd` 1) is drawn below all others as its category; where pixels may be ignored, as those: its outline is
  rough;
- an image without shapes is background. Files in images/ that the JSON does not name do not belong to the set.
"""

import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs import storage
from jobs.labelled import (
    CocoImage,
    Listed,
    Listing,
    Problem,
    Sample,
    groups_of,
    hashed_split,
    read_splits,
    rows_without_image,
    some_lack,
)
from unetpp.decoders import MAX_PIXELS, check_size
from unetpp.errors import ConfigError, ImageError

COCO_KEYS = frozenset({"id", "file_name", "width", "height", "license", "flickr_url", "coco_url", "date_captured"})


class Entry(BaseModel):
    """An image as the JSON has it."""

    model_config = ConfigDict(extra="allow")

    id: int | str
    file_name: str
    height: int = Field(ge=1)
    width: int = Field(ge=1)

    @property
    def sample_id(self) -> str:
        """The file's name without its ending."""
        return str(PurePosixPath(self.file_name).with_suffix(""))

    def row(self) -> dict[str, str]:
        """The keys that are not COCO's own, as a row of splits.csv would have them."""
        more = (self.model_extra or {}).items()
        return {key: str(value) for key, value in more if key not in COCO_KEYS and isinstance(value, str | int | float)}


class Shape(BaseModel):
    """An annotation as the JSON has it."""

    id: int | str = ""
    image_id: int | str
    category_id: int
    segmentation: Any = None
    iscrowd: bool = False


class Category(BaseModel):
    """A category as the JSON has it."""

    id: int
    name: str = ""


class Content(BaseModel):
    """A COCO file."""

    images: list[Entry]
    annotations: list[Shape]
    categories: list[Category]


class Annotations(NamedTuple):
    """A COCO file, by the id of the image."""

    uri: str
    entries: dict[int | str, Entry]
    shapes: dict[int | str, list[Shape]]
    classes: dict[int, int]


_reading = threading.Lock()


def annotations(uri: str, etag: str) -> Annotations:
    """A COCO file of this version, read once a process. ConfigError where it is none."""
    with _reading:
        return _read(uri, etag)


@lru_cache(maxsize=2)
def _read(uri: str, etag: str) -> Annotations:
    try:
        content = Content.model_validate(json.loads(storage.read_bytes(uri, etag)))
    except ImageError as error:
        raise ConfigError(f"{uri} cannot be used: {error.detail}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{uri} is no COCO file: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"{uri} is no JSON: {error}") from None
    categories = sorted(category.id for category in content.categories)
    for what, values in (
        ("image id", [entry.id for entry in content.images]),
        ("file_name", [entry.sample_id for entry in content.images]),
        ("category id", categories),
    ):
        if (twice := Counter(values).most_common(1)) and twice[0][1] > 1:
            raise ConfigError(f"{uri} has the {what} {twice[0][0]!r} twice; each must be there once")
    entries = {entry.id: entry for entry in content.images}
    shapes: dict[int | str, list[Shape]] = {}
    for shape in content.annotations:
        if shape.image_id not in entries:
            raise ConfigError(
                f"{uri}: annotation {shape.id!r} is of image {shape.image_id!r}, which images does not have"
            )
        if shape.category_id not in categories:
            raise ConfigError(f"{uri}: annotation {shape.id!r} is of the unknown category {shape.category_id}")
        shapes.setdefault(shape.image_id, []).append(shape)
    return Annotations(uri, entries, shapes, {category: number for number, category in enumerate(categories, 1)})


def list_samples(listing: Listing, split_column: str) -> Listed:
    """The images that the JSON names. ConfigError where it is no COCO file."""
    assert listing.annotations is not None
    uri = storage.join(listing.root, listing.annotations)
    etag = listing.objects[listing.annotations]
    by_id = {entry.sample_id: entry for entry in annotations(uri, etag).entries.values()}
    files = {id_ for id_, entry in by_id.items() if f"images/{entry.file_name}" in listing.objects}
    rows = read_splits(listing, split_column)
    in_splits = rows is not None
    if rows is None:
        rows = {id_: row for id_, entry in by_id.items() if split_column in (row := entry.row())}
        rows = rows or {
            id_: {**by_id[id_].row(), split_column: hashed_split(listing, id_, split_column)} for id_ in by_id
        }
    samples = tuple(
        Sample(
            id=id_,
            image_uri=storage.join(listing.root, "images", entry.file_name),
            mask_uri=f"{uri}#{entry.file_name}",
            image_etag=listing.objects[f"images/{entry.file_name}"],
            split=rows[id_][split_column],
            groups=groups_of(rows[id_], split_column),
            coco=CocoImage(uri=uri, etag=etag, image_id=entry.id),
        )
        for id_, entry in sorted(by_id.items())
        if id_ in files and id_ in rows
    )
    where = "row in splits.csv" if in_splits else f"{split_column!r} in {listing.annotations}"
    return Listed(samples, tuple(_problems(listing, set(by_id), files, set(rows), where)))


def _problems(listing: Listing, ids: set[str], files: set[str], rows: set[str], where: str) -> Iterator[Problem]:
    yield from some_lack(listing, "image_without_file", ids - files, "file in images/")
    yield from some_lack(listing, "image_without_row", ids - rows, where)
    yield from rows_without_image(listing, rows - ids)


# ------------------------------------------------------------------------------------------------- drawing


def draw_mask(source: CocoImage, num_classes: int, *, ignore: int | None = None) -> NDArray[np.uint8]:
    """Class ids `mask_HW` of an image, as `unetpp.images.decode_mask` gives them.

    Raises ImageError for a shape that is none, and for a class that is not below `num_classes`.
    """
    found = annotations(source.uri, source.etag)
    entry = found.entries[source.image_id]
    check_size(entry.height, entry.width, MAX_PIXELS)
    layers: list[_Layer] = []
    for shape in found.shapes.get(source.image_id, []):
        number = 1 if num_classes == 1 else found.classes[shape.category_id]
        if number >= max(num_classes, 2):
            raise ImageError(
                "decode",
                f"category {shape.category_id} is class {number} of {len(found.classes)}, the model has classes 0 to "
                f"{num_classes - 1}",
            )
        value = ignore if shape.iscrowd and ignore is not None else number
        layers += _layers(_inside(shape, entry.height, entry.width), shape.iscrowd, value)
    mask_HW = np.zeros((entry.height, entry.width), np.uint8)
    for layer in sorted(layers, key=lambda layer: (not layer.is_crowd, -layer.num_pixels)):
        mask_HW[layer.box][layer.inside_hw] = layer.value
    return mask_HW


class _Layer(NamedTuple):
    is_crowd: bool
    num_pixels: int
    value: int
    box: tuple[slice, slice]
    inside_hw: NDArray[np.bool_]


def _layers(inside_HW: NDArray[np.bool_], is_crowd: bool, value: int) -> Iterator[_Layer]:
    """The shape cut to its box, for there may be thousands; none where it covers no pixel."""
    ys, xs = np.flatnonzero(inside_HW.any(axis=1)), np.flatnonzero(inside_HW.any(axis=0))
    if ys.size:
        box = (slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1))
        yield _Layer(is_crowd, int(inside_HW.sum()), value, box, inside_HW[box].copy())


def _inside(shape: Shape, height: int, width: int) -> NDArray[np.bool_]:
    match shape.segmentation:
        case [_, *_] as polygons:
            return _inside_polygons(polygons, height, width, shape.id)
        case {"size": size, "counts": str() | list() as counts}:
            if size != [height, width]:
                raise _bad(shape.id, f"its size is {size}, the image's [{height}, {width}] (height, width)")
            runs = _decompressed(counts, shape.id) if isinstance(counts, str) else counts
            return _inside_runs(runs, height, width, shape.id)
    raise _bad(shape.id, "it has no segmentation: wanted polygons, or run lengths with size and counts")


def _inside_polygons(polygons: list[Any], height: int, width: int, id_: int | str) -> NDArray[np.bool_]:
    reach = 2 * max(height, width)
    for polygon in polygons:
        # What is drawn takes memory by its length: a number that is none, or far away, would take all there is.
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise _bad(id_, "a polygon must be a list of x, y, x, y, ... with three points or more")
        if not all(
            isinstance(value, int | float) and math.isfinite(value) and abs(value) <= reach for value in polygon
        ):
            raise _bad(id_, f"a polygon leaves the image, which is {height} x {width} pixels (height x width), by far")
    inside_HW = np.zeros((height, width), bool)
    for drawn in coco_mask.frPyObjects(polygons, height, width):
        inside_HW |= _inside_runs(_decompressed(drawn["counts"].decode("ascii"), id_), height, width, id_)
    return inside_HW


def _inside_runs(runs: list[Any], height: int, width: int, id_: int | str) -> NDArray[np.bool_]:
    """Lengths of runs outside, inside, outside, ... down the columns from the left."""
    if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != height * width:
        raise _bad(id_, f"its run lengths do not add up to {height} x {width} pixels")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(width, height).T


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
