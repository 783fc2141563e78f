"""What there is to do: one row per image, or window of a huge one, cut into shards.

A manifest is a Parquet file, written once when a run opens and never changed; a shard is a range of its rows.
"""

import fnmatch
import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs import storage
from unetpp.errors import StorageError

ROWS_PER_GROUP = 8192

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("source", pa.int16(), nullable=False),  # which of the run's sources
        pa.field("key", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("archive_etag", pa.string(), nullable=False),  # empty: a loose object
        pa.field("position", pa.int64(), nullable=False),  # in the archive; -1: a loose object
        pa.field("window_y", pa.int32(), nullable=False),
        pa.field("window_x", pa.int32(), nullable=False),
        pa.field("window_h", pa.int32(), nullable=False),  # 0: to the image's end
        pa.field("window_w", pa.int32(), nullable=False),
        pa.field("num_windows", pa.int32(), nullable=False),
        pa.field("window_px", pa.int32(), nullable=False),  # 0: the image is not cut
        pa.field("height", pa.int32(), nullable=False),  # of the image; 0: not known when it was planned
        pa.field("width", pa.int32(), nullable=False),
        pa.field("attempts", pa.int16(), nullable=False),  # of this version of the image, in earlier runs
        pa.field("extra", pa.string()),  # JSON: what the user's manifest says of the image
    ]
)

_COSTS = ["size_bytes", "window_h", "window_w", "num_windows"]

Identities = NDArray[np.bytes_]


class Listed(NamedTuple):
    """One image of the sources: a loose object, or a member of an archive."""

    source: int
    key: str
    etag: str
    size_bytes: int
    archive_etag: str = ""
    position: int = -1
    extra: str | None = None


class ManifestRow(NamedTuple):
    """One image to do, or one window of a huge one; the columns of SCHEMA."""

    shard: int
    source: int
    key: str
    etag: str
    size_bytes: int
    archive_etag: str
    position: int
    window_y: int
    window_x: int
    window_h: int
    window_w: int
    num_windows: int
    window_px: int
    height: int
    width: int
    attempts: int
    extra: str | None


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


def identity(source: str, key: str, etag: str, *window: int) -> bytes:
    """16 bytes that stand for one version of one image (and window: y, x, num_windows, window_px) of an archive."""
    text = "\0".join([source, key, etag, *map(str, window)])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def whole_identity(source: str, key: str, etag: str, window_px: int) -> bytes:
    """16 bytes that stand for one version of one image, all of whose windows of a grid are meant."""
    return identity(source, key, etag, -1, -1, -1, window_px)


def find(there: Identities, wanted: Identities) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Whether each of `wanted` is in the sorted array, and where.

    Never compare one element with bytes: numpy takes the NULs from the end of an element, and leaves those of bytes.
    """
    if not len(there):
        return np.zeros(len(wanted), bool), np.zeros(len(wanted), np.intp)
    at = np.searchsorted(there, wanted).clip(max=len(there) - 1)
    return there[at] == wanted, at


def matcher(include: Iterable[str]) -> Callable[[str], bool]:
    """Whether a key matches one of the globs, in any case; `*` crosses folders. No glob matches nothing."""
    found = re.compile("|".join(fnmatch.translate(glob.lower()) for glob in include) or "(?!)").match
    return lambda key: found(key.lower()) is not None


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
    sizes = np.add.reduceat(cost_bytes(table), starts)
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


def cost_bytes(table: pa.Table) -> NDArray[np.int64]:
    """What a row's work is guessed by: the image as it is stored, a window as 8-bit colour in memory."""
    size, height, width, num_windows = (table[name].to_numpy().astype(np.int64) for name in _COSTS)
    return np.where(num_windows > 1, 3 * height * width, size)
