"""What there is to do: one row per image, or window of a huge one, that is not done yet, cut into shards.

A manifest is a Parquet file, written once when a run opens and never changed; a shard is a range of its rows.
"""

import fnmatch
import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs import storage
from jobs.storage import StoredObject
from unetpp.errors import StorageError
from unetpp.tiles import Box

SHARD_BYTES = 64 << 20
PAGE = 10_000
ROWS_PER_GROUP = 8192

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("window_y", pa.int32(), nullable=False),
        pa.field("window_x", pa.int32(), nullable=False),
        pa.field("window_h", pa.int32(), nullable=False),  # 0: to the image's end
        pa.field("window_w", pa.int32(), nullable=False),
        pa.field("num_windows", pa.int32(), nullable=False),
        pa.field("window_px", pa.int32(), nullable=False),  # 0: the image is not cut
        pa.field("height", pa.int32(), nullable=False),  # of the image; 0: not known when it was planned
        pa.field("width", pa.int32(), nullable=False),
        pa.field("attempts", pa.int16(), nullable=False),  # of this version of the image, in earlier runs
    ]
)

_COSTS = ["size_bytes", "window_h", "window_w", "num_windows"]

Identities = NDArray[np.bytes_]
Cut = Callable[[Sequence[StoredObject], int], list[list[Box]]]
"""(images, window_px) -> the windows of each; none for one that is not cut."""


class ManifestRow(NamedTuple):
    """One image to do, or one window of a huge one; the columns of SCHEMA."""

    shard: int
    key: str
    etag: str
    size_bytes: int
    window_y: int
    window_x: int
    window_h: int
    window_w: int
    num_windows: int
    window_px: int
    height: int
    width: int
    attempts: int


class Shard(NamedTuple):
    """The unit of work, retry and commit: rows `start` to `stop` of the manifest."""

    number: int
    start: int
    stop: int
    size_bytes: int = 0
    """Of its images as they are stored, its windows as they are in memory: what its work is guessed by."""

    @property
    def num_images(self) -> int:
        """Rows of the shard."""
        return self.stop - self.start


class Plan(NamedTuple):
    """A manifest to be, and how many of the listed images it leaves alone. Windows of an image count as images."""

    table: pa.Table
    num_listed: int
    num_unchanged: int
    num_others: int
    """Objects whose key no include glob matches; not part of `num_listed`."""

    @property
    def num_shards(self) -> int:
        """Shards that the images were cut into."""
        return int(self.table["shard"][-1].as_py()) + 1 if len(self.table) else 0


class DoneBefore(Protocol):
    """What earlier runs say about images: see `jobs.table.done_before`."""

    def lookup(self, identities: Identities) -> tuple[NDArray[np.bool_], NDArray[np.int16]]:
        """(needs nothing now, attempts so far) of each identity."""

    def attempts(self, identities: Identities) -> NDArray[np.int16]:
        """Attempts so far of each identity."""

    def num_windows(self, identities: Identities) -> NDArray[np.int32]:
        """The windows of each image that has some, none of which needs anything now; see `whole_identity`."""


def identity(source: str, key: str, etag: str, *window: int) -> bytes:
    """16 bytes that stand for one version of one image (and window: y, x, num_windows, window_px) of an archive."""
    text = "\0".join([source, key, etag, *map(str, window)])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def whole_identity(source: str, key: str, etag: str, window_px: int) -> bytes:
    """16 bytes that stand for one version of one image, all of whose windows of a grid are meant."""
    return identity(source, key, etag, -1, -1, -1, window_px)


def matcher(include: Iterable[str]) -> Callable[[str], bool]:
    """Whether a key matches one of the globs, in any case; `*` crosses folders."""
    found = re.compile("|".join(fnmatch.translate(glob.lower()) for glob in include)).match
    return lambda key: found(key.lower()) is not None


def plan(
    listing: Iterable[StoredObject],
    *,
    source: str,
    include: Iterable[str],
    done: DoneBefore,
    shard_images: int,
    cut: Cut | None = None,
    window_px: int = 0,
) -> Plan:
    """Choose what matches and is not done, sort it by key and cut it into shards.

    With `cut`, images larger than `window_px` become windows. One of whose windows some are not done is planned whole.
    """
    is_image = matcher(include)
    num_listed, num_others = 0, 0
    pages = [SCHEMA.empty_table()]
    for page in _pages(listing):
        images = [found for found in page if is_image(found.key)]
        num_others += len(page) - len(images)
        todo, attempts, num_done = _not_done(images, source, done, window_px if cut else 0)
        boxes = cut(todo, window_px) if cut else [[]] * len(todo)
        pages.append(_table(todo, boxes, attempts, source, window_px, done))
        num_listed += num_done + len(pages[-1])
    table = _by_key(pa.concat_tables(pages))
    return Plan(_in_shards(table, shard_images), num_listed, num_listed - len(table), num_others)


def _not_done(
    images: list[StoredObject], source: str, done: DoneBefore, window_px: int
) -> tuple[list[StoredObject], NDArray[np.int16], int]:
    """(images to do, the attempts of each so far, rows that need nothing now)."""
    names = np.array([identity(source, found.key, found.etag, 0, 0, 1, 0) for found in images], "S16")
    is_done, attempts = done.lookup(names)
    num_done = int(is_done.sum())
    if window_px and not is_done.all():
        rest = np.flatnonzero(~is_done)
        wholes = [whole_identity(source, images[n].key, images[n].etag, window_px) for n in rest]
        num_windows = done.num_windows(np.array(wholes, "S16"))
        is_done[rest[num_windows > 0]] = True
        num_done += int(num_windows.sum())
    todo = [found for found, skip in zip(images, is_done, strict=True) if not skip]
    return todo, attempts[~is_done], num_done


def plan_again(manifest: pa.Table, attempts: Mapping[tuple[str, int, int], int], *, shard_images: int) -> Plan:
    """Choose the rows of an earlier manifest that `attempts` names by key and window, and cut them into shards."""
    places = zip(*(manifest[name].to_pylist() for name in ("key", "window_y", "window_x")), strict=True)
    tried = [attempts.get(place) for place in places]
    table = manifest.filter(pa.array([number is not None for number in tried], pa.bool_()))
    again = pa.array([number for number in tried if number is not None], pa.int16())
    table = table.set_column(SCHEMA.get_field_index("attempts"), SCHEMA.field("attempts"), again)
    return Plan(_in_shards(table, shard_images), len(table), 0, 0)


def encode(table: pa.Table) -> bytes:
    """The manifest's bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=ROWS_PER_GROUP, compression="zstd")
    return sink.getvalue()


def read(manifest_uri: str, sha256: str, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """A whole manifest. StorageError where its bytes are not those that the run was opened with."""
    content = storage.read_bytes(manifest_uri)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StorageError(f"{manifest_uri} is not the manifest that its run was opened with; it must not be changed")
    return pq.read_table(io.BytesIO(content), columns=list(columns))


def shards(manifest_uri: str, sha256: str) -> list[Shard]:
    """Every shard of a manifest; StorageError as `read`."""
    table = read(manifest_uri, sha256, ["shard", *_COSTS])
    numbers = table["shard"].to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    stops = np.append(starts[1:], len(numbers))
    sizes = np.add.reduceat(_cost_bytes(table), starts)
    places = zip(numbers[starts].tolist(), starts.tolist(), stops.tolist(), sizes.tolist(), strict=True)
    return [Shard._make(place) for place in places]


def read_rows(manifest_uri: str, shard: Shard) -> list[ManifestRow]:
    """The rows of one shard."""
    first, last = shard.start // ROWS_PER_GROUP, (shard.stop - 1) // ROWS_PER_GROUP
    groups = pa.concat_tables([_row_group(manifest_uri, group) for group in range(first, last + 1)])
    rows = groups.slice(shard.start - first * ROWS_PER_GROUP, shard.num_images)
    return [ManifestRow(**row) for row in rows.to_pylist()]


@functools.lru_cache(maxsize=2)
def _row_group(manifest_uri: str, group: int) -> pa.Table:
    with storage.arrow(manifest_uri) as (filesystem, path), pq.ParquetFile(path, filesystem=filesystem) as file:
        return file.read_row_group(group)


def _by_key(table: pa.Table) -> pa.Table:
    """Sorted by key. Stores list in this order, and a sorted copy of millions of rows is worth avoiding."""
    keys = table["key"]
    is_sorted = pc.all(pc.less_equal(keys[:-1], keys[1:]), min_count=0).as_py() if len(keys) else True
    return table if is_sorted else table.sort_by("key")


def _pages(listing: Iterable[StoredObject]) -> Iterator[list[StoredObject]]:
    objects = iter(listing)
    while page := list(islice(objects, PAGE)):
        yield page


def _table(
    images: list[StoredObject],
    boxes: list[list[Box]],
    attempts: NDArray[np.int16],
    source: str,
    window_px: int,
    done: DoneBefore,
) -> pa.Table:
    """A row an image, or a row a window where it has boxes."""
    of_rows = np.repeat(np.arange(len(images)), [max(1, len(windows)) for windows in boxes])
    columns: dict[str, NDArray[Any]] = {name: np.zeros(len(of_rows), np.int32) for name in SCHEMA.names}
    columns["num_windows"] += 1
    columns["attempts"] = attempts[of_rows]
    starts = np.searchsorted(of_rows, np.arange(len(images)))
    for found, windows, start in zip(images, boxes, starts.tolist(), strict=True):
        if windows:
            num, rows = len(windows), slice(start, start + len(windows))
            places = np.array([(box.y0, box.x0, box.height, box.width) for box in windows], np.int32)
            for name, values in zip(("window_y", "window_x", "window_h", "window_w"), places.T, strict=True):
                columns[name][rows] = values
            columns["num_windows"][rows], columns["window_px"][rows] = num, window_px
            columns["height"][rows], columns["width"][rows] = windows[-1].y1, windows[-1].x1
            names = [identity(source, found.key, found.etag, box.y0, box.x0, num, window_px) for box in windows]
            columns["attempts"][rows] = done.attempts(np.array(names, "S16"))
    listed = {name: [getattr(images[n], name) for n in of_rows.tolist()] for name in StoredObject._fields}
    return pa.table(columns | listed, schema=SCHEMA)


def _in_shards(table: pa.Table, shard_images: int) -> pa.Table:
    shards = _cut(_cost_bytes(table), shard_images)
    return table.set_column(0, SCHEMA.field("shard"), pa.array(shards, pa.int32()))


def _cost_bytes(table: pa.Table) -> NDArray[np.int64]:
    """What a row's work is guessed by: the image as it is stored, a window as 8-bit colour in memory."""
    size, height, width, num_windows = (table[name].to_numpy().astype(np.int64) for name in _COSTS)
    return np.where(num_windows > 1, 3 * height * width, size)


def _cut(sizes: NDArray[np.int64], shard_images: int) -> NDArray[np.int32]:
    """Shard number of each row, in order: at most `shard_images` images and, beyond the first, SHARD_BYTES bytes."""
    numbers = np.empty(len(sizes), np.int32)
    number, num_images, num_bytes = 0, 0, 0
    for row, size in enumerate(sizes.tolist()):
        if num_images == shard_images or (num_images and num_bytes + size > SHARD_BYTES):
            number, num_images, num_bytes = number + 1, 0, 0
        numbers[row] = number
        num_images, num_bytes = num_images + 1, num_bytes + size
    return numbers
