"""What becomes a run's manifest: what is listed and not done, or failed before, cut into shards."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs import members
from jobs.manifest import SCHEMA, Identities, Listed, cost_bytes, identity, whole_identity
from unetpp.errors import ConfigError
from unetpp.tiles import Box

SHARD_BYTES = 64 << 20
SHARDS_OF_A_STREAM = 16
"""At most, of an archive that is read from its start for each."""
PIXELS_A_BYTE = 2
"""Of an image as it is stored: what its pixels are guessed by. PNGs have about 1, JPEGs 3."""
PAGE = 10_000

Cut = Callable[[Sequence[Listed], int], list[list[Box]]]
"""(images, window_px) -> the windows of each; none for one that is not cut."""


class ShardSize(NamedTuple):
    """How large shards are: at most so many images and pixels, and towards the end of a run smaller and smaller."""

    images: int
    pixels: int = 1 << 60
    share: float = 1.0
    """At most so much of what is left: workers then end at about the same time."""
    least_pixels: int = 1
    """Not smaller than this for the sake of `share`."""


LARGEST = ShardSize(1024)
"""Of shards that nobody asked for otherwise."""


class Plan(NamedTuple):
    """A manifest to be, and how many of the listed images it leaves alone. Windows of an image count as images."""

    table: pa.Table
    num_listed: int
    num_unchanged: int

    @property
    def num_shards(self) -> int:
        """Shards that the images were cut into."""
        return int(self.table["shard"][-1].as_py()) + 1 if len(self.table) else 0


class DoneBefore(Protocol):
    """What earlier runs say about images: see `jobs.done.done_before`."""

    def lookup(self, identities: Identities) -> tuple[NDArray[np.bool_], NDArray[np.int16]]:
        """(needs nothing now, attempts so far) of each identity."""

    def attempts(self, identities: Identities) -> NDArray[np.int16]:
        """Attempts so far of each identity."""

    def num_windows(self, identities: Identities) -> NDArray[np.int32]:
        """The windows of each image that has some, none of which needs anything now; see `whole_identity`."""


def plan(
    listing: Iterable[Listed],
    *,
    sources: Sequence[str],
    done: DoneBefore,
    size: ShardSize,
    cut: Cut | None = None,
    window_px: int = 0,
) -> Plan:
    """Choose what is not done and cut it into shards, in the order of the listing.

    `sources` are the names that the table has for what `Listed.source` counts. With `cut`, images larger than
    `window_px` become windows; one of whose windows some are not done is planned whole. ConfigError where an image is
    listed twice.
    """
    num_listed, pages, names = 0, [SCHEMA.empty_table()], bytearray()
    for page in _pages(listing):
        todo, attempts, num_done = _not_done(page, sources, done, window_px if cut else 0)
        boxes = cut(todo, window_px) if cut else [[]] * len(todo)
        pages.append(_table(todo, boxes, attempts, sources, window_px, done))
        num_listed += num_done + len(pages[-1])
        for one in todo:
            names += identity(sources[one.source], one.key, "")
    table = pa.concat_tables(pages)
    _refuse_twins(np.frombuffer(names, "S16"), table)
    return Plan(_with_shards(table, size), num_listed, num_listed - len(table))


def _not_done(
    images: list[Listed], sources: Sequence[str], done: DoneBefore, window_px: int
) -> tuple[list[Listed], NDArray[np.int16], int]:
    """(images to do, the attempts of each so far, rows that need nothing now)."""
    names = np.array([identity(sources[one.source], one.key, one.etag, 0, 0, 1, 0) for one in images], "S16")
    is_done, attempts = done.lookup(names)
    num_done = int(is_done.sum())
    if window_px and not is_done.all():
        rest = np.flatnonzero(~is_done)
        left = [images[number] for number in rest]
        wholes = [whole_identity(sources[one.source], one.key, one.etag, window_px) for one in left]
        num_windows = done.num_windows(np.array(wholes, "S16"))
        is_done[rest[num_windows > 0]] = True
        num_done += int(num_windows.sum())
    todo = [found for found, skip in zip(images, is_done, strict=True) if not skip]
    return todo, attempts[~is_done], num_done


def _refuse_twins(names: Identities, table: pa.Table) -> None:
    """ConfigError where two of the images, by their names, are one."""
    order = np.argsort(names, kind="stable")
    if len(twins := np.flatnonzero(names[order][1:] == names[order][:-1])):
        images = table.filter(pc.equal(pc.add(table["window_y"], table["window_x"]), 0))
        key = images["key"][int(order[twins[0]])].as_py()
        raise ConfigError(f"{key!r} is listed twice, by one manifest or by several: name every image once")


def plan_again(
    manifest: pa.Table, attempts: Mapping[tuple[str, str, int, int], int], *, sources: Sequence[str], size: ShardSize
) -> Plan:
    """Choose the rows of an earlier manifest that `attempts` names by source, key and window; cut them into shards."""
    places = zip(*(manifest[name].to_pylist() for name in ("source", "key", "window_y", "window_x")), strict=True)
    tried = [attempts.get((sources[source], *place)) for source, *place in places]
    table = manifest.filter(pa.array([number is not None for number in tried], pa.bool_()))
    again = pa.array([number for number in tried if number is not None], pa.int16())
    table = table.set_column(SCHEMA.get_field_index("attempts"), SCHEMA.field("attempts"), again)
    return Plan(_with_shards(table, size), len(table), 0)


def _pages(listing: Iterable[Listed]) -> Iterator[list[Listed]]:
    objects = iter(listing)
    while page := list(islice(objects, PAGE)):
        yield page


def _table(
    images: list[Listed],
    boxes: list[list[Box]],
    attempts: NDArray[np.int16],
    sources: Sequence[str],
    window_px: int,
    done: DoneBefore,
) -> pa.Table:
    """A row an image, or a row a window where it has boxes."""
    of_rows = np.repeat(np.arange(len(images)), [max(1, len(windows)) for windows in boxes])
    columns: dict[str, NDArray[Any]] = {name: np.zeros(len(of_rows), np.int32) for name in SCHEMA.names}
    columns["num_windows"] += 1
    columns["attempts"] = attempts[of_rows]
    starts = np.searchsorted(of_rows, np.arange(len(images)))
    for one, windows, start in zip(images, boxes, starts.tolist(), strict=True):
        if windows:
            num, rows = len(windows), slice(start, start + len(windows))
            places = np.array([(box.y0, box.x0, box.height, box.width) for box in windows], np.int32)
            for name, values in zip(("window_y", "window_x", "window_h", "window_w"), places.T, strict=True):
                columns[name][rows] = values
            columns["num_windows"][rows], columns["window_px"][rows] = num, window_px
            columns["height"][rows], columns["width"][rows] = windows[-1].y1, windows[-1].x1
            source = sources[one.source]
            names = [identity(source, one.key, one.etag, box.y0, box.x0, num, window_px) for box in windows]
            columns["attempts"][rows] = done.attempts(np.array(names, "S16"))
    listed = {name: [getattr(images[n], name) for n in of_rows.tolist()] for name in Listed._fields}
    return pa.table(columns | listed, schema=SCHEMA)


def _with_shards(table: pa.Table, size: ShardSize) -> pa.Table:
    """The table with the number of each row's shard."""
    sizes = cost_bytes(table)
    shards = _cut(sizes, *_limits(table, sizes, size))
    return table.set_column(0, SCHEMA.field("shard"), pa.array(shards, pa.int32()))


def _limits(table: pa.Table, sizes: NDArray[np.int64], size: ShardSize) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The most images and bytes of a shard, of each row: more where an archive would be read over and over for it."""
    is_window = table["num_windows"].to_numpy() > 1  # whose bytes are its pixels as colours
    pixels = np.where(is_window, sizes // 3, PIXELS_A_BYTE * sizes)
    left = np.cumsum(pixels[::-1])[::-1]
    most_pixels = np.minimum(size.pixels, np.maximum(size.least_pixels, np.ceil(size.share * left))).astype(np.int64)
    most_bytes = np.minimum(SHARD_BYTES, np.where(is_window, 3 * most_pixels, most_pixels // PIXELS_A_BYTE))
    most_images = np.full(len(sizes), size.images)
    etags = table["archive_etag"]
    starts = [0, *(np.flatnonzero(pc.not_equal(etags[1:], etags[:-1]).to_numpy()) + 1).tolist()] if len(table) else []
    for start, stop in itertools.pairwise([*starts, len(table)]):
        split = members.split(table["key"][start].as_py()) if etags[start].as_py() else None
        if split is not None and members.kind_of(split[0]) in members.STREAMED:
            passes = SHARDS_OF_A_STREAM - 1  # the cut by bytes is never even
            most_images[start:stop] = np.maximum(most_images[start:stop], -(-(stop - start) // passes))
            most_bytes[start:stop] = np.maximum(most_bytes[start:stop], -(-int(sizes[start:stop].sum()) // passes))
    return most_images, most_bytes


def _cut(sizes: NDArray[np.int64], most_images: NDArray[np.int64], most_bytes: NDArray[np.int64]) -> NDArray[np.int32]:
    """Shard number of each row, in order: at most so many images and, beyond the first, bytes.

    The bytes are those of its first row, or of any other that allows more.
    """
    numbers = np.empty(len(sizes), np.int32)
    number, num_images, num_bytes, most = 0, 0, 0, 0
    limits = zip(sizes.tolist(), most_images.tolist(), most_bytes.tolist(), strict=True)
    for row, (size, images, total) in enumerate(limits):
        most = max(most, total)
        if num_images >= images or (num_images and num_bytes + size > most):
            number, num_images, num_bytes, most = number + 1, 0, 0, total
        numbers[row] = number
        num_images, num_bytes = num_images + 1, num_bytes + size
    return numbers
