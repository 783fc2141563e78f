"""Work that runs ahead of whoever needs its results: an iterator in a thread of its own, and a bounded queue."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

Result = TypeVar("Result")


class Ahead(Generic[Result]):
    """Inside the block, the results of a generator, made in a thread while the last ones are used; for one reader.

    What waits weighs no more than `most`, or is one result. What the generator raises is raised to the reader, after
    the results before it. At the end of the block it makes nothing more, and is closed in the thread that ran it.
    """

    def __init__(
        self, results: Generator[Result], weigh: Callable[[Result], int], most: int, *, name: str = "ahead"
    ) -> None:
        self._results, self._weigh, self._most = results, weigh, most
        self._waiting: deque[Result] = deque()
        self._weight = 0
        self._error: BaseException | None = None
        self._is_ended = self._is_stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        try:
            try:
                for result in self._results:
                    if not self._put(result):
                        break
            finally:
                self._results.close()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._is_ended = True
                self._changed.notify()

    def _put(self, result: Result) -> bool:
        """False where nobody wants it any more."""
        weight = self._weigh(result)
        with self._changed:
            while self._waiting and self._weight + weight > self._most and not self._is_stopped:
                self._changed.wait()
            if self._is_stopped:
                return False
            self._waiting.append(result)
            self._weight += weight
            self._changed.notify()
            return True

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        with self._changed:
            while not self._waiting and not self._is_ended:
                self._changed.wait()
            if self._waiting:
                result = self._waiting.popleft()
                self._weight -= self._weigh(result)
                self._changed.notify()
                return result
        if self._error is not None:
            raise self._error
        raise StopIteration

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_stopped = True
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()
