"""Whatever else fsspec has a driver for, for `jobs.storage` alone: read, never written.

`http://`, `https://`, `gs://`, `abfs://`, `sftp://`, `memory://` and so on, as far as the driver is installed; it takes
its credentials where its own documentation says. An object's etag is made of what the driver knows of its version: its
ETag, checksum or time of change, and its size. A server that tells none of these keeps its versions to itself.
"""

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import fsspec
import stamina

from unetpp.errors import ConfigError, ImageError, StorageError

Answer = TypeVar("Answer")

MAX_ATTEMPTS, RETRY_SECONDS, ASKED_AT_ONCE = 5, 60.0, 16
VERSION_KEYS = (
    *("ETag", "etag", "generation", "md5Hash", "content_md5", "Content-MD5", "checksum"),
    *("Last-Modified", "mtime", "LastModified", "last_modified", "updated", "modify", "created"),
)
SECRET = re.compile(r".*(signature|sig|token|credential|secret|password|api[-_]?key)", re.IGNORECASE)
"""The names of a query's values that let whoever has the address in."""
NOT_HERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def check(uri: str) -> None:
    """ConfigError where no installed driver reads such an address, or where it holds a password or a signature."""
    parts = urlsplit(uri)
    if parts.password is not None:
        raise ConfigError(
            f"a location at {parts.hostname} holds a password: never write one into a location; its driver takes "
            "credentials from the environment or from files of its own"
        )
    if secret := next((name for name, _ in parse_qsl(parts.query, True) if SECRET.fullmatch(name)), None):
        raise ConfigError(
            f"a location at {parts.hostname} holds a secret, {secret!r}, which would be part of every record: give one "
            "that needs none; for an object that was signed for, the place itself, such as s3://profile@bucket/key"
        )
    if parts.scheme in ("s3a", "s3n", "local"):
        raise ConfigError(f"{uri!r}: cannot open {parts.scheme}://; wanted s3:// or a local path")
    try:
        fsspec.get_filesystem_class(parts.scheme)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{uri!r}: cannot open {parts.scheme}:// here ({error}); wanted a local path or s3://"
        ) from None


def list_objects(root: str) -> Iterator[tuple[str, str, int]]:
    """(path below `root`, etag, size in bytes) of every object. ConfigError where there is nothing."""
    filesystem, path = _connect(root)
    prefix = path.rstrip("/") + "/"
    nothing: list[str] = []
    found = _retried(root, lambda: filesystem.find(path), missing=nothing)
    if not found:
        raise ConfigError(f"there is nothing at {root}: check the address")
    names = iter(sorted(name for name in found if name.startswith(prefix) and not name.endswith("/")))
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        while some := list(itertools.islice(names, 8 * ASKED_AT_ONCE)):
            # What a listing says of a version and what a later question says differ with some drivers.
            infos = threads.map(lambda name: _info(root, filesystem, name), some)
            for name, info in zip(some, infos, strict=True):
                if info is not None:
                    yield name.removeprefix(prefix), _etag(info), int(info.get("size") or 0)


def find(uri: str) -> tuple[str, int] | None:
    """(etag, size in bytes) of an object; None where there is none."""
    filesystem, path = _connect(uri)
    info = _info(uri, filesystem, path)
    return None if info is None or info.get("type") == "directory" else (_etag(info), int(info.get("size") or 0))


def exists(uri: str) -> bool:
    """Whether there is an object or folder of that name."""
    filesystem, path = _connect(uri)
    return bool(_retried(uri, lambda: filesystem.exists(path), missing=False))


def read(uri: str, etag: str | None) -> bytes:
    """The object's bytes; with `etag`, of that version or ImageError `changed` or `gone`."""
    return _read(uri, etag, None, None)


def read_range(uri: str, start: int, stop: int, etag: str | None) -> bytes:
    """Bytes `start` to `stop` of the object; otherwise as `read`."""
    return _read(uri, etag, start, stop) if start < stop else b""


def _read(uri: str, etag: str | None, start: int | None, stop: int | None) -> bytes:
    filesystem, path = _connect(uri)
    before = None if etag is None else _version(uri, filesystem, path)
    content: bytes | None = _retried(uri, lambda: filesystem.cat_file(path, start=start, end=stop), missing=None)
    if content is None:
        if etag is None:
            raise FileNotFoundError(f"there is no object {uri}")
        raise ImageError("gone", f"{uri} was deleted after it was listed")
    if etag is not None and not etag == before == _version(uri, filesystem, path):
        raise ImageError("changed", f"{uri} was replaced after it was listed; the next run takes it")
    if start is not None and stop is not None and len(content) != stop - start:
        raise StorageError(f"{uri}: {len(content)} bytes came of {stop - start}; its server reads no ranges")
    return content


def _version(uri: str, filesystem: Any, path: str) -> str | None:
    info = _info(uri, filesystem, path)
    return None if info is None else _etag(info)


def _info(uri: str, filesystem: Any, path: str) -> Mapping[str, Any] | None:
    def ask() -> Mapping[str, Any]:
        filesystem.invalidate_cache()
        info: Mapping[str, Any] = filesystem.info(path)
        return info

    return _retried(uri, ask, missing=None)


def _etag(info: Mapping[str, Any]) -> str:
    said = [str(info[key]) for key in VERSION_KEYS if info.get(key)]
    return hashlib.sha256(repr((info.get("size"), said)).encode()).hexdigest()[:32]


def _retried(uri: str, call: Callable[[], Answer], missing: Answer) -> Answer:
    """The call's answer, `missing` where nothing is there; StorageError where the driver fails again and again."""
    try:
        for attempt in stamina.retry_context(on=_may_pass, attempts=MAX_ATTEMPTS, timeout=RETRY_SECONDS):
            with attempt:
                try:
                    answer = call()
                except NOT_HERE:
                    answer = missing
        return answer
    except (OSError, aiohttp.ClientError) as error:
        raise StorageError(f"{uri} cannot be read: {type(error).__name__}: {error}") from error


def _may_pass(error: Exception) -> bool:
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status == 429
    return isinstance(error, OSError | aiohttp.ClientError) and not isinstance(error, PermissionError)


def _connect(uri: str) -> tuple[Any, str]:
    """(filesystem of this process, the path in it)."""
    check(uri)
    filesystem = _filesystem(os.getpid(), urlsplit(uri).scheme, urlsplit(uri).netloc)
    return filesystem, filesystem._strip_protocol(uri)


@functools.lru_cache(maxsize=8)
def _filesystem(process: int, scheme: str, host: str) -> Any:
    options = fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(f"{scheme}://{host}")
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
