"""Spans of bytes of a file that somebody else reads: asked for as few, close ones as one."""

import io
from collections.abc import Callable, Sequence
from typing import Any

Span = tuple[int, int]
"""First byte, and the one after the last."""
Read = Callable[[Sequence[Span]], Sequence[bytes]]
"""The bytes of some spans of a file."""

BLOCK_BYTES = 64 << 10
"""What a header is read in."""
GAP_BYTES = 16 << 10
"""Spans that are so close are read as one."""
BATCH_BYTES, BATCH_SPANS = 16 << 20, 256
"""What is asked for at a time; a single span may be larger."""


def fetch(read: Read, spans: Sequence[Span]) -> list[bytes]:
    """The bytes of each span; those that lie close together are read as one."""
    order = sorted(range(len(spans)), key=lambda number: spans[number])
    merged: list[Span] = []
    home = [0] * len(spans)
    for number in order:
        start, stop = spans[number]
        if merged and start <= merged[-1][1] + GAP_BYTES and max(stop, merged[-1][1]) - merged[-1][0] <= BATCH_BYTES:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
        home[number] = len(merged) - 1
    contents = read(merged)
    return [
        contents[at][start - merged[at][0] : stop - merged[at][0]]
        for at, (start, stop) in zip(home, spans, strict=True)
    ]


def read_whole(read: Read, size_bytes: int) -> bytes:
    """All bytes of a file."""
    return b"".join(fetch(read, [(at, min(at + BATCH_BYTES, size_bytes)) for at in range(0, size_bytes, BATCH_BYTES)]))


class ReadFile(io.RawIOBase):
    """A file of known size to be read from anywhere: subclasses say how its bytes are come by."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes, self._at = size_bytes, 0

    def bytes_at(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`, which lie within the file and are at least one."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size_bytes)
        content = self.bytes_at(self._at, stop) if self._at < stop else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class SpanFile(ReadFile):
    """The file as header readers want it: its blocks are fetched when they are first touched."""

    def __init__(self, read: Read, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self._read = read
        self._blocks: dict[int, bytes] = {}

    def bytes_at(self, start: int, stop: int) -> bytes:
        """See `ReadFile`."""
        numbers = range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        missing = [number for number in numbers if number not in self._blocks]
        spans = [(number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self._size_bytes)) for number in missing]
        self._blocks.update(zip(missing, fetch(self._read, spans), strict=True))
        content = b"".join(self._blocks[number] for number in numbers)
        first = numbers[0] * BLOCK_BYTES
        return content[start - first : stop - first]
