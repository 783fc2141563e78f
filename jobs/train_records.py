"""What a training run says of itself: sentences, a table of epochs, TensorBoard's events.

```
<run>/records/log.txt                         a sentence a line, after its time; made anew with every sentence
<run>/records/epochs.csv                      made anew after every epoch
<run>/records/tensorboard/events.out.tfevents.<epoch>.unetpp      one file an epoch
```
"""

import csv
import io
import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from jobs import storage
from jobs.checkpoints import EpochMetrics
from unetpp.errors import StorageError

logger = logging.getLogger(__name__)

PROGRESS_S = 30
LOOK_S = 1.0
LOOK_REMOTE_S = 5.0
"""So often the driver looks for new sentences; in object storage every look is a request."""


class RunLog:
    """The sentences of a run, the oldest first, over all calls that worked on it. One process writes."""

    def __init__(self, run_uri: str) -> None:
        self.uri = storage.join(run_uri, "records", "log.txt")
        self._lines: list[str] | None = None

    def lines(self) -> list[str]:
        """Those that are written, each `<time>  <sentence>`."""
        try:
            return storage.read_bytes(self.uri).decode().splitlines()
        except FileNotFoundError:
            return []

    def write(self, sentence: str) -> None:
        """Say something. A place that cannot be written ends no training here: the next sentence brings this along."""
        try:
            if self._lines is None:
                self._lines = self.lines()
            self._lines.append(f"{datetime.now(UTC).isoformat(timespec='seconds')}  {sentence}")
            storage.write_bytes(self.uri, "".join(f"{line}\n" for line in self._lines).encode())
        except StorageError as error:
            logger.warning("%s (%s)", sentence, error)


class Progress:
    """Sentences for the run's log: one an epoch, and one now and then between. Silent without a log."""

    def __init__(self, log: RunLog | None, num_epochs: int, steps_per_epoch: int) -> None:
        self.log = log
        self.num_epochs = num_epochs
        self.steps_per_epoch = steps_per_epoch
        self._told = time.monotonic()

    def step(self, epoch: int, step: int, loss: Tensor) -> None:
        """Say how far the epoch is, at most every PROGRESS_S seconds: reading `loss` waits for its device."""
        if self.log is not None and time.monotonic() - self._told > PROGRESS_S:
            self.tell(
                f"epoch {epoch + 1}/{self.num_epochs}  step {step}/{self.steps_per_epoch}  loss {float(loss):.4f}"
            )

    def epoch(self, metrics: EpochMetrics) -> None:
        """Say how the epoch ended."""
        levels = "  ".join(f"{name} {value:.4f}" for name, value in metrics.val_iou.items())
        skipped = f"  {metrics.num_skipped} steps skipped" if metrics.num_skipped else ""
        self.tell(
            f"epoch {metrics.epoch + 1}/{self.num_epochs}  loss {metrics.loss:.4f}  val IoU {levels}  "
            f"{metrics.seconds:.0f} s{skipped}"
        )

    def tell(self, sentence: str) -> None:
        """Say something else."""
        self._told = time.monotonic()
        if self.log is not None:
            self.log.write(sentence)


@contextmanager
def followed(run_uri: str) -> Iterator[None]:
    """Log what the run says in its own log while the block runs: its workers may be on other machines."""
    log, over = RunLog(run_uri), threading.Event()
    num_known = len(log.lines())

    def follow() -> None:
        nonlocal num_known
        while True:
            is_last = over.wait(LOOK_REMOTE_S if storage.is_remote(run_uri) else LOOK_S)
            try:
                new = log.lines()[num_known:]
            except StorageError as error:
                new = []
                logger.warning("%s", error)
            for line in new:
                logger.info("%s", line.partition("  ")[2])
            num_known += len(new)
            if is_last:
                return

    follower = threading.Thread(target=follow, name="training progress")
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


def write_records(
    run_uri: str, history: Sequence[EpochMetrics], losses: Sequence[float], rates: Sequence[float]
) -> None:
    """Write the table of all epochs, and the last one's events: its losses and learning rates step by step."""
    storage.write_bytes(storage.join(run_uri, "records", "epochs.csv"), epochs_csv(history))
    name = f"events.out.tfevents.{history[-1].epoch:010d}.unetpp"
    storage.write_bytes(storage.join(run_uri, "records", "tensorboard", name), _events(history[-1], losses, rates))


def epochs_csv(history: Sequence[EpochMetrics]) -> bytes:
    """A line an epoch: its number (from 1), steps so far, loss, learning rate, validation IoU by output, seconds."""
    outputs = list(history[0].val_iou)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["epoch", "step", "loss", "learning_rate", *outputs, "mean", "skipped", "seconds"])
    for each in history:
        quality = [each.val_iou[name] for name in outputs]
        row = [each.epoch + 1, each.step, each.loss, each.learning_rate, *quality]
        table.writerow([*row, each.val_mean_iou, each.num_skipped, round(each.seconds, 1)])
    return text.getvalue().encode()


def _events(metrics: EpochMetrics, losses: Sequence[float], rates: Sequence[float]) -> bytes:
    from tensorboardX import SummaryWriter

    first = metrics.step - len(losses)
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), start=first):
                writer.add_scalar("train/loss", loss, step)
                writer.add_scalar("train/learning_rate", rate, step)
            for name, value in metrics.val_iou.items():
                writer.add_scalar(f"val_iou/{name}", value, metrics.step)
        (events,) = Path(folder).iterdir()
        return events.read_bytes()
