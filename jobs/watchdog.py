"""Notices that work stands still. A process that hangs is worth less than a dead one, whose shard is tried again."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar


class _HasRow(Protocol):
    @property
    def row(self) -> "_HasKey": ...


class _HasKey(Protocol):
    @property
    def key(self) -> str: ...


Result = TypeVar("Result", bound=_HasRow)


class Watch:
    """Where the work of one shard stands, and when it last moved."""

    def __init__(self) -> None:
        self.stage, self.key = "begin", ""
        self._moved = time.monotonic()

    def sign(self) -> None:
        """The work moved."""
        self._moved = time.monotonic()

    @property
    def still_s(self) -> float:
        """Seconds since it last did."""
        return time.monotonic() - self._moved

    def through(self, stage: str, results: Iterable[Result]) -> Iterator[Result]:
        """The same results; while the next one is made, `stage` is where the work stands. Stages may be nested."""
        iterator = iter(results)
        while True:
            outer, self.stage = self.stage, stage
            self.sign()
            try:
                result = next(iterator, None)
            finally:
                self.stage = outer
                self.sign()
            if result is None:
                return
            self.key = result.row.key
            yield result


@contextmanager
def watching(stall_s: float, on_stall: Callable[[Watch], None]) -> Iterator[Watch]:
    """Inside the block `on_stall` is called, once and in a thread of its own, when nothing moves for `stall_s`.

    0: never. The thread needs Python's lock: a hang inside C code that keeps it goes unnoticed. Decoders, the ones that
    might, run in processes of their own.
    """
    watch, ended = Watch(), threading.Event()

    def look() -> None:
        while not ended.wait(min(1.0, stall_s / 4)):
            if watch.still_s > stall_s:
                on_stall(watch)
                return

    if stall_s:
        threading.Thread(target=look, daemon=True, name="watchdog").start()
    try:
        yield watch
    finally:
        ended.set()
