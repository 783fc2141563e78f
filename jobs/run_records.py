"""The runs of an output as they are written down: what each is, and how it stands.

```
<output>/runs/<run id>/  run.json  manifest-<uuid>.parquet  hints/
                         result.json  report.html  _SUCCESS.json | _ABANDONED.json  _COMPACTED.json
```
`run.json`, put if absent, opens a run; the parts in the table are its progress; all else can be rebuilt from these.
"""

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from jobs import storage
from unetpp.errors import ConfigError, StorageError

SUCCESS, ABANDONED, COMPACTED = "_SUCCESS.json", "_ABANDONED.json", "_COMPACTED.json"
HINTS, INDEXES = "hints", "indexes"
LAST_RUN = 99_999

State = Literal["open", "sealed", "abandoned", "compacted"]
"""Of a run. compacted: another run holds the newest of its rows, and its parts may be removed (`jobs.compact`)."""


class RunRecord(BaseModel):
    """run.json: what a run is. Written once."""

    model_config = ConfigDict(frozen=True)

    run: str
    fingerprint: str
    sources: tuple[str, ...]
    model_digest: str
    write: tuple[str, ...]
    manifest: str
    manifest_sha256: str
    num_shards: int
    num_images: int
    num_listed: int
    num_unchanged: int
    opened_at: datetime
    parent: str | None = None
    compacts: tuple[str, ...] = ()
    """Of a run of `unetpp compact`: the runs whose rows it copies."""
    config: dict[str, Any]


def output_at(uri: str) -> str:
    """The one spelling of an output that is to be looked after.

    ConfigError where nothing is there. An empty folder is fine: no run has come yet; a prefix without objects is none.
    """
    output = storage.canonical(uri)
    is_empty = next(storage.list_objects(output, missing_ok=True), None) is None
    if is_empty and (storage.is_remote(output) or not storage.exists(output)):
        raise ConfigError(f"there is nothing below {output}; wanted an output of unetpp predict: check the spelling")
    return output


def output_of(run_uri: str) -> str:
    """The output that a run's folder is below."""
    return run_uri.removesuffix("/").rpartition("/runs/")[0]


def next_run(found: Iterable[str]) -> str:
    """The name of the run after those that there are. ConfigError after r99999: names are ordered as text."""
    number = max((int(name[1:]) for name in found), default=0) + 1
    if number > LAST_RUN:
        raise ConfigError(
            f"the output has a run r{number - 1:05d}, and r{LAST_RUN} is the last that there can be: name another "
            "output, with a copy of this one's forgotten/ if it has one"
        )
    return f"r{number:05d}"


def state_of(run_uri: str) -> State:
    """How a run stands."""
    return _state([name for name in (COMPACTED, SUCCESS, ABANDONED) if storage.exists(storage.join(run_uri, name))])


def list_runs(output: str) -> dict[str, State]:
    """Every run of an output, and how it stands. A folder without run.json is no run."""
    files: dict[str, set[str]] = {}
    for found in storage.list_objects(storage.join(output, "runs"), missing_ok=True):
        run, _, name = found.key.partition("/")
        if run[:1] == "r" and run[1:].isdecimal():
            files.setdefault(run, set()).add(name)
    return {run: _state(names) for run, names in files.items() if "run.json" in names}


def _state(names: Collection[str]) -> State:
    if COMPACTED in names:
        return "compacted"
    if SUCCESS in names:
        return "sealed"
    return "abandoned" if ABANDONED in names else "open"


def holder_of(run_uri: str) -> str:
    """The run that holds the rows of a run now: itself, unless it was compacted. StorageError for a damaged marker."""
    if not storage.exists(storage.join(run_uri, COMPACTED)):
        return run_uri.rpartition("/")[2]
    return holder_of(storage.join(output_of(run_uri), "runs", _read_marker(run_uri)))


def _read_marker(run_uri: str) -> str:
    uri = storage.join(run_uri, COMPACTED)
    try:
        return str(storage.read_json(uri)["by"])
    except (FileNotFoundError, KeyError, TypeError):
        raise StorageError(f"{uri} is damaged; `unetpp compact` makes it anew when it is removed") from None


def read_record(run_uri: str) -> RunRecord:
    """run.json of a run's folder. ConfigError where there is none, StorageError where it is damaged."""
    uri = storage.join(run_uri, "run.json")
    try:
        return RunRecord.model_validate(storage.read_json(uri))
    except FileNotFoundError:
        raise ConfigError(f"there is no run at {run_uri}; wanted <output>/runs/<run id>") from None
    except ValueError as error:
        raise StorageError(f"{uri} is damaged or of another version: {error}") from None
