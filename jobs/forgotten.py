"""Which images of an output were forgotten: no model predicts those again, also one that has not seen them yet.

```
<output>/forgotten/<identity>      empty: the name is a digest of the image's source, key and etag
```
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs import storage
from jobs.manifest import Identities, identity

FOLDER = "forgotten"
Version = tuple[str, str, str]
"""Of an image: source, key, etag."""

_NAME = re.compile("[0-9a-f]{32}")


def remember(output: str, versions: Iterable[Version]) -> None:
    """Note image versions."""
    for version in versions:
        storage.put_if_absent(storage.join(output, FOLDER, _identity(version).hex()), b"", root=output)


def identities(output: str) -> Identities:
    """The `manifest.identity` of every image that was forgotten, as one that is not cut into windows."""
    found = storage.list_objects(storage.join(output, FOLDER), missing_ok=True)
    return np.array([bytes.fromhex(each.key) for each in found if _NAME.fullmatch(each.key)], "S16")


def among(removed: Identities, versions: Iterable[Version]) -> NDArray[np.bool_]:
    """Which image versions are of `removed`."""
    return np.isin(np.array([_identity(version) for version in versions], "S16"), removed)


def versions_of(listed: pa.Table, sources: Sequence[str]) -> Iterator[Version]:
    """The image version of every row of a manifest; `sources` names what its `source` counts."""
    for batch in listed.select(["source", "key", "etag"]).to_batches(max_chunksize=1 << 16):  # few as Python objects
        for row in batch.to_pylist():
            yield sources[row["source"]], row["key"], row["etag"]


def _identity(version: Version) -> bytes:
    return identity(*version, 0, 0, 1, 0)
