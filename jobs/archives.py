"""How a shard's bytes are fetched: loose objects, and members of tar, zip and Parquet archives; nothing is extracted.

A tar is streamed once for its index, which is kept below the output for the nights to come (`jobs.indexes`).
Members of a plain tar or a zip are read by range, neighbours together; those of a compressed tar by streaming it from
its start to the last of them; those of a Parquet file batch by batch.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from jobs import indexes, members, parquet_images, storage, tar, zipped
from jobs.manifest import Listed, ManifestRow
from jobs.members import Limits, Member
from jobs.parquet_images import Columns
from jobs.ranged import Ranged, ranged
from unetpp.errors import ImageError

Content = bytes | Ranged | ImageError
"""Of an image that is cut into windows, what is needed of it is to be read: the whole may be too large."""

GAP_BYTES = 64 << 10
"""Neighbours that are no further apart are read by one request."""


class Archive:
    """One version of an archive in a store. Its reads raise what `storage.read_bytes` raises."""

    def __init__(
        self, uri: str, etag: str, size_bytes: int, limits: Limits, columns: Columns, moved: Callable[[], None]
    ) -> None:
        """`moved` is called while the archive is read, a request for each time."""
        kind = members.kind_of(uri)
        assert kind is not None
        self.uri, self.etag, self.size_bytes, self.kind = uri, etag, size_bytes, kind
        self.limits, self.columns, self._moved = limits, columns, moved

    def open(self) -> BinaryIO:
        """The archive as a file; of a Parquet file only the columns that are wanted are to be read."""
        how = storage.open_file if self.kind == "parquet" else storage.open_stream
        return how(self.uri, self.etag, self.size_bytes, self._moved)

    def members(self, indexes_uri: str) -> list[Member]:
        """Every member, as `index` or an earlier call of this found them; a zip's directory is asked every time."""
        if self.kind == "zip":
            return self._index()
        said = (storage.plain(self.uri), self.etag, self.kind, *self.limits, *self.columns)
        uri = indexes.place(indexes_uri, said)
        if (found := indexes.read(uri)) is None:
            found = self._index()
            indexes.put(uri, found, self.uri, self.etag)
        return found

    def _index(self) -> list[Member]:
        stream, packed_bytes = self.open(), self.size_bytes
        if self.kind == "zip":
            found = zipped.index(stream, packed_bytes, self.limits)
        elif self.kind == "parquet":
            found = parquet_images.index(stream, packed_bytes, self.columns, self.limits)
        else:
            found = tar.index(stream, self.kind, packed_bytes, self.limits)
        return members.only_last(list(found))


def contents(
    sources: Sequence[str],
    rows: Iterable[ManifestRow],
    threads: ThreadPoolExecutor,
    limits: Limits,
    columns: Columns,
    moved: Callable[[], None] = lambda: None,
) -> Iterator[tuple[ManifestRow, Content]]:
    """Each row with its image's bytes, or why it has none, in the order of the rows.

    Args:
        sources: the roots that the rows' `source` counts.
        rows: of a manifest; each is read once where those of one archive are side by side, in the order of positions.
        threads: fetch loose objects, and runs of members, ahead.
        limits: those that the archives were listed with.
        columns: of Parquet files, as they were listed with.
        moved: called while an archive is read to where the next of them is, which may take long.

    Raises:
        StorageError: the world is bad.
    """
    ordered = list(rows)
    runs = _runs(ordered)
    begun = [_begin(sources, run, threads, limits, columns, moved) for run in runs]
    for run, answers in zip(runs, begun, strict=True):
        yield from zip(run, answers, strict=True)


def location(source: str, row: Listed | ManifestRow) -> str:
    """URI of the object that a row is read from: the image itself, or the archive that it is a member of.

    Only a manifest that the user gave may name places outside of its source.
    """
    key = row.key
    if row.archive_etag and (split := members.split(key)) is not None:
        key = split[0]
    return place(source, key) if row.extra is not None else storage.join(source, key)


def place(source: str, key: str) -> str:
    """URI of what a manifest names: below its folder, or anywhere."""
    return key if key.startswith("/") or "://" in key else storage.join(source, key)


def _runs(rows: Sequence[ManifestRow]) -> list[list[ManifestRow]]:
    """Neighbours of one archive in rising order of their positions, or of no archive."""
    runs: list[list[ManifestRow]] = []
    for row in rows:
        last = runs[-1][-1] if runs else None
        if last is None or _container(row) != _container(last) or row.position < last.position:
            runs.append([])
        runs[-1].append(row)
    return runs


def _container(row: ManifestRow) -> tuple[int, str, str]:
    split = members.split(row.key) if row.archive_etag else None
    return row.source, row.archive_etag, split[0] if split else row.key if row.archive_etag else ""


def _begin(
    sources: Sequence[str],
    run: list[ManifestRow],
    threads: ThreadPoolExecutor,
    limits: Limits,
    columns: Columns,
    moved: Callable[[], None],
) -> Iterator[Content]:
    """The contents of rows of one archive, or of loose objects; what can be fetched ahead is begun."""
    why = [members.refusal(row.etag, row.position) for row in run]
    wanted = [row for row, refusal in zip(run, why, strict=True) if refusal is None]
    uri = location(sources[run[0].source], run[0])
    answers: Iterator[Content] = iter(())
    if wanted and not run[0].archive_etag:
        answers = threads.map(lambda row: _read_loose(location(sources[row.source], row), row, threads), wanted)
    elif wanted and members.kind_of(uri) == "tar":
        answers = _ranges(uri, wanted, threads, None)
    elif wanted:
        answers = _read_archive(uri, wanted, threads, limits, columns, moved)
    return (next(answers) if refusal is None else refusal for refusal in why)


def _read_loose(uri: str, row: ManifestRow, threads: ThreadPoolExecutor) -> Content:
    if row.num_windows > 1:
        return ranged(uri, row.etag, row.size_bytes, threads)
    try:
        return storage.read_bytes(uri, row.etag)
    except ImageError as error:
        return error


def _read_archive(
    uri: str,
    rows: list[ManifestRow],
    threads: ThreadPoolExecutor,
    limits: Limits,
    columns: Columns,
    moved: Callable[[], None],
) -> Iterator[Content]:
    """Members of an archive whose size must be known; what is wrong with the whole of it is so for every one."""
    found = storage.find(uri)
    if found is None or found.etag != rows[0].archive_etag:
        error = ImageError("changed", f"{uri} was replaced after it was listed; the next run takes it")
        if found is None:
            error = ImageError("gone", f"{uri} was deleted after it was listed")
        return itertools.repeat(error, len(rows))
    archive = Archive(uri, found.etag, found.size_bytes, limits, columns, moved)
    if archive.kind == "zip":
        try:
            places = _places(uri, found.etag, found.size_bytes, limits)
        except ImageError as error:
            return itertools.repeat(error, len(rows))
        return _ranges(uri, rows, threads, places)
    return _in_one_pass(archive, rows)


@functools.lru_cache(maxsize=4)
def _places(uri: str, etag: str, size_bytes: int, limits: Limits) -> zipped.Places:
    return zipped.places(storage.open_stream(uri, etag, size_bytes), size_bytes, limits)


def _ranges(
    uri: str, rows: list[ManifestRow], threads: ThreadPoolExecutor, places: zipped.Places | None
) -> Iterator[Content]:
    """Members of a plain tar, or with `places` of a zip: neighbours by one request each, side by side."""
    extents = [places.extent(row.position) if places else (row.position, row.position + row.size_bytes) for row in rows]
    joined: list[list[int]] = []
    for number, (start, _) in enumerate(extents):
        if number and 0 <= start - extents[number - 1][1] <= GAP_BYTES:
            joined[-1].append(number)
        else:
            joined.append([number])

    def fetch(numbers: list[int]) -> list[Content]:
        first, last = extents[numbers[0]][0], extents[numbers[-1]][1]
        try:
            content = storage.read_range(uri, first, last, rows[0].archive_etag)
        except ImageError as error:
            return [error] * len(numbers)
        found = []
        for number in numbers:
            start, stop = extents[number]
            found.append(_checked(uri, rows[number], content[start - first : stop - first], places))
        return found

    return itertools.chain.from_iterable(threads.map(fetch, joined))


def _checked(uri: str, row: ManifestRow, packed: bytes, places: zipped.Places | None) -> Content:
    """The member, if it is what was listed; where it is not, its bytes are asked for once more."""
    for is_second in (False, True):
        if is_second:
            start = row.position
            try:
                packed = storage.read_range(uri, start, start + len(packed), row.archive_etag)
            except ImageError as error:
                return error
        content = places.unpack(packed, row.position, row.size_bytes) if places else packed
        if content is not None and members.is_whole(content, row.etag):
            return content
    if places:
        return ImageError("archive", f"it is damaged: its bytes in {uri} do not give its checksum {row.etag}")
    return ImageError("integrity", f"its bytes in {uri} are not those that were listed, read twice")


def _in_one_pass(archive: Archive, rows: list[ManifestRow]) -> Iterator[Content]:
    """Members of a compressed tar, or rows of a Parquet file, as they come by."""
    stream, num_read = archive.open(), 0
    error: ImageError | None = None
    if archive.kind == "parquet":
        found = parquet_images.read(stream, [row.position for row in rows], archive.columns)
    else:
        found = tar.read_streamed(stream, archive.kind, [(row.position, row.size_bytes) for row in rows])
    try:
        for row, content in zip(rows, found, strict=True):
            num_read += 1
            if content is not None and members.is_whole(content, row.etag):
                yield content
            else:
                yield ImageError("integrity", f"its bytes in {archive.uri} are not those that were listed")
    except ImageError as raised:
        error = raised
    except tar.Damaged as damaged:
        error = ImageError("integrity", f"{archive.uri} was whole when it was listed, and ends at {damaged.offset} now")
    if error is not None:
        yield from itertools.repeat(error, len(rows) - num_read)
