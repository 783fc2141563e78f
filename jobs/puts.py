"""Many objects put if absent, as `storage.put_if_absent` puts one, and made durable together.

On S3 `begin` puts. On a local disk it writes a file beside the output, whose name `end` gives it after one sync for
all: so a name, as with single puts, stands for the whole content even after the machine lost its power.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs import disk, storage


@dataclass
class Put:
    """One object: `is_new` when `end` put it, not when its name was taken."""

    uri: str
    content: bytes
    temporary: str | None
    """Of a local one that has no name yet."""
    is_new: bool

    @property
    def stored(self) -> bytes:
        """What is there, after `end`."""
        return self.content if self.is_new else storage.read_bytes(self.uri)


def begin(uri: str, content: bytes, *, root: str) -> Put:
    """Do what can be done of a put by itself; `root` as in `storage.put_if_absent`."""
    if storage.is_remote(uri):
        return Put(uri, content, None, storage.put_if_absent(uri, content))
    temporary = disk.begin_put(uri, content, storage.join(root, storage.SCRATCH))
    return Put(uri, content, temporary, False)


def end(puts: Sequence[Put]) -> None:
    """Do the rest of every put: from here on they are durable. StorageError where one fails."""
    local = [put for put in puts if put.temporary is not None]
    taken = disk.end_puts([(put.temporary or "", put.uri) for put in local])
    for put, is_new in zip(local, taken, strict=True):
        put.is_new, put.temporary = is_new, None


def drop(puts: Sequence[Put]) -> None:
    """Give up what is not ended."""
    for put in puts:
        if put.temporary is not None:
            disk.delete(put.temporary)
