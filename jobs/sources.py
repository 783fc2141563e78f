"""What a run reads: folders, prefixes, archives and manifests, one after the other, as one listing.

An input is a folder or prefix (all objects below it, the members of archives among them), or one object: an archive, an
image, or a manifest: Parquet or CSV with a column `uri`, whose other columns travel to the table's column `extra`. An
object's keys are those that it has in its folder.
"""

import csv
import io
import itertools
import json
import os
import posixpath
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from jobs import manifest, members, parquet_images, storage
from jobs.archives import Archive, place
from jobs.contract import PredictOptions
from jobs.manifest import Listed
from jobs.members import Limits, Member
from jobs.parquet_images import Columns
from jobs.storage import StoredObject
from unetpp.errors import ConfigError, ImageError

ARCHIVES_AT_ONCE, OBJECTS_AHEAD, ROWS_AT_ONCE = 4, 2000, 1000


class Source(NamedTuple):
    """One input: where its keys begin, and the object that is meant, if it is one."""

    root: str
    name: str | None = None

    @property
    def uri(self) -> str:
        """The input, as it was named."""
        return self.root if self.name is None else storage.join(self.root, self.name)


def resolve(inputs: Iterable[str], output_uri: str) -> tuple[Source, ...]:
    """What the inputs are. ConfigError where they overlap, or the output lies in one."""
    sources = tuple(_source(storage.canonical(uri)) for uri in inputs)
    for source in sources:
        if source.name is None and _is_within(output_uri, source.root):
            raise ConfigError(
                f"the output {output_uri} lies inside the input {source.uri}: masks would be listed as images; "
                "choose an output beside it"
            )
        for other in sources:
            if other is not source and _is_within(other.uri, source.uri):
                raise ConfigError(f"the input {other.uri} is part of the input {source.uri}: give one of them")
    return sources


def _source(uri: str) -> Source:
    folder, slash, name = uri.rpartition("/")
    if "." in name and not folder.endswith(":/") and storage.find(uri) is not None:
        return Source(folder or slash, name)
    return Source(uri)


def _is_within(uri: str, folder: str) -> bool:
    """Whether a place is that folder, or below it; of local ones, also where links lead there."""
    spellings = [(storage.plain(uri), storage.plain(folder))]
    if "://" not in uri and "://" not in folder:
        spellings.append((os.path.realpath(uri), os.path.realpath(folder)))
    return any(f"{inner}/".startswith(storage.join(outer, "")) for inner, outer in spellings)


def limits_of(config: PredictOptions) -> Limits:
    """What an archive may hold."""
    return Limits(config.max_members, config.max_member_mb << 20, config.max_ratio)


def columns_of(config: PredictOptions) -> Columns:
    """What is read of a Parquet file."""
    return Columns(config.image_column, config.name_column)


class Listing:
    """Every image of some sources, in an order that is the same whenever the same things are there.

    num_others: objects and members seen so far that `include` and `exclude` leave out.
    """

    def __init__(self, sources: Sequence[Source], config: PredictOptions, indexes_uri: str) -> None:
        self._sources, self._indexes_uri = sources, indexes_uri
        self._limits, self._columns = limits_of(config), columns_of(config)
        self._is_excluded = manifest.matcher(config.exclude)
        self._is_included = manifest.matcher(config.include)
        self.num_others = 0

    def __iter__(self) -> Iterator[Listed]:
        """List; archives are looked into side by side, a few ahead of what is asked for."""
        coming: deque[tuple[_Found, Future[list[Member]] | None]] = deque()
        num_opened, ended = 0, threading.Event()
        threads = ThreadPoolExecutor(ARCHIVES_AT_ONCE, thread_name_prefix="archives")
        try:
            for found in itertools.chain(self._objects(), [None]):
                while coming and (found is None or num_opened >= ARCHIVES_AT_ONCE or len(coming) >= OBJECTS_AHEAD):
                    first, inside = coming.popleft()
                    num_opened -= inside is not None
                    yield from self._loose(first) if inside is None else self._members(first, inside)
                if found is not None:
                    inside = threads.submit(self._look_into, found, ended) if self._is_opened(found) else None
                    num_opened += inside is not None
                    coming.append((found, inside))
        finally:  # whoever ends it in the middle is not to wait for whole archives
            ended.set()
            threads.shutdown(cancel_futures=True)

    def _objects(self) -> Iterator["_Found"]:
        for number, source in enumerate(self._sources):
            if source.name is None:
                yield from (_Found(number, source, *found) for found in storage.list_objects(source.root))
            elif (found := storage.find(source.uri)) is None:
                raise ConfigError(f"{source.uri} is there no more: check --input")
            elif (rows := _rows_of(source, found, self._columns)) is None:
                yield _Found(number, source, *found)
            else:
                yield from _named(number, source, rows)

    def _is_opened(self, found: "_Found") -> bool:
        return members.kind_of(found.key) is not None and bool(found.etag) and not self._is_excluded(found.key)

    def _look_into(self, found: "_Found", ended: threading.Event) -> list[Member]:
        def go_on() -> None:
            if ended.is_set():
                raise CancelledError

        if members.split(found.key) is not None:
            return [members.rest("named", 0)]
        archive = Archive(found.uri, found.etag, found.size_bytes, self._limits, self._columns, go_on)
        try:
            return archive.members(self._indexes_uri)
        except ImageError as error:
            return [members.rest(error.code, 0)]  # gone, changed, integrity or unreadable

    def _loose(self, found: "_Found") -> Iterator[Listed]:
        is_wanted = found.extra is not None or self._is_included(found.key)
        if not is_wanted or self._is_excluded(found.key):
            self.num_others += 1
            return
        etag = found.etag or members.refused("absent")
        if found.extra is None and members.split(found.key) is not None:
            etag = members.refused("named")
        yield Listed(found.source, found.key, etag, found.size_bytes, extra=found.extra)

    def _members(self, found: "_Found", inside: Future[list[Member]]) -> Iterator[Listed]:
        is_table = members.kind_of(found.key) == "parquet"
        for name, etag, size_bytes, position in inside.result():
            if not name:
                if etag == "table" and found.where.name is None:
                    self.num_others += 1  # one of the folder's objects, and of something else
                    continue
                etag = members.refused(etag, found.etag)
                yield Listed(found.source, found.key, etag, 0, found.etag, position, found.extra)
                continue
            plain = f"{found.key}#{members.plain_name(name)}"
            if self._is_excluded(plain) or not (is_table or self._is_included(plain)):
                self.num_others += 1
                continue
            if not etag.startswith("refused:") and not is_table and members.kind_of(name):
                etag = members.refused("nested")
            yield Listed(found.source, f"{found.key}#{name}", etag, size_bytes, found.etag, position, found.extra)


class _Found(NamedTuple):
    """An object of a source; without an etag, one that a manifest names and that is not there."""

    source: int
    where: Source
    key: str
    etag: str
    size_bytes: int
    extra: str | None = None

    @property
    def uri(self) -> str:
        return place(self.where.root, self.key) if self.extra is not None else storage.join(self.where.root, self.key)


# --------------------------------------------------------------------------------------------- manifests

Rows = Iterator[dict[str, Any]]


def _rows_of(source: Source, found: StoredObject, columns: Columns) -> Rows | None:
    """The rows of a manifest that an input names; None where it is something else."""

    def open_it() -> BinaryIO:
        return storage.open_file(source.uri, found.etag, found.size_bytes)

    name = found.key.lower()
    if name.endswith(".csv"):
        return _csv_rows(source.uri, storage.open_stream(source.uri, found.etag, found.size_bytes))
    schema = parquet_images.schema_of(open_it()) if name.endswith(".parquet") else None
    if schema is None:
        return None
    if parquet_images.has_images(schema, columns):
        if parquet_images.lacks_names(schema, columns):
            raise ConfigError(f"{source.uri} has the columns {', '.join(schema.names)}: --name-column is none of them")
        return None
    if "uri" not in schema.names:
        raise ConfigError(
            f"{source.uri} has the columns {', '.join(schema.names)}: wanted image bytes in one of "
            f"{', '.join(parquet_images.IMAGE_COLUMNS)} (or --image-column), or `uri`, which names images"
        )
    return _parquet_rows(source.uri, open_it())


def _parquet_rows(uri: str, content: BinaryIO) -> Rows:
    try:
        yield from parquet_images.rows(content)
    except parquet_images.BROKEN as error:
        raise ConfigError(f"{uri} cannot be read: {error}; wanted Parquet with a column uri: write it anew") from None


def _csv_rows(uri: str, stream: BinaryIO) -> Rows:
    rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), restkey="")
    try:
        if "uri" not in (rows.fieldnames or ()):
            raise ConfigError(f"{uri} has the columns {', '.join(rows.fieldnames or ())}: wanted one of them to be uri")
        for row in rows:
            row.pop("", None)
            yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}, line {rows.line_num}: {error}; wanted CSV in UTF-8 with a column uri") from None


def _named(number: int, source: Source, rows: Rows) -> Iterator[_Found]:
    """The objects that a manifest names, in its order, asked for side by side."""

    def look(row: dict[str, Any]) -> _Found:
        key, extra = _key(source, row.pop("uri")), _as_json(row)
        found = storage.find(place(source.root, key))
        etag, size_bytes = ("", 0) if found is None else (found.etag, found.size_bytes)
        return _Found(number, source, key, etag, size_bytes, extra)

    with storage.io_threads() as threads:
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            yield from threads.map(look, some)


def _as_json(row: dict[str, Any]) -> str:
    """JSON as every reader takes it: of numbers that it has none for, null."""
    text = json.dumps(row, default=str, ensure_ascii=False)
    if "NaN" not in text and "Infinity" not in text:
        return text
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)


def _key(source: Source, uri: object) -> str:
    """Of an image that a manifest names: its path below the manifest's folder, else its whole address."""
    if not isinstance(uri, str) or not uri or "\0" in uri:
        raise ConfigError(f"{source.uri} has a row whose uri is {uri!r}: wanted a URI, or a path below {source.root}")
    if "://" not in uri and not uri.startswith("/"):
        uri = posixpath.normpath(uri)
        if uri.startswith("../"):
            raise ConfigError(f"{source.uri} names {uri!r}, which leads out of its folder: write the whole path")
        return uri
    whole = uri if storage.is_remote(uri) else storage.canonical(uri)
    return whole.removeprefix(storage.join(source.root, ""))
