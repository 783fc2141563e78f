"""Labelled sets as COCO JSON: `images/<file_name>`, and a file that names the images and the shapes in them.

An image's id is its file_name without the ending. Split and groups come from a splits.csv beside images/, else from the
entries of the images: the key `split`, and every other key with a text or a number that is not COCO's own. Files in
images/ that the JSON does not name do not belong to the set. `jobs.coco_shapes` draws the masks.
"""

import json
import threading
from collections import Counter
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from jobs import storage
from jobs.labelled import (
    SPLITS,
    CocoImage,
    Listed,
    Listing,
    Sample,
    groups_of,
    hashed_split,
    ids_with_split,
    read_splits,
    rows_without_image,
    some_lack,
    without_split,
)
from unetpp.errors import ConfigError, ImageError

COCO_KEYS = frozenset({"id", "file_name", "width", "height", "license", "flickr_url", "coco_url", "date_captured"})


def _named(file_name: str) -> str:
    if not PurePosixPath(file_name).name:
        raise ValueError(f"saw {file_name!r}, wanted the name of a file in images/")
    return file_name


class Entry(BaseModel):
    """An image as the JSON has it."""

    model_config = ConfigDict(extra="allow")

    id: int | str
    file_name: Annotated[str, AfterValidator(_named)]
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
        raise ConfigError(f"{uri} is no COCO file: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise ConfigError(f"{uri} is no JSON: {error}") from None
    categories = sorted(category.id for category in content.categories)
    classes = {category: number for number, category in enumerate(categories, 1)}
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
        if shape.category_id not in classes:
            raise ConfigError(f"{uri}: annotation {shape.id!r} is of the unknown category {shape.category_id}")
        shapes.setdefault(shape.image_id, []).append(shape)
    return Annotations(entries, shapes, classes)


def list_samples(listing: Listing, split_column: str) -> Listed:
    """The images that the JSON names. ConfigError where it is no COCO file."""
    assert listing.annotations is not None
    uri = storage.join(listing.root, listing.annotations)
    etag = listing.objects[listing.annotations]
    by_id = {entry.sample_id: entry for entry in annotations(uri, etag).entries.values()}
    files = {id_ for id_, entry in by_id.items() if f"images/{entry.file_name}" in listing.objects}
    rows = read_splits(listing, split_column)
    where = listing.annotations if rows is None else SPLITS
    if rows is None:
        rows = {id_: entry.row() for id_, entry in by_id.items()}
        if not any(split_column in row for row in rows.values()):
            rows = {id_: {**row, split_column: hashed_split(listing, id_, split_column)} for id_, row in rows.items()}
    split = ids_with_split(rows, split_column)
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
        if id_ in files & split
    )
    problems = [
        *some_lack(listing, "image_without_file", by_id.keys() - files, "file in images/"),
        *without_split(listing, by_id.keys() - split, split_column, where),
        *rows_without_image(listing, rows.keys() - by_id.keys()),
    ]
    return Listed(samples, tuple(problems))
