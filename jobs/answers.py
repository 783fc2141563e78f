"""Shards and what became of them, as rows of Ray's datasets. Errors that stop a run are data: none loses its type."""

from typing import Any

from jobs.manifest import Shard
from jobs.sink import Footer
from unetpp.errors import AbandonedError, ConfigError, ModelError, StorageError, UnetppError

Row = dict[str, Any]
"""A shard: number, start, end. Or an answer: stop, which is the kind of an error, and text, which is the error's or a
footer's; neither where the call is to end."""

_STOPS: dict[str, type[UnetppError]] = {
    kind.__name__: kind for kind in (AbandonedError, ConfigError, ModelError, StorageError)
}


def row_of(shard: Shard) -> Row:
    """A shard as a row."""
    return {"number": shard.number, "start": shard.start, "end": shard.stop}


def shard_of(row: Row) -> Shard:
    """The shard that a row is of."""
    return Shard(int(row["number"]), int(row["start"]), int(row["end"]))


def answer(made: Footer | UnetppError | None) -> Row:
    """What became of a shard."""
    if isinstance(made, UnetppError):
        return {"stop": type(made).__name__, "text": str(made)}
    return {"stop": "", "text": "" if made is None else made.model_dump_json()}


def footer_of(row: Row) -> Footer | None:
    """What an answer says: the footer, None where there is none; or the error that stops the run is raised."""
    if row["stop"]:
        raise _STOPS.get(row["stop"], UnetppError)(row["text"])
    return Footer.model_validate_json(row["text"]) if row["text"] else None
