"""`s3://` URIs through s3fs, for `jobs.storage` alone.

Endpoint, credentials and region come from the usual AWS_* variables (AWS_ENDPOINT_URL included), profiles or instance
roles; `s3://profile@bucket` names a profile of the AWS config files, which then decides alone. This module owns the
retries of object storage: those of s3fs and botocore are off, so that none multiply.
"""

import asyncio
import functools
import hashlib
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import botocore.session
import pyarrow.fs
import stamina
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    FlexibleChecksumError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from s3fs import S3FileSystem
from stamina.instrumentation import RetryDetails, set_on_retry_hooks

from jobs.s3_errors import TRANSPORT_ERRORS, Corrupt, Damaged, Refused, no_answer, no_credentials, storage_error
from unetpp.errors import ConfigError, ImageError, StorageError

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Page = list[tuple[str, str, int]]
"""Key, etag and size in bytes of some objects."""

CONNECT_TIMEOUT_S, STALL_TIMEOUT_S = 5, 60
MIN_BYTES_PER_S = 10_000
"""A slower body is given up and asked for again, on a new connection."""
MAX_ATTEMPTS, RETRY_SECONDS, MAX_WAIT_S = 9, 120.0, 20.0
SILENT_TRIES = DAMAGED_TRIES = 4
MIN_GAP_S, MAX_GAP_S = 0.01, 1.0
NUM_CONNECTIONS = 32
PAGE_KEYS, MAX_PAGES_IN_LINE, LISTINGS_AT_ONCE = 1000, 4, 16


class _Client(S3FileSystem):
    """s3fs without retries of its own."""

    retries = 1


class S3:
    """One account's objects. A call raises the errors of `jobs.storage`, after bounded retries of what may pass."""

    def __init__(self, profile: str | None = None) -> None:
        named = {} if profile is None else {"profile": profile, "endpoint_url": _endpoint_of(profile)}
        self._pace = _Pace()
        self._client = _Client(
            **named,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": STALL_TIMEOUT_S,
                "max_pool_connections": NUM_CONNECTIONS,
                "retries": {"mode": "standard", "total_max_attempts": 1},
            },
        )
        self._has_answered = False

    def list_objects(self, uri: str) -> Iterator[tuple[str, str, int]]:
        """(key below the prefix `uri`, etag, size in bytes), few pages in memory at a time.

        In the order of the keys' bytes; after MAX_PAGES_IN_LINE pages the folders below are listed side by side, and
        their pages taken in turn: an order that is the same whenever the same objects are there.
        """
        bucket, prefix = split(uri)
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        first: set[str] = set()
        for number, page in enumerate(pages := self._pages(uri, bucket, prefix), start=1):
            yield from page
            if number <= MAX_PAGES_IN_LINE:
                first.update(found[0] for found in page)
            if number == MAX_PAGES_IN_LINE and (folders := self._folders(uri, bucket, prefix)):
                pages.close()
                for found in self._side_by_side(uri, bucket, prefix, *folders):
                    if found[0] not in first:
                        yield found
                return

    def _pages(self, uri: str, bucket: str, prefix: str, below: str = "") -> Generator[Page]:
        """Pages of the objects below `prefix` + `below`, their keys taken from `prefix` on."""
        more: dict[str, str] = {}
        where = {"Bucket": bucket, "Prefix": prefix + below, "MaxKeys": PAGE_KEYS}
        while True:
            page = self._call(uri, "list_objects_v2", **where, **more)
            yield _objects(page, prefix)
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _folders(self, uri: str, bucket: str, prefix: str) -> tuple[list[str], Page] | None:
        """The folders of the first level below `prefix` that has several, and the objects beside them.

        None where there is no such level, where other objects lie above it, or where it fills more than a page: a
        request for each of a million folders with an object each would cost more than it saves.
        """
        below = ""
        while True:
            where = {"Bucket": bucket, "Prefix": prefix + below, "MaxKeys": PAGE_KEYS}
            page = self._call(uri, "list_objects_v2", **where, Delimiter="/")
            folders = [found["Prefix"].removeprefix(prefix) for found in page.get("CommonPrefixes", ())]
            beside = _objects(page, prefix)
            if page.get("IsTruncated") or not folders or (beside and len(folders) == 1):
                return None
            if len(folders) > 1:
                return folders, beside
            (below,) = folders

    def _side_by_side(
        self, uri: str, bucket: str, prefix: str, folders: list[str], beside: Page
    ) -> Iterator[tuple[str, str, int]]:
        """What lies beside the folders, then what is in them: a page of each in turn."""
        yield from beside
        waiting = deque(folders)
        begun: deque[tuple[Generator[Page], Future[Page | None]]] = deque()
        with ThreadPoolExecutor(LISTINGS_AT_ONCE, thread_name_prefix="listing") as threads:
            while waiting or begun:
                while waiting and len(begun) < LISTINGS_AT_ONCE:
                    pages = self._pages(uri, bucket, prefix, waiting.popleft())
                    begun.append((pages, threads.submit(next, pages, None)))
                pages, coming = begun.popleft()
                if (page := coming.result()) is not None:
                    begun.append((pages, threads.submit(next, pages, None)))
                    yield from page

    def read(self, uri: str, etag: str | None) -> bytes:
        """The object's bytes; with `etag`, of that version or ImageError `changed`, `gone` or `integrity`."""
        return self._read(uri, etag)

    def read_range(self, uri: str, start: int, stop: int, etag: str | None) -> bytes:
        """Bytes `start` to `stop` of the object, both within it; otherwise as `read`."""
        return self._read(uri, etag, (start, stop)) if start < stop else b""

    def _read(self, uri: str, etag: str | None, span: tuple[int, int] | None = None) -> bytes:
        bucket, key = split(uri)
        asked = {} if etag is None else {"IfMatch": f'"{etag}"'}
        if span is not None:
            asked["Range"] = f"bytes={span[0]}-{span[1] - 1}"

        num_damaged = 0

        async def get() -> bytes:
            nonlocal num_damaged
            response = await self._client._call_s3("get_object", Bucket=bucket, Key=key, **asked)
            size_bytes = response["ContentLength"]
            try:
                async with response["Body"] as body:
                    # Not a limit on the whole: a body may take as long as it likes, if it only moves.
                    reading = body.read()
                    content: bytes = await asyncio.wait_for(reading, STALL_TIMEOUT_S + size_bytes / MIN_BYTES_PER_S)
            except (aiohttp.ClientError, RuntimeError) as error:  # aiohttp's for a body that ends early
                raise ConnectionClosedError(endpoint_url=uri) from error
            if (why := _damage(response, content, span)) is not None:
                num_damaged += 1
                raise Damaged(why) if num_damaged < DAMAGED_TRIES else Corrupt(why)
            return content

        try:
            return self._retried(uri, get)
        except Refused as refused:
            if refused.status == 412:
                raise ImageError("changed", f"{uri} was replaced after it was listed; the next run takes it") from None
            if refused.code == "NoSuchKey":
                if etag is None:
                    raise FileNotFoundError(f"there is no object {uri}") from None
                raise ImageError("gone", f"{uri} was deleted after it was listed") from None
            raise storage_error(uri, split(uri)[0], self.endpoint, refused) from refused.__cause__
        except (FlexibleChecksumError, Corrupt) as error:
            if etag is None:
                raise StorageError(f"{uri} arrives damaged again and again: {error}") from None
            raise ImageError("integrity", f"{uri} arrives damaged again and again: {error}") from None

    def write(self, uri: str, content: bytes) -> None:
        """Write the object, over what is there."""
        bucket, key = split(uri)
        self._call(uri, "put_object", Bucket=bucket, Key=key, Body=content)

    def put_if_absent(self, uri: str, content: bytes) -> bool:
        """PUT with If-None-Match: *. False where an object of that name is there: ours, if a first answer was lost."""
        bucket, key = split(uri)
        try:
            self._retried(
                uri,
                lambda: self._client._call_s3("put_object", Bucket=bucket, Key=key, Body=content, IfNoneMatch="*"),
            )
        except Refused as refused:
            if refused.status == 412:
                return False
            raise storage_error(uri, split(uri)[0], self.endpoint, refused) from refused.__cause__
        return True

    def delete(self, uri: str) -> None:
        """Remove the object, if it is there."""
        bucket, key = split(uri)
        self._call(uri, "delete_object", Bucket=bucket, Key=key)

    def find(self, uri: str) -> tuple[str, int] | None:
        """(etag, size in bytes) of an object; None where there is none."""
        head = self._head(uri) if split(uri)[1] else None
        return None if head is None else (head["ETag"].strip('"'), head["ContentLength"])

    def exists(self, uri: str) -> bool:
        """Whether there is an object of that name."""
        return self._head(uri) is not None

    def age_s(self, uri: str) -> float | None:
        """Seconds since the object was written, by the store's clock; None where it is absent."""
        if (head := self._head(uri)) is None:
            return None
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        written: datetime = head["LastModified"]
        return (now - written).total_seconds()

    def _head(self, uri: str) -> dict[str, Any] | None:
        bucket, key = split(uri)
        try:
            return self._retried(uri, lambda: self._client._call_s3("head_object", Bucket=bucket, Key=key))
        except Refused as refused:
            if refused.status == 404:
                return None
            raise storage_error(uri, split(uri)[0], self.endpoint, refused) from refused.__cause__

    @property
    def endpoint(self) -> str:
        """The URL that requests go to."""
        return str(self._client.s3.meta.endpoint_url)

    def arrow_filesystem(self, uri: str) -> pyarrow.fs.FileSystem:
        """The same store as pyarrow sees it, with the credentials of this moment: make it, use it, drop it."""
        url, region = urlsplit(self.endpoint), self._client.s3.meta.region_name
        ours = url.hostname is not None and not url.hostname.endswith(("amazonaws.com", "amazonaws.com.cn"))
        credentials = sync(self._client.loop, self._frozen_credentials)
        if credentials is None:
            raise StorageError(no_credentials(uri))
        return pyarrow.fs.S3FileSystem(
            access_key=credentials.access_key,
            secret_key=credentials.secret_key,
            session_token=credentials.token,
            region=region if ours else pyarrow.fs.resolve_s3_region(split(uri)[0]),
            endpoint_override=url.netloc if ours else None,
            scheme=url.scheme,
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=STALL_TIMEOUT_S,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=6),
        )

    async def _frozen_credentials(self) -> Any:
        await self._client.set_session()
        credentials = await self._client.session.get_credentials()
        return None if credentials is None else await credentials.get_frozen_credentials()

    def _call(self, uri: str, operation: str, **arguments: object) -> dict[str, Any]:
        try:
            return self._retried(uri, lambda: self._client._call_s3(operation, **arguments))
        except Refused as refused:
            raise storage_error(uri, split(uri)[0], self.endpoint, refused) from refused.__cause__

    def _retried(self, uri: str, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Run `call` on the client's loop. Refused where the store says no; StorageError where it says nothing."""
        num_silent = 0

        def may_pass(error: Exception) -> bool:
            nonlocal num_silent
            num_silent += 1
            self._has_answered |= Refused.of(error) is not None
            # An endpoint that never answered is a wrong address more often than an outage: say so within seconds.
            return self._may_pass(error) and (self._has_answered or num_silent < SILENT_TRIES)

        try:
            for attempt in stamina.retry_context(
                on=may_pass,
                attempts=MAX_ATTEMPTS,
                timeout=RETRY_SECONDS,
                wait_initial=0.2,
                wait_max=MAX_WAIT_S,
                wait_jitter=0.5,
            ):
                with attempt:
                    self._pace.wait()
                    answer: Answer = sync(self._client.loop, call)
                    self._pace.succeeded()
            self._has_answered = True
            return answer
        except (FlexibleChecksumError, Corrupt):
            raise
        except (OSError, ClientError, BotoCoreError, ResponseParserError, ValueError) as error:
            if (refused := Refused.of(error)) is not None:
                self._has_answered = True
                raise refused from error
            raise no_answer(uri, error) from error

    def _may_pass(self, error: Exception) -> bool:
        """Transport errors, 5xx, throttling, and 409: two conditional writes of one name at one moment."""
        if (refused := Refused.of(error)) is None:
            return isinstance(error, TRANSPORT_ERRORS)
        if refused.status in (429, 503) or refused.code == "SlowDown":
            self._pace.throttled()
        return refused.status >= 500 or refused.status in (409, 429) or refused.code in ("SlowDown", "RequestTimeout")


class _Pace:
    """The least time between two requests of a client: none until the store complains, doubled each time it does.

    All threads share it, so that a store that cannot keep up gets fewer requests, not the same ones more often.
    """

    def __init__(self) -> None:
        self._gap_s, self._next = 0.0, 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until it is this request's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap_s
        time.sleep(turn - now)

    def throttled(self) -> None:
        """The store wants fewer requests."""
        with self._lock:
            self._gap_s = min(max(2 * self._gap_s, MIN_GAP_S), MAX_GAP_S)

    def succeeded(self) -> None:
        """A request was served: a little faster again."""
        with self._lock:
            self._gap_s = self._gap_s * 0.95 if self._gap_s > MIN_GAP_S / 10 else 0.0


def _say_retry(details: RetryDetails) -> None:
    logger.info("%s: next try in %.1f s", type(details.caused_by).__name__, details.wait_for)
    logger.debug("%s", details.caused_by)


set_on_retry_hooks([_say_retry])


def split(uri: str) -> tuple[str, str]:
    """(bucket, key), the key exactly as it is written."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    profile, at, bucket = bucket.rpartition("@")
    if ":" in profile:
        raise ConfigError(
            f"a location in the bucket {bucket!r} holds a password: never write one into a location; put the keys into "
            "a profile of the AWS config files, and name that: s3://profile@bucket/prefix"
        )
    if not bucket or (at and not profile):
        raise ConfigError(f"{uri!r} names no bucket; wanted s3://bucket/prefix or s3://profile@bucket/prefix")
    return bucket, key


def without_profile(uri: str) -> str:
    """s3://bucket/key of s3://profile@bucket/key."""
    bucket, key = split(uri)
    return f"s3://{bucket}/{key}" if key else f"s3://{bucket}"


def _objects(page: Mapping[str, Any], prefix: str) -> Page:
    return [
        (key, found["ETag"].strip('"'), found["Size"])
        for found in page.get("Contents", ())
        if (key := found["Key"].removeprefix(prefix)) and not key.endswith("/")  # consoles' marks of empty folders
    ]


def connect(uri: str) -> S3:
    """The client for a location: of this process, its AWS_* variables and the location's profile; for many threads."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    profile = uri.removeprefix("s3://").partition("/")[0].rpartition("@")[0]
    return _connect(os.getpid(), settings, profile or None)


@functools.lru_cache(maxsize=8)
def _connect(process: int, settings: tuple[tuple[str, str], ...], profile: str | None) -> S3:
    return S3(profile)


def _endpoint_of(profile: str) -> str | None:
    """The endpoint_url of a profile; None: AWS itself. The AWS_ENDPOINT_URL of the environment is another store's."""
    try:
        settings = botocore.session.Session(profile=profile).get_scoped_config()
    except ProfileNotFound:
        raise ConfigError(
            f"there is no storage profile {profile!r}: add a section [profile {profile}] with its keys and "
            "endpoint_url to the AWS config file (~/.aws/config, or AWS_CONFIG_FILE)"
        ) from None
    region = settings.get("region", "us-east-1")
    return settings.get("endpoint_url") or f"https://s3.{region}.amazonaws.com"


def _damage(response: Mapping[str, Any], content: bytes, span: tuple[int, int] | None) -> str | None:
    """What is wrong with a body, None for nothing. An ETag is the MD5 of what was put in one piece, not encrypted."""
    if len(content) != response["ContentLength"]:
        return f"{len(content)} bytes came of {response['ContentLength']}"
    if span is not None:
        wanted = f"bytes {span[0]}-{span[1] - 1}/"
        came = response.get("ContentRange", f"bytes 0-{len(content) - 1}/")
        return None if came.startswith(wanted) else f"{came} came, {wanted[:-1]} was wanted"
    etag = response["ETag"].strip('"')
    if not re.fullmatch("[0-9a-f]{32}", etag) or "kms" in response.get("ServerSideEncryption", ""):
        return None
    if "SSECustomerAlgorithm" in response:
        return None
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return None if md5 == etag else f"their MD5 is {md5}, the ETag says {etag}"
