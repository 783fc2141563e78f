"""Objects and parts of them as bytes: of one version, whole, and as they were stored."""

import asyncio
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import aiohttp
from botocore.exceptions import ConnectionClosedError, FlexibleChecksumError

from jobs import s3_calls
from jobs.s3_calls import Calls
from jobs.s3_errors import ARCHIVED, Corrupt, Damaged, Refused
from jobs.s3_uri import split
from unetpp.errors import ImageError, StorageError

MIN_BYTES_PER_S = 10_000
"""A slower body is given up and asked for again, on a new connection."""
DAMAGED_TRIES = 4


def read(calls: Calls, uri: str, etag: str | None, span: tuple[int, int] | None = None) -> bytes:
    bucket, key = split(uri)
    asked = {} if etag is None else {"IfMatch": f'"{etag}"'}
    if span is not None:
        asked["Range"] = f"bytes={span[0]}-{span[1] - 1}"

    num_damaged = 0

    async def get() -> bytes:
        nonlocal num_damaged
        response = await calls.client._call_s3("get_object", Bucket=bucket, Key=key, **asked)
        size_bytes = response["ContentLength"]
        try:
            async with response["Body"] as body:
                # Not a limit on the whole: a body may take as long as it likes, if it only moves.
                reading = body.read()
                content: bytes = await asyncio.wait_for(
                    reading, s3_calls.STALL_TIMEOUT_S + size_bytes / MIN_BYTES_PER_S
                )
        except (aiohttp.ClientError, RuntimeError) as error:  # aiohttp's for a body that ends early
            raise ConnectionClosedError(endpoint_url=uri) from error
        if (why := _damage(response, content, span)) is not None:
            num_damaged += 1
            raise Damaged(why) if num_damaged < DAMAGED_TRIES else Corrupt(why)
        return content

    try:
        return calls.retried(uri, get)
    except Refused as refused:
        if refused.code == ARCHIVED and etag is not None:
            raise ImageError("unreadable", f"{calls.error(uri, refused)}; it is tried again") from None
        if refused.status == 412:
            raise ImageError("changed", f"{uri} was replaced after it was listed; the next run takes it") from None
        if refused.code == "NoSuchKey":
            if etag is None:
                raise FileNotFoundError(f"there is no object {uri}") from None
            raise ImageError("gone", f"{uri} was deleted after it was listed") from None
        raise calls.error(uri, refused) from refused.__cause__
    except (FlexibleChecksumError, Damaged, Corrupt) as error:
        if etag is None:
            raise StorageError(f"{uri} arrives damaged again and again: {error}") from None
        raise ImageError("integrity", f"{uri} arrives damaged again and again: {error}") from None


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
