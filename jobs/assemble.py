"""Put the masks of an image's windows together: `unetpp assemble OUTPUT KEY --out mask.tif`.

One tiled BigTIFF, deflated: 0 and 255 for a binary mask, class ids for several classes; it lies on Earth where the
image does. It is streamed: a row of windows is in memory at a time. An image that was not cut has its mask written the
same way.
"""

import os
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import tifffile
from numpy.typing import NDArray

from jobs import storage, table
from jobs.contract import AssembleConfig, AssembleResult
from jobs.run_records import output_at
from jobs.table import Part
from jobs.windows import grid
from unetpp.errors import ConfigError, ImageError, StorageError
from unetpp.geo import tiff_tags
from unetpp.images import decode_mask
from unetpp.tiles import Box

NUM_NAMED = 200
TILE_SIDES = (512, 256, 128, 64, 32, 16)
COLUMNS = ["key", "source_uri", "etag", "window_y", "window_x", "num_windows", "window_px", "height", "width"]
COLUMNS += ["geo", "class_pixels", "error_code", "model_digest"]


class Found(NamedTuple):
    """The newest row of a window, where it is, and the run that it is of."""

    row: dict[str, Any]
    part: Part


def run(config: AssembleConfig) -> AssembleResult:
    """Write the mask. ConfigError where there is none, or some of its windows are missing: all of them are named."""
    output = output_at(config.output)
    storage.refuse_unwritable(config.out)
    newest = _newest(output, config)
    first = next(iter(newest.values())).row
    height, width = _size(config.key, newest)
    window_px = first["window_px"] or max(height, width)
    boxes = grid(height, width, window_px)
    _refuse_missing(config.key, newest, boxes)
    num_classes = max(len(found.row["class_pixels"]) for found in newest.values())
    side = next(side for side in TILE_SIDES if window_px % side == 0 or not first["window_px"])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "mask.tif")
        with tifffile.TiffWriter(path, bigtiff=True) as writer:
            writer.write(
                _tiles(newest, boxes, side, num_classes),
                shape=(height, width),
                dtype=np.uint8,
                tile=(side, side),
                photometric="minisblack",
                compression="zlib",
                metadata=None,
                extratags=tiff_tags(first["geo"]),
            )
        storage.upload_file(path, config.out)
    return AssembleResult(
        key=config.key,
        out=config.out,
        height=height,
        width=width,
        num_windows=len(boxes),
        runs=tuple(sorted({found.part.run for found in newest.values()})),
        model_digest=first["model_digest"],
    )


def _newest(output: str, config: AssembleConfig) -> dict[tuple[int, int], Found]:
    """The newest row of every window of the image's newest version, grid and, unless one is named, model."""
    parts = sorted(table.list_parts(output, config.model), key=lambda part: part.run, reverse=True)
    source = None if config.source is None else storage.plain(storage.canonical(config.source))
    newest: dict[tuple[int, int], Found] = {}
    sources: set[str] = set()
    alike: tuple[object, ...] | None = None
    for part, rows in table.scan_parts(parts, COLUMNS):
        for row in rows.filter(pc.equal(rows["key"], config.key)).to_pylist():
            if source not in (None, row["source_uri"]):
                continue
            sources.add(row["source_uri"])
            same = tuple(row[name] for name in ("model_digest", "etag", "num_windows", "window_px"))
            if (alike := alike or same) == same:
                newest.setdefault((row["window_y"], row["window_x"]), Found(row, part))
    if not newest:
        raise ConfigError(
            f"the table of {output} has no image {config.key!r}; keys are paths below the input, as `key` says"
        )
    if len(sources) > 1:
        raise ConfigError(
            f"{config.key!r} is in several archives, {', '.join(sorted(sources))}: name one with --source"
        )
    return newest


def _size(key: str, newest: dict[tuple[int, int], Found]) -> tuple[int, int]:
    for found in newest.values():
        if found.row["height"] is not None:
            return found.row["height"], found.row["width"]
    (found,) = newest.values()
    raise ConfigError(f"{key!r} has no mask: {found.row['error_code']}; see its `error` in the table")


def _refuse_missing(key: str, newest: dict[tuple[int, int], Found], boxes: list[Box]) -> None:
    missing = []
    for box in boxes:
        found = newest.get((box.y0, box.x0))
        if found is None or found.row["error_code"] is not None:
            why = "not done yet" if found is None else f"{found.row['error_code']} in {found.part.run}"
            missing.append(f"(y {box.y0}, x {box.x0}: {why})")
    if missing:
        named = ", ".join(missing[:NUM_NAMED])
        more = f" and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
        raise ConfigError(
            f"{len(missing)} of the {len(boxes)} windows of {key!r} are missing: {named}{more}; "
            "do them first: the same predict command, or `unetpp retry RUN`"
        )


def _tiles(
    newest: dict[tuple[int, int], Found], boxes: list[Box], side: int, num_classes: int
) -> Iterator[NDArray[np.uint8]]:
    """The TIFF's tiles, row by row; a row of windows is put together at a time."""
    width = boxes[-1].x1
    for y0 in sorted({box.y0 for box in boxes}):
        row = [box for box in boxes if box.y0 == y0]
        band_HW = np.zeros((row[0].height, width), np.uint8)
        for box, mask_HW in _masks(newest, row, num_classes):
            band_HW[:, box.x0 : box.x1] = mask_HW
        for top in range(0, band_HW.shape[0], side):
            for left in range(0, width, side):
                yield np.ascontiguousarray(band_HW[top : top + side, left : left + side])


def _masks(
    newest: dict[tuple[int, int], Found], row: list[Box], num_classes: int
) -> Iterator[tuple[Box, NDArray[np.uint8]]]:
    """The masks of a row of windows; a part is read once."""
    by_part: dict[Part, list[Box]] = {}
    for box in row:
        by_part.setdefault(newest[box.y0, box.x0].part, []).append(box)
    for part, boxes in by_part.items():
        wanted = {(box.y0, box.x0): box for box in boxes}
        key = newest[next(iter(wanted))].row["key"]
        for batch in table.scan([part], ["key", "source_uri", "window_y", "window_x", "mask_png"]):
            for found in batch.filter(pc.equal(batch["key"], key)).to_pylist():
                place = found["window_y"], found["window_x"]
                is_meant = place in wanted and found["source_uri"] == newest[place].row["source_uri"]
                if is_meant:
                    yield wanted[place], _mask(found["mask_png"], wanted[place], part, num_classes)


def _mask(png: bytes, box: Box, part: Part, num_classes: int) -> NDArray[np.uint8]:
    try:
        mask_HW = decode_mask(png, 1 if num_classes == 2 else num_classes, max_pixels=box.num_px)
    except ImageError as error:
        raise StorageError(f"the mask at (y {box.y0}, x {box.x0}) in {part.uri} is damaged: {error.detail}") from None
    if mask_HW.shape != (box.height, box.width):
        raise StorageError(f"the mask at (y {box.y0}, x {box.x0}) in {part.uri} is {mask_HW.shape}, wanted {box}")
    return mask_HW * np.uint8(255) if num_classes == 2 else mask_HW


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("assemble")
