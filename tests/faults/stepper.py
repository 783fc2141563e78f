"""Stops a program at any of its storage calls, before or after the call took effect."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest

from jobs import puts, storage
from jobs.lease import Owner

OPERATIONS = (
    "list_objects",
    "read_bytes",
    "read_range",
    "find",
    "write_bytes",
    "put_if_absent",
    "delete",
    "exists",
    "arrow",
)
OF_PUTS = ("begin", "end")

Side = Literal["before", "after"]


class Stopped(BaseException):
    """The process is dead. Not an Exception, so that no guard of the program catches it."""


class Stepper:
    """Counts the storage calls of the threads of one run; at call number `at` it calls `action`, on the given side.

    `action` raises Stopped for a killed process, or waits for a paused one.
    """

    def __init__(self, at: int = 0, side: Side = "before", action: Callable[[], None] = lambda: None) -> None:
        self.num_calls = 0
        self._at, self._side, self._action = at, side, action
        self._is_dead = False
        self._lock = threading.Lock()

    def call(self, operation: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """One storage call of the program."""
        with self._lock:
            if self._is_dead:
                raise Stopped
            self.num_calls += 1
            is_the_one = self.num_calls == self._at
        if is_the_one and self._side == "before":
            self._act()
        try:
            return operation(*args, **options)
        finally:  # that a name is free is an answer, too
            if is_the_one and self._side == "after":
                self._act()

    def _act(self) -> None:
        try:
            self._action()
        except Stopped:
            self._is_dead = True
            raise


@contextmanager
def stepped(stepper: Stepper) -> Iterator[Stepper]:
    """Inside the block storage calls go through `stepper`, and leases name a process that is gone.

    So whoever comes after a stopped run need not wait until its lease is over, as after a real kill on the same host.
    """
    gone = Owner.this_process().model_copy(update={"started_at": 0.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Owner, "this_process", lambda: gone)
        for module, names in ((storage, OPERATIONS), (puts, OF_PUTS)):
            for name in names:
                operation = getattr(module, name)
                patch.setattr(module, name, lambda *args, _of=operation, **options: stepper.call(_of, *args, **options))
        yield stepper


def die() -> None:
    """The action of kill -9."""
    raise Stopped
