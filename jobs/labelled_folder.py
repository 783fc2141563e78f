"""Labelled sets in folders: `images/<id>.<ext>`, `masks/<id>.<ext>` and, if there, `splits.csv`."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from jobs import storage
from jobs.labelled import (
    SPLITS,
    Listed,
    Listing,
    Problem,
    Sample,
    groups_of,
    hashed_split,
    ids_with_split,
    read_splits,
    rows_without_image,
    some_lack,
    without_split,
)
from unetpp.errors import ConfigError


def list_samples(listing: Listing, split_column: str) -> Listed:
    """Pair the files of a set. ConfigError where there are no images, or an id stands for two files."""
    images, masks = _by_id(listing, "images"), _by_id(listing, "masks")
    if not images:
        raise ConfigError(f"{listing.uri} holds no images/: a labelled set in a folder has images/ beside masks/")
    rows = read_splits(listing, split_column)
    if rows is None:
        rows = {id_: {split_column: hashed_split(listing, id_, split_column)} for id_ in images}
    split = ids_with_split(rows, split_column)
    samples = tuple(
        Sample(
            id=id_,
            image_uri=storage.join(listing.root, images[id_]),
            mask_uri=storage.join(listing.root, masks[id_]),
            image_etag=listing.objects[images[id_]],
            mask_etag=listing.objects[masks[id_]],
            split=rows[id_][split_column],
            groups=groups_of(rows[id_], split_column),
        )
        for id_ in sorted(images.keys() & masks.keys() & split)
    )
    problems = [
        *some_lack(listing, "image_without_mask", images.keys() - masks.keys(), "mask in masks/"),
        *without_split(listing, images.keys() - split, split_column, SPLITS),
        *rows_without_image(listing, rows.keys() - images.keys()),
        *_masks_without_image(listing, masks.keys() - images.keys()),
    ]
    return Listed(samples, tuple(problems))


def _masks_without_image(listing: Listing, ids: set[str]) -> Iterator[Problem]:
    if ids:
        sentence = f"{listing.uri}: {len(ids)} mask(s) have no image in images/, the first is {min(ids)!r}"
        yield Problem("mask_without_image", tuple(sorted(ids)), sentence, is_fatal=False)


def _by_id(listing: Listing, folder: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for key in listing.objects:
        path = PurePosixPath(key)
        if path.parts[0] != folder or path.name.startswith("."):
            continue
        id_ = str(path.relative_to(folder).with_suffix(""))
        if id_ in keys:
            raise ConfigError(f"{listing.uri}: {keys[id_]} and {key} have the same id {id_!r}; remove or rename one")
        keys[id_] = key
    return keys
