"""`s3://` URIs through s3fs, for `jobs.storage` alone.

Endpoint, credentials and region come from the usual AWS_* variables (AWS_ENDPOINT_URL included), profiles or instance
roles. This module owns the retries of object storage: those of s3fs and botocore are off, so that none multiply.
"""

import functools
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import pyarrow.fs
import stamina
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectionError,
    CredentialRetrievalError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import FSTimeoutError, sync
from s3fs import S3FileSystem
from stamina.instrumentation import RetryDetails, set_on_retry_hooks

from unetpp.errors import ConfigError, ImageError, StorageError

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

CONNECT_TIMEOUT_S, STALL_TIMEOUT_S = 5, 60
NUM_CONNECTIONS = 32

_CREDENTIAL_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_TRANSPORT_ERRORS = (
    ConnectionError,
    HTTPClientError,
    FlexibleChecksumError,
    IncompleteReadError,
    ResponseParserError,
    FSTimeoutError,
    TimeoutError,
)


class _Client(S3FileSystem):
    """s3fs without retries of its own."""

    retries = 1


class S3:
    """One account's objects. A call raises the errors of `jobs.storage`, after bounded retries of what may pass."""

    def __init__(self) -> None:
        self._client = _Client(
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
        """(key below the prefix `uri`, etag, size in bytes), in the order of the keys' bytes, a page at a time."""
        bucket, prefix = split(uri)
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        more: dict[str, str] = {}
        while True:
            page = self._call(uri, "list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(prefix)
                if key and not key.endswith("/"):  # consoles make empty objects to show folders
                    yield key, found["ETag"].strip('"'), found["Size"]
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def read(self, uri: str, etag: str | None) -> bytes:
        """The object's bytes; with `etag`, of that version or ImageError `changed`, `gone` or `integrity`."""
        bucket, key = split(uri)
        version = {} if etag is None else {"IfMatch": f'"{etag}"'}

        async def get() -> bytes:
            response = await self._client._call_s3("get_object", Bucket=bucket, Key=key, **version)
            try:
                async with response["Body"] as body:
                    content: bytes = await body.read()
            except (aiohttp.ClientError, RuntimeError) as error:  # aiohttp's for a body that ends early
                raise ConnectionClosedError(endpoint_url=uri) from error
            return content

        try:
            return self._retried(uri, get)
        except _Refused as refused:
            if refused.status == 412:
                raise ImageError("changed", f"{uri} was replaced after it was listed; the next run takes it") from None
            if refused.code == "NoSuchKey":
                if etag is None:
                    raise FileNotFoundError(f"there is no object {uri}") from None
                raise ImageError("gone", f"{uri} was deleted after it was listed") from None
            raise _storage_error(uri, self.endpoint, refused) from refused.__cause__
        except FlexibleChecksumError as error:
            raise ImageError("integrity", f"{uri} arrives with another checksum than it has: {error}") from None

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
        except _Refused as refused:
            if refused.status == 412:
                return False
            raise _storage_error(uri, self.endpoint, refused) from refused.__cause__
        return True

    def delete(self, uri: str) -> None:
        """Remove the object, if it is there."""
        bucket, key = split(uri)
        self._call(uri, "delete_object", Bucket=bucket, Key=key)

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
        except _Refused as refused:
            if refused.status == 404:
                return None
            raise _storage_error(uri, self.endpoint, refused) from refused.__cause__

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
            raise StorageError(_no_credentials(uri))
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
        except _Refused as refused:
            raise _storage_error(uri, self.endpoint, refused) from refused.__cause__

    def _retried(self, uri: str, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Run `call` on the client's loop. _Refused where the store says no; StorageError where it says nothing."""
        # An endpoint that never answered is a wrong address more often than an outage: say so within seconds.
        attempts = 9 if self._has_answered else 4
        try:
            for attempt in stamina.retry_context(
                on=_may_pass, attempts=attempts, timeout=120, wait_initial=0.2, wait_max=20, wait_jitter=0.5
            ):
                with attempt:
                    answer: Answer = sync(self._client.loop, call)
            self._has_answered = True
            return answer
        except FlexibleChecksumError:
            raise
        except (OSError, ClientError, BotoCoreError, ResponseParserError, ValueError) as error:
            if (refused := _Refused.of(error)) is not None:
                self._has_answered = True
                raise refused from error
            raise _no_answer(uri, error) from error


class _Refused(Exception):
    """The store answered, and not with what was asked for."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message

    @classmethod
    def of(cls, error: BaseException) -> "_Refused | None":
        answer = error if isinstance(error, ClientError) else error.__cause__
        if not isinstance(answer, ClientError):
            return None
        body = answer.response.get("Error", {})
        status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return cls(int(status), str(body.get("Code", "")), str(body.get("Message", "")))


def _say_retry(details: RetryDetails) -> None:
    logger.info("%s: next try in %.1f s", type(details.caused_by).__name__, details.wait_for)
    logger.debug("%s", details.caused_by)


set_on_retry_hooks([_say_retry])


def _may_pass(error: Exception) -> bool:
    """Transport errors, 5xx, throttling, and 409: two conditional writes of one name at one moment."""
    if (refused := _Refused.of(error)) is not None:
        return refused.status >= 500 or refused.status in (409, 429) or refused.code in ("SlowDown", "RequestTimeout")
    return isinstance(error, _TRANSPORT_ERRORS)


def _storage_error(uri: str, endpoint: str, refused: _Refused) -> StorageError:
    bucket = split(uri)[0]
    if refused.code == "NoSuchBucket" or (refused.status == 404 and not refused.code.startswith("NoSuchKey")):
        return StorageError(
            f"there is no bucket {bucket!r} at {endpoint} (wanted for {uri}): check its name, or create it"
        )
    said = f"{refused.status} {refused.code}".strip() + (f", {refused.message}" if refused.message else "")
    if refused.code in _CREDENTIAL_CODES:
        return StorageError(
            f"{endpoint} does not accept the credentials for {uri} ({said}): check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the profile that AWS_PROFILE names"
        )
    if refused.code == "RequestTimeTooSkewed":
        return StorageError(f"{endpoint} refuses {uri} since this machine's clock is wrong ({said}): set the clock")
    if refused.status in (401, 403):
        return StorageError(
            f"{endpoint} forbids access to {uri} ({said}): check the credentials, and what they may read and write"
        )
    if refused.status >= 500 or refused.status in (409, 429):
        return StorageError(f"{endpoint} kept failing for {uri} ({said}): try again when it is well; nothing is lost")
    return StorageError(f"{endpoint} refuses {uri} ({said})")


def _no_answer(uri: str, error: Exception) -> Exception:
    match error:
        case NoCredentialsError() | PartialCredentialsError() | CredentialRetrievalError():
            return StorageError(_no_credentials(uri))
        case ProfileNotFound():
            return ConfigError(f"{error}: correct AWS_PROFILE, or add the profile to the AWS config file")
        case EndpointConnectionError():
            address = urlsplit(error.kwargs.get("endpoint_url", ""))
            return StorageError(
                f"no answer from {address.scheme}://{address.netloc} (for {uri}): "
                "check AWS_ENDPOINT_URL and the network"
            )
        case ValueError():
            return ConfigError(f"{uri}: {error}; check AWS_ENDPOINT_URL and the bucket's name")
        case _:
            return StorageError(
                f"{uri}: the connection failed again and again ({type(error).__name__}: {error}); try again once the "
                "store is well; nothing is lost"
            )


def _no_credentials(uri: str) -> str:
    return f"no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


def split(uri: str) -> tuple[str, str]:
    """(bucket, key), the key exactly as it is written."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{uri!r} names no bucket; wanted s3://bucket/prefix")
    return bucket, key


def connect() -> S3:
    """The client of this process and its AWS_* variables; made once, used by many threads."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _connect(os.getpid(), settings)


@functools.lru_cache(maxsize=4)
def _connect(process: int, settings: tuple[tuple[str, str], ...]) -> S3:
    return S3()
