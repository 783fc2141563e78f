"""CPU time of this process and all that it started, the dead ones included."""

import threading
import time
from types import TracebackType
from typing import Self

import psutil

EVERY_S = 0.5


class TreeTime:
    """Inside the block, what this process and its descendants use: `cpu_s`, and `wall_s`, at the end of it.

    Processes are looked at every half a second, and once more at the end: what one did after the last look before it
    died is missed. What the looking itself costs is not counted.
    """

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0
        self._seen: dict[tuple[int, float], float] = {}
        self._own_s = 0.0
        self._ended = threading.Event()

    def _look(self) -> float:
        """CPU seconds of every process that is or was there."""
        started = time.thread_time()
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                used = process.cpu_times()
                self._seen[process.pid, process.create_time()] = used.user + used.system
            except psutil.NoSuchProcess:
                continue
        self._own_s += time.thread_time() - started
        return sum(self._seen.values()) - self._own_s

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._look()

    def __enter__(self) -> Self:
        self._before = self._look()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall_s = time.monotonic() - self._started
        self._ended.set()
        self._thread.join()
        self.cpu_s = self._look() - self._before
