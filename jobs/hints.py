"""Notes of a run that decide nothing: which shards are in flight, and that a call is to end.

```
<output>/runs/<run id>/hints/shard-00007.<call>.<uuid>   put before the shard is begun, removed at its end
<output>/runs/<run id>/hints/stop.<call>                 the call's driver wants no more shards begun
```
A shard's note that stays tells that its worker died over it; one that hung adds where.
"""

import contextlib
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jobs import storage
from unetpp.errors import DeviceError, UnetppError


class Seen(NamedTuple):
    """What the notes say before a shard is begun."""

    is_stopped: bool
    """The call is to end."""
    num_tries: int
    """Workers that began the shard and neither ended it nor gave it up: dead ones, or another driver's."""
    num_tries_of_call: int
    """Those of this call."""


def look(hints_uri: str, call: str, shard: int) -> Seen:
    """Read the notes: one listing, of as many notes as there are shards in flight."""
    names = [found.key for found in storage.list_objects(hints_uri, missing_ok=True)]
    tries = [name for name in names if name.startswith(f"shard-{shard:05d}.")]
    return Seen(f"stop.{call}" in names, len(tries), sum(name.split(".")[1] == call for name in tries))


@contextlib.contextmanager
def in_flight(hints_uri: str, call: str, shard: int) -> Iterator[Callable[[str], None]]:
    """Inside the block the shard is noted as begun; only a killed process leaves the note, or one whose GPU broke.

    Yields a function that adds a word to the note, for whoever looks why.
    """
    uri = storage.join(hints_uri, f"shard-{shard:05d}.{call}.{uuid.uuid4().hex}")
    owner = f"{socket.gethostname()} {os.getpid()}"
    storage.write_bytes(uri, owner.encode())
    try:
        yield lambda word: storage.write_bytes(uri, f"{owner}\n{word}".encode())
    finally:
        if not isinstance(sys.exception(), DeviceError):
            with contextlib.suppress(UnetppError):
                storage.delete(uri)


def words(hints_uri: str) -> list[str]:
    """What workers that ended themselves left word of."""
    notes = [found.key for found in storage.list_objects(hints_uri, missing_ok=True) if found.key.startswith("shard-")]
    found = []
    for note in notes:
        with contextlib.suppress(FileNotFoundError):  # its shard ended meanwhile
            _, _, word = storage.read_bytes(storage.join(hints_uri, note)).decode(errors="replace").partition("\n")
            found.append(word)
    return [word for word in found if word]


def stop(hints_uri: str, call: str) -> None:
    """Tell the workers of a call to begin nothing more."""
    storage.write_bytes(storage.join(hints_uri, f"stop.{call}"), b"")
