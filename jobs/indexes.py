"""What is in an archive, found once: the members of each tar and Parquet file, for the nights to come.

```
<output>/indexes/<hash of archive, version and limits>.parquet     derived; may be deleted
```
"""

import hashlib
import io
import json
import logging
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import storage
from jobs.members import Member
from jobs.storage import StoredObject
from unetpp.errors import ImageError, UnetppError

logger = logging.getLogger(__name__)
_SCHEMA = pa.schema(
    [("name", pa.string()), ("etag", pa.string()), ("size_bytes", pa.int64()), ("position", pa.int64())]
)
ARCHIVE = b"archive"
"""In the file's metadata: URI and version of the archive, as JSON."""


def place(indexes_uri: str, said: Sequence[object]) -> str:
    """Where the index is of an archive, its version and how it is read, all of which `said` has."""
    return storage.join(indexes_uri, hashlib.sha256(repr(tuple(said)).encode()).hexdigest()[:32] + ".parquet")


def put(uri: str, found: Sequence[Member], archive_uri: str, etag: str) -> None:
    """Keep an index. Somebody else's of the same archive and version is as good."""
    columns = zip(*found, strict=True) if found else [[]] * len(_SCHEMA)
    schema = _SCHEMA.with_metadata({ARCHIVE: json.dumps([archive_uri, etag]).encode()})
    table = pa.table(dict(zip(_SCHEMA.names, map(list, columns), strict=True)), schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.put_if_absent(uri, sink.getvalue(), root=uri.rpartition("/")[0].rpartition("/")[0])


def read(uri: str) -> list[Member] | None:
    """The members of an index; None where there is none. One that is damaged is removed."""
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=_SCHEMA.names)
    except FileNotFoundError:
        return None
    except pa.ArrowException:  # half written by other means
        storage.delete(uri)
        return None
    return [Member._make(row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def is_needed(uri: str, found: StoredObject) -> bool:
    """Whether the archive that an index is of is there, in that version; also where its store does not say."""
    try:
        with storage.open_file(uri, found.etag, found.size_bytes) as file:
            said = (pq.read_schema(file).metadata or {}).get(ARCHIVE)
    except (ImageError, pa.ArrowException):  # gone or changed by now, or damaged
        return False
    if said is None:
        return False
    archive_uri, etag = json.loads(said)
    try:
        there = storage.find(archive_uri)
    except UnetppError as error:
        logger.warning("%s is kept: %s", uri, error)
        return True
    return there is not None and there.etag == etag
