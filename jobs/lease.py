"""Who works on a run: a lease among its hints, so that a second driver follows the first and does nothing twice.

A lease saves work; it decides nothing. Two drivers that both believe to hold one still end with one table.

```
<output>/runs/<run id>/hints/lease-<n>.json      the highest n is the lease; a take-over puts n + 1 if absent
```
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Self

import psutil
from pydantic import BaseModel, ConfigDict

from jobs import storage
from jobs.run_records import HINTS, RunRecord, State, state_of
from jobs.runs import Archive
from unetpp.errors import UnetppError

logger = logging.getLogger(__name__)

POLL_S = 2.0


class Owner(BaseModel):
    """A process, named so that it is told from every other one, and known to be gone by those that can see it."""

    model_config = ConfigDict(frozen=True)

    host: str
    kernel: str
    pid: int
    started_at: float

    @classmethod
    def this_process(cls) -> Self:
        """The process that asks."""
        process = psutil.Process()
        return cls(host=socket.gethostname(), kernel=_kernel(), pid=process.pid, started_at=process.create_time())

    @property
    def is_gone(self) -> bool:
        """True only where this host would see the process if it lived."""
        if (self.host, self.kernel) != (socket.gethostname(), _kernel()):
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started_at) > 1.0
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LeaseRecord(BaseModel):
    """lease-<n>.json, written again and again by its owner; its age, by the store's clock, is the owner's silence."""

    model_config = ConfigDict(frozen=True)

    token: str
    owner: Owner
    ttl_s: float
    num_done: int = 0
    is_released: bool = False


class Lease:
    """A held lease. As a context manager it is renewed by a thread until the end, and then released."""

    def __init__(self, uri_of: Callable[[int], str], number: int, record: LeaseRecord) -> None:
        self.is_lost = False
        """Somebody took us for dead, and works on."""
        self._uri_of, self._number, self._record = uri_of, number, record
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def advance(self, num_done: int) -> None:
        """Images done so far: what followers are told at the next renewal."""
        self._record = self._record.model_copy(update={"num_done": num_done})

    def _renew(self) -> None:
        while not self._ended.wait(self._record.ttl_s / 4):
            try:
                if storage.exists(self._uri_of(self._number + 1)):
                    self.is_lost = True
                    return
                self._write()
            except UnetppError as error:  # the work itself will say so, if the store stays away
                logger.debug("the lease was not renewed: %s", error)

    def _write(self) -> None:
        storage.write_bytes(self._uri_of(self._number), self._record.model_dump_json().encode())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if not self.is_lost:
            self._record = self._record.model_copy(update={"is_released": True})
            try:
                self._write()
            except UnetppError as failure:
                logger.debug("the lease was not released: %s", failure)


def take(archive: Archive, record: RunRecord, ttl_s: float) -> Lease | None:
    """The lease of a run that nobody works on; None where somebody does."""
    number, newest = _newest(archive, record)
    if newest is not None and not _is_over(archive, record, number, newest):
        return None
    ours = LeaseRecord(token=uuid.uuid4().hex, owner=Owner.this_process(), ttl_s=ttl_s)

    def uri_of(lease: int) -> str:
        return _uri(archive, record, lease)

    uri = uri_of(number + 1)
    if not storage.put_if_absent(uri, ours.model_dump_json().encode(), root=archive.output_uri):
        # A refused write may be our own, if its first answer was lost: the token tells.
        there = _read(uri)
        if there is None or there.token != ours.token:
            return None
    return Lease(uri_of, number + 1, ours)


def live(archive: Archive, record: RunRecord) -> LeaseRecord | None:
    """The lease of who works on a run; None where nobody does, or without one."""
    number, newest = _newest(archive, record)
    return None if newest is None or _is_over(archive, record, number, newest) else newest


def follow(archive: Archive, record: RunRecord) -> State:
    """Wait while somebody else works on the run; say how it stands then: `open` when that one is gone."""
    said = -1
    while True:
        if (state := state_of(archive.run_uri(record.run))) != "open":
            return state
        number, newest = _newest(archive, record)
        if newest is None or _is_over(archive, record, number, newest):
            logger.info("%s: nobody works on it any more; going on", record.run)
            return state
        if newest.num_done != said:
            said = newest.num_done
            logger.info(
                "%s: %s works on it, %d of %d images; following", record.run, newest.owner, said, record.num_images
            )
        time.sleep(min(POLL_S, newest.ttl_s / 4))


def _newest(archive: Archive, record: RunRecord) -> tuple[int, LeaseRecord | None]:
    numbers = [0]
    for found in storage.list_objects(archive.run_uri(record.run, HINTS), missing_ok=True):
        digits = found.key.removeprefix("lease-").removesuffix(".json")
        if found.key.startswith("lease-") and digits.isdecimal():
            numbers.append(int(digits))
    number = max(numbers)
    return number, _read(_uri(archive, record, number)) if number else None


def _is_over(archive: Archive, record: RunRecord, number: int, newest: LeaseRecord) -> bool:
    if newest.is_released or newest.owner.is_gone:
        return True
    age_s = storage.age_s(_uri(archive, record, number), root=archive.output_uri)
    return age_s is None or age_s > newest.ttl_s


def _read(uri: str) -> LeaseRecord | None:
    """None for a lease that was swept away or is damaged: it holds nothing."""
    try:
        return LeaseRecord.model_validate_json(storage.read_bytes(uri))
    except (FileNotFoundError, ValueError):
        return None


def _uri(archive: Archive, record: RunRecord, number: int) -> str:
    return archive.run_uri(record.run, HINTS, f"lease-{number}.json")


def _kernel() -> str:
    """The running kernel and the process numbers that are seen in it: containers of one host see different ones."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return "unknown"
