"""Objects put into object storage: over what is there, or only where the name is free; a file of any size in parts.

A file is put under its SHA-256, so that who finds the name taken knows whether by the same bytes: those of a first try
whose answer was lost, or of an earlier call.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jobs.s3_calls import Calls
from jobs.s3_errors import Refused
from jobs.s3_uri import split
from unetpp.errors import StorageError

PART_BYTES, MAX_PARTS = 8 << 20, 10_000
"""Of a file, held in memory at once; larger where the file would have more parts than S3 takes."""
SHA256 = "sha256"


def write(calls: Calls, uri: str, content: bytes) -> None:
    """Write the object, over what is there."""
    bucket, key = split(uri)
    calls.call(uri, "put_object", Bucket=bucket, Key=key, Body=content)


def put_if_absent(calls: Calls, uri: str, content: bytes, **more: object) -> bool:
    """PUT with If-None-Match: *. False where an object of that name is there: ours, if a first answer was lost."""
    bucket, key = split(uri)
    try:
        calls.ask(uri, "put_object", Bucket=bucket, Key=key, Body=content, IfNoneMatch="*", **more)
    except Refused as refused:
        if refused.status == 412:
            return False
        raise calls.error(uri, refused) from refused.__cause__
    return True


def put_file_if_absent(calls: Calls, path: Path, uri: str) -> bool:
    """Put a local file where the name is free: no reader sees it before it is whole. True where it is there already.

    A part of it is in memory at a time. False where other bytes have the name.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    metadata, size_bytes = {SHA256: sha256}, path.stat().st_size
    if size_bytes <= PART_BYTES:
        is_put = put_if_absent(calls, uri, path.read_bytes(), Metadata=metadata)
    else:
        is_put = _put_in_parts(calls, path, uri, max(PART_BYTES, -(-size_bytes // MAX_PARTS)), metadata)
    return is_put or _sha256_at(calls, uri) == sha256


def _put_in_parts(calls: Calls, path: Path, uri: str, part_bytes: int, metadata: dict[str, str]) -> bool:
    """Whether the upload was completed; it is not where the name is taken, or the upload is over."""
    parts: list[dict[str, object]] = []
    try:
        with _upload(calls, uri, metadata) as upload, path.open("rb") as file:
            while content := file.read(part_bytes):
                number = len(parts) + 1
                answer = calls.call(uri, "upload_part", **upload, PartNumber=number, Body=content)
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            calls.ask(uri, "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
    except Refused as refused:
        if refused.status == 412 or refused.code == "NoSuchUpload":
            return False
        raise calls.error(uri, refused) from refused.__cause__
    return True


@contextmanager
def _upload(calls: Calls, uri: str, metadata: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What names a new upload in parts. Where it is not completed, its parts are removed."""
    bucket, key = split(uri)
    begun = calls.call(uri, "create_multipart_upload", Bucket=bucket, Key=key, Metadata=metadata)
    upload = {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"]}
    try:
        yield upload
    except BaseException:
        with suppress(Refused, StorageError):
            calls.ask(uri, "abort_multipart_upload", **upload)
        raise


def _sha256_at(calls: Calls, uri: str) -> str | None:
    bucket, key = split(uri)
    answer = calls.call(uri, "head_object", Bucket=bucket, Key=key)
    found: str | None = answer.get("Metadata", {}).get(SHA256)
    return found
