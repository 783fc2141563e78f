"""A stored image of which only some bytes are read, whoever asks for them."""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from jobs import storage
from unetpp.spans import Read, Span


class Ranged(NamedTuple):
    """A stored image that is read in spans of bytes. `name` is of this version of it alone."""

    name: str
    size_bytes: int
    read: Read


def ranged(uri: str, etag: str, size_bytes: int, threads: Executor) -> Ranged:
    """A stored image whose spans of bytes are read side by side, always of this version."""

    def read(spans: Sequence[Span]) -> Sequence[bytes]:
        return list(threads.map(lambda span: storage.read_range(uri, span[0], span[1], etag), spans))

    return Ranged(f"{uri}\0{etag}", size_bytes, read)
