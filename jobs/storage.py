"""The only door to URIs: list, read, write, put if absent. Paths and `file://` are local; `s3://` is object storage.
Whatever else fsspec has a driver for is read only.

`s3://profile@bucket/prefix` takes endpoint, region and credentials from that profile of the AWS config files, so that
source and sink may be different stores; `s3://bucket/prefix` takes them from the AWS_* variables.

Errors are made here, once, for every caller:

- ImageError `changed`, `gone`, `integrity`, `unreadable`: this one object, where a version (etag) was asked for;
- FileNotFoundError: an object that was asked for without a version is absent;
- ConfigError: a local folder that does not exist, a scheme or an address that makes no sense;
- StorageError: the world is bad (no such bucket, credentials, forbidden, no answer after retries, no space).
"""

import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, cast
from urllib.parse import unquote, urlsplit

import pyarrow.fs

from jobs import disk, s3_uri
from unetpp.errors import ConfigError, StorageError
from unetpp.spans import ReadFile

if TYPE_CHECKING:
    from jobs.s3 import S3

SCRATCH = ".tmp"
NUM_THREADS = 16
CHUNK_BYTES = 8 << 20
"""Of a stream, read at once."""


class StoredObject(NamedTuple):
    """One listed object: its key (path below the listed root), its version and its size."""

    key: str
    etag: str
    size_bytes: int


def canonical(uri: str | Path) -> str:
    """One spelling for one place: absolute path or `s3://[profile@]bucket/prefix`, no trailing slash.

    ConfigError for schemes that nothing here reads.
    """
    text = os.fspath(uri)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme == "s3":
        s3_uri.split(text)
        return text.rstrip("/")
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{text!r} names the host {parts.netloc!r}; a local path is file:///folder or /folder")
        if "#" in text or "?" in text:
            raise ConfigError(f"{text!r} has a # or ? in its path: write %23 for #, %3F for ?, or the plain path")
        text = unquote(parts.path)
    elif scheme:
        from jobs import foreign

        foreign.check(text)
        return text.rstrip("/")
    if not text:
        raise ConfigError("a location is empty; wanted a local path, file:// or s3://")
    return os.path.abspath(text)


def canonical_sink(uri: str | Path) -> str:
    """As `canonical`, of a place that is to be written. ConfigError where that cannot be, whoever may write."""
    return _writable(canonical(uri))


def plain(uri: str) -> str:
    """The location without the name of a storage profile: what other programs, and rows, call it."""
    return s3_uri.without_profile(uri) if is_remote(uri) else uri


def join(uri: str | Path, *parts: str) -> str:
    """The URI of an object below `uri`; parts are taken as they are written."""
    return "/".join([os.fspath(uri).rstrip("/"), *parts])


def is_remote(uri: str | Path) -> bool:
    """Whether `uri` is object storage."""
    return os.fspath(uri).startswith("s3://")


class _Reader(Protocol):
    """What reads a place: an S3 client, or one of the modules for what is no object storage."""

    def list_objects(self, uri: str, /) -> Iterator[tuple[str, str, int]]: ...
    def find(self, uri: str, /) -> tuple[str, int] | None: ...
    def exists(self, uri: str, /) -> bool: ...
    def read(self, uri: str, etag: str | None, /) -> bytes: ...
    def read_range(self, uri: str, start: int, stop: int, etag: str | None, /) -> bytes: ...


def _reader(place: str) -> _Reader:
    if is_remote(place):
        return _s3(place)
    if "://" not in place:
        return disk
    from jobs import foreign

    return foreign


def _s3(place: str) -> "S3":
    """The client of a place. Its libraries take a second to load, which a local folder should not cost."""
    from jobs import s3

    return s3.connect(place)


def list_objects(uri: str | Path, *, missing_ok: bool = False) -> Iterator[StoredObject]:
    """Every object below `uri`, one page in memory at a time, never cached.

    ConfigError where a local folder does not exist, unless `missing_ok`; an S3 prefix without objects is just empty.
    """
    place = canonical(uri)
    reader = _reader(place)
    if missing_ok and not is_remote(place) and not reader.exists(place):
        return iter(())
    return map(StoredObject._make, reader.list_objects(place))


def find(uri: str | Path) -> StoredObject | None:
    """The one object of that name, its key its last path component; None where there is none, or a folder."""
    place = _object(uri)
    found = _reader(place).find(place)
    return None if found is None else StoredObject(place.rpartition("/")[2], *found)


def read_bytes(uri: str | Path, etag: str | None = None) -> bytes:
    """The object's content.

    With `etag`, exactly of that version, else ImageError `changed`, `gone`, `integrity` or `unreadable`; without it,
    whatever is there, else FileNotFoundError.
    """
    place = _object(uri)
    return _reader(place).read(place, etag)


def read_range(uri: str | Path, start: int, stop: int, etag: str | None = None) -> bytes:
    """Bytes `start` to `stop` of the object, both within it; otherwise as `read_bytes`.

    A part of a body has no checksum to compare: only where it lies, and its length, are.
    """
    place = _object(uri)
    return _reader(place).read_range(place, start, stop, etag)


class _Stored(ReadFile):
    """An object as a file: every read is a range of it, retried by itself."""

    def __init__(self, uri: str, etag: str, size_bytes: int, moved: Callable[[], None]) -> None:
        super().__init__(size_bytes)
        self._uri, self._etag, self._moved = uri, etag, moved

    def bytes_at(self, start: int, stop: int) -> bytes:
        self._moved()
        return read_range(self._uri, start, stop, self._etag)


def open_file(uri: str | Path, etag: str, size_bytes: int, moved: Callable[[], None] = lambda: None) -> BinaryIO:
    """The object, of that version, as a file of which what is read is what is asked for, a request each time.

    What fails is asked for again. `moved` is called before every request. Reads raise what it, and `read_bytes`, raise.
    """
    return cast(BinaryIO, _Stored(_object(uri), etag, size_bytes, moved))


def open_stream(uri: str | Path, etag: str, size_bytes: int, moved: Callable[[], None] = lambda: None) -> BinaryIO:
    """As `open_file`, to be read on and on: CHUNK_BYTES at a time."""
    return io.BufferedReader(_Stored(_object(uri), etag, size_bytes, moved), CHUNK_BYTES)


def read_json(uri: str | Path) -> Any:
    """The object's content, parsed. StorageError where it is no JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri} is damaged: {error}") from None


def write_bytes(uri: str | Path, content: bytes, *, root: str | Path | None = None) -> None:
    """Write, over what is there. For what may be rewritten: reports, results, hints, models.

    `root` is the folder whose `.tmp` a local write goes through, as in `put_if_absent`.
    """
    place = _writable(uri)
    if is_remote(place):
        _s3(place).write(place, content)
    else:
        disk.write(place, content, None if root is None else join(canonical(root), SCRATCH))


def upload_file(path: str | Path, uri: str | Path) -> None:
    """Copy a local file to a URI, a part of it in memory at a time: no reader sees half of it.

    A local file is replaced. In object storage nothing is: ConfigError where the name is taken by other bytes.
    """
    place = _writable(uri)
    if not is_remote(place):
        disk.copy(os.fspath(path), place)
    elif not _s3(place).put_file_if_absent(Path(path), place):
        raise ConfigError(f"there is another object {place}: name a place that is free, or remove it first")


def put_if_absent(uri: str | Path, content: bytes, *, root: str | Path | None = None) -> bool:
    """Write unless the name is taken: the one operation that decides anything.

    `root` is the folder whose `.tmp` a local write goes through (default: the object's own folder); it must be on the
    same file system. False: somebody wrote the name, perhaps we ourselves before a lost answer; read it and compare.
    """
    place = _writable(uri)
    if is_remote(place):
        return _s3(place).put_if_absent(place, content)
    folder = os.path.dirname(place) if root is None else canonical(root)
    return disk.put_if_absent(place, content, join(folder, SCRATCH))


def delete(uri: str | Path) -> None:
    """Remove an object; one that is not there is fine."""
    place = _writable(uri)
    if is_remote(place):
        _s3(place).delete(place)
    else:
        disk.delete(place)


def refuses_overwrites(root: str | Path) -> bool:
    """Whether `put_if_absent` below `root` means what it says: found out with a probe object, written twice.

    Some S3 servers ignore the condition. StorageError where the place cannot be written at all.
    """
    probe = join(canonical(root), SCRATCH, f"probe-{uuid.uuid4().hex}")
    try:
        put_if_absent(probe, b"1", root=root)
        return not put_if_absent(probe, b"2", root=root)
    finally:
        delete(probe)


def refuse_unwritable(uri: str | Path) -> None:
    """ConfigError, before there is anything to write, for a place that no object can be written to."""
    place = canonical_sink(uri)
    is_folder = place.rpartition("/")[0] == "s3:/" if is_remote(place) else os.path.isdir(place)
    if is_folder or os.fspath(uri).endswith("/"):
        raise ConfigError(f"{uri} is a folder; wanted the name of a file to write")


def age_s(uri: str | Path, *, root: str | Path) -> float | None:
    """Seconds since the object was last written, by the store's own clock; None where it is absent.

    `root` is a place of the same store whose scratch folder a local probe may use.
    """
    place = _writable(uri)
    if is_remote(place):
        return _s3(place).age_s(place)
    return disk.age_s(place, join(canonical(root), SCRATCH))


def sweep_scratch(root: str | Path) -> None:
    """Remove day-old leftovers of killed writers below a local `root`."""
    if "://" not in (place := canonical(root)):
        disk.sweep(join(place, SCRATCH), older_than_s=86_400)


def exists(uri: str | Path) -> bool:
    """Whether there is an object (locally: or a folder) of that name."""
    place = _object(uri)
    return _reader(place).exists(place)


def download_folder(uri: str | Path) -> Path:
    """A local folder with the objects below `uri`: a local one as it is, a remote one copied once per content.

    FileNotFoundError where there is nothing.
    """
    place = canonical(uri)
    if "://" not in place:
        if not os.path.isdir(place):
            raise FileNotFoundError(f"there is no folder {place}")
        return Path(place)
    listing = list(list_objects(place))
    if not listing:
        raise FileNotFoundError(f"there is nothing below {place}")
    content = hashlib.sha256(repr((place, listing)).encode()).hexdigest()[:32]
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unetpp"
    final_dir = cache_dir / content
    if not final_dir.is_dir():
        arriving_dir = cache_dir / f"{content}.{uuid.uuid4().hex}"
        try:
            for found in listing:
                path = (arriving_dir / found.key).resolve()
                if not path.is_relative_to(arriving_dir.resolve()):
                    raise StorageError(f"{place} holds an object with the unsafe name {found.key!r}; remove it")
                disk.write(str(path), read_bytes(join(place, found.key), found.etag))
            _rename_if_absent(arriving_dir, final_dir)
        finally:
            shutil.rmtree(arriving_dir, ignore_errors=True)
    return final_dir


def upload_folder(folder: str | Path, uri: str | Path, *, last: str | None = None) -> None:
    """Copy a local folder's files below `uri`; the file named `last` goes last, as the sign that all are there."""
    keys = sorted((found.key for found in list_objects(folder)), key=lambda key: (key == last, key))
    for key in keys:
        write_bytes(join(uri, key), read_bytes(join(folder, key)))


def io_threads() -> ThreadPoolExecutor:
    """Threads for many small objects; the caller closes them."""
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="storage")


@contextmanager
def arrow(uri: str | Path) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
    """(filesystem, path in it) for pyarrow's Parquet readers, whose errors inside the block become StorageError."""
    place = canonical(uri)
    try:
        if is_remote(place):
            yield _s3(place).arrow_filesystem(place), plain(place).removeprefix("s3://")
        else:
            yield pyarrow.fs.LocalFileSystem(), _writable(place)
    except FileNotFoundError as error:
        raise StorageError(f"{place}: a file went missing while it was read: {error}") from error
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise StorageError(f"{place} cannot be read: {error}") from error


def _object(uri: str | Path) -> str:
    text = os.fspath(uri)
    # Keys are taken as written: canonical() would fold `a//b` and `..` within a key into another key.
    return canonical(text) if text.startswith("file://") else text


def _writable(uri: str | Path) -> str:
    place = _object(uri)
    if "://" in place and not is_remote(place):
        raise ConfigError(f"{place} can be read, not written; wanted a local path or s3:// for what is written")
    if is_remote(place) and "//" in (key := f"/{s3_uri.split(place)[1]}"):
        raise ConfigError(
            f"{place} has a doubled slash, which some stores and readers take for one and others do not: wanted "
            f"s3://bucket{re.sub('/+', '/', key)} for what is written"
        )
    return place


def _rename_if_absent(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
