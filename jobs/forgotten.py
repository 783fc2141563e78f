"""Which images of an output were forgotten: no model predicts those again, also one that has not seen them yet.

```
<output>/forgotten/<identity>      empty: the name is a digest of the image's source, key and etag
```
"""

import re
from collections.abc import Iterable, Sequence

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


def among(removed: Identities, listed: pa.Table, sources: Sequence[str]) -> NDArray[np.bool_]:
    """Which rows of a manifest are images of `removed`; `sources` names what its `source` counts."""
    names = [
        _identity((sources[row["source"]], row["key"], row["etag"]))
        for batch in listed.select(["source", "key", "etag"]).to_batches(max_chunksize=1 << 16)  # as Python objects
        for row in batch.to_pylist()
    ]
    return np.isin(np.array(names, "S16"), removed)


def _identity(version: Version) -> bytes:
    return identity(*version, 0, 0, 1, 0)
