"""`s3://` URIs through s3fs, for `jobs.storage` alone.

Endpoint, credentials and region come from the usual AWS_* variables (AWS_ENDPOINT_URL included), profiles or instance
roles; `s3://profile@bucket` names a profile of the AWS config files, which then decides alone.
"""

import functools
import os
from collections.abc import Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs
from fsspec.asyn import sync

from jobs import s3_calls, s3_listing, s3_read, s3_upload
from jobs.s3_calls import Calls
from jobs.s3_errors import Refused, no_credentials
from jobs.s3_uri import profile_of, split
from unetpp.errors import StorageError


class S3:
    """One account's objects. A call raises the errors of `jobs.storage`, after bounded retries of what may pass."""

    def __init__(self, profile: str | None = None) -> None:
        self._calls = Calls(profile)

    def list_objects(self, uri: str) -> Iterator[tuple[str, str, int]]:
        """See `s3_listing.list_objects`."""
        return s3_listing.list_objects(self._calls, uri)

    def read(self, uri: str, etag: str | None) -> bytes:
        """The object's bytes; with `etag`, of that version or an ImageError of `jobs.storage`."""
        return s3_read.read(self._calls, uri, etag)

    def read_range(self, uri: str, start: int, stop: int, etag: str | None) -> bytes:
        """Bytes `start` to `stop` of the object, both within it; otherwise as `read`."""
        return s3_read.read(self._calls, uri, etag, (start, stop)) if start < stop else b""

    def write(self, uri: str, content: bytes) -> None:
        """Write the object, over what is there."""
        s3_upload.write(self._calls, uri, content)

    def put_if_absent(self, uri: str, content: bytes) -> bool:
        """PUT with If-None-Match: *. False where an object of that name is there: ours, if a first answer was lost."""
        return s3_upload.put_if_absent(self._calls, uri, content)

    def put_file_if_absent(self, path: Path, uri: str) -> bool:
        """Put a local file; True where it is there already, False where other bytes have the name."""
        return s3_upload.put_file_if_absent(self._calls, path, uri)

    def delete(self, uri: str) -> None:
        """Remove the object, if it is there."""
        bucket, key = split(uri)
        self._calls.call(uri, "delete_object", Bucket=bucket, Key=key)

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
            return self._calls.ask(uri, "head_object", Bucket=bucket, Key=key)
        except Refused as refused:
            if refused.status == 404:
                return None
            raise self._calls.error(uri, refused) from refused.__cause__

    def arrow_filesystem(self, uri: str) -> pyarrow.fs.FileSystem:
        """The same store as pyarrow sees it, with the credentials of this moment: make it, use it, drop it."""
        url, region = urlsplit(self._calls.endpoint), self._calls.client.s3.meta.region_name
        ours = url.hostname is not None and not url.hostname.endswith(("amazonaws.com", "amazonaws.com.cn"))
        credentials = sync(self._calls.client.loop, self._frozen_credentials)
        if credentials is None:
            raise StorageError(no_credentials(uri))
        return pyarrow.fs.S3FileSystem(
            access_key=credentials.access_key,
            secret_key=credentials.secret_key,
            session_token=credentials.token,
            region=region if ours else pyarrow.fs.resolve_s3_region(split(uri)[0]),
            endpoint_override=url.netloc if ours else None,
            scheme=url.scheme,
            connect_timeout=s3_calls.CONNECT_TIMEOUT_S,
            request_timeout=s3_calls.STALL_TIMEOUT_S,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=6),
        )

    async def _frozen_credentials(self) -> Any:
        await self._calls.client.set_session()
        credentials = await self._calls.client.session.get_credentials()
        return None if credentials is None else await credentials.get_frozen_credentials()


def connect(uri: str) -> S3:
    """The client for a location: of this process, its AWS_* variables and the location's profile; for many threads."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _connect(os.getpid(), settings, profile_of(uri))


@functools.lru_cache(maxsize=8)
def _connect(process: int, settings: tuple[tuple[str, str], ...], profile: str | None) -> S3:
    return S3(profile)
