"""The checkpoints of a training run: complete or not there, and checked when they are read.

```
<run>/checkpoints/epoch_0007-<sha256, 16 digits>.pt
<run>/checkpoints/epoch_0007.json                      written last
```

An epoch without its JSON, or whose state is not what that says, is passed over: whoever resumes takes the newest
one that is whole. Two writers of one run, as there may be for a moment after a kill, never mix their files.
"""

import hashlib
import logging
from collections.abc import Iterator

from pydantic import ConfigDict, Field, ValidationError

from jobs import storage
from unetpp.config import Frozen

logger = logging.getLogger(__name__)

Environment = dict[str, str | int | None]


class _Record(Frozen):
    """Frozen whose numbers are read back as they were written: JSON's null for what is not finite is no number."""

    model_config = ConfigDict(ser_json_inf_nan="constants", allow_inf_nan=True)


class EpochMetrics(_Record):
    """How an epoch ended. `val_iou` is mean per-image IoU by output, `val_mean_iou` the mean of the heads'.

    `loss` is the mean of the steps that had a finite one; NaN where none had.
    """

    epoch: int
    step: int
    loss: float
    learning_rate: float
    val_iou: dict[str, float]
    val_mean_iou: float
    num_skipped: int = Field(0, description="steps whose gradient was not finite, so far")
    seconds: float = Field(description="so far, over all resumptions")


class Checkpoint(_Record):
    """epoch_0007.json: the state after an epoch, and every epoch up to it."""

    state: str
    sha256: str
    history: tuple[EpochMetrics, ...]
    environment: Environment = Field({}, description="code, versions and hardware that computed it")

    @property
    def metrics(self) -> EpochMetrics:
        """Of this epoch."""
        return self.history[-1]

    @property
    def epoch(self) -> int:
        """Counted from 0."""
        return self.metrics.epoch

    @property
    def name(self) -> str:
        """Of this record's file."""
        return f"epoch_{self.epoch:04d}.json"


def save(
    run_uri: str, state: bytes, history: tuple[EpochMetrics, ...], environment: Environment | None = None
) -> Checkpoint:
    """Write the state after the last epoch of `history`."""
    sha256 = hashlib.sha256(state).hexdigest()
    name = f"epoch_{history[-1].epoch:04d}-{sha256[:16]}.pt"
    checkpoint = Checkpoint(state=name, sha256=sha256, history=history, environment=environment or {})
    storage.write_bytes(_uri(run_uri, checkpoint.state), state)
    storage.write_bytes(_uri(run_uri, checkpoint.name), checkpoint.model_dump_json(indent=2).encode())
    return checkpoint


def complete(run_uri: str) -> list[Checkpoint]:
    """Return the checkpoints that say that they are complete, the newest first."""
    return sorted(_complete(run_uri), key=lambda each: each.epoch, reverse=True)


def _complete(run_uri: str) -> Iterator[Checkpoint]:
    for found in storage.list_objects(storage.join(run_uri, "checkpoints"), missing_ok=True):
        if not found.key.endswith(".json"):
            continue
        uri = _uri(run_uri, found.key)
        try:
            yield Checkpoint.model_validate_json(storage.read_bytes(uri))
        except (FileNotFoundError, ValidationError):
            logger.warning("%s is damaged: this checkpoint is passed over", uri)


def read_state(run_uri: str, checkpoint: Checkpoint) -> bytes | None:
    """Return the state of a checkpoint; None, and a warning, where it is gone or not what was written."""
    uri = _uri(run_uri, checkpoint.state)
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() == checkpoint.sha256:
        return content
    logger.warning("%s is gone or damaged: this checkpoint is passed over", uri)
    return None


def newest(run_uri: str) -> tuple[Checkpoint, bytes] | None:
    """Return the newest checkpoint that is whole, and its state; None where there is none."""
    for checkpoint in complete(run_uri):
        if (state := read_state(run_uri, checkpoint)) is not None:
            return checkpoint, state
    return None


def best(run_uri: str) -> tuple[Checkpoint, bytes] | None:
    """Return the checkpoint of the best validation that is whole, the earliest among equals, and its state."""
    for checkpoint in sorted(complete(run_uri), key=lambda each: (-each.metrics.val_mean_iou, each.epoch)):
        if (state := read_state(run_uri, checkpoint)) is not None:
            return checkpoint, state
    return None


def tidy(run_uri: str, keep: int) -> None:
    """Remove all but the last checkpoint and the `keep - 1` (at least 1) best of the others."""
    if not (there := complete(run_uri)):
        return
    last, *others = there
    others.sort(key=lambda each: (-each.metrics.val_mean_iou, each.epoch))
    wanted = {name for each in (last, *others[: max(1, keep - 1)]) for name in (each.state, each.name)}
    for found in list(storage.list_objects(storage.join(run_uri, "checkpoints"))):
        if found.key not in wanted:
            storage.delete(_uri(run_uri, found.key))


def remove(run_uri: str, step: int) -> None:
    """Remove the checkpoints of so many steps or more."""
    for checkpoint in complete(run_uri):
        if checkpoint.metrics.step >= step:
            for name in (checkpoint.name, checkpoint.state):  # a state without its record is passed over
                storage.delete(_uri(run_uri, name))


def _uri(run_uri: str, name: str) -> str:
    return storage.join(run_uri, "checkpoints", name)
