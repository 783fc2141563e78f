"""Takes shards through the functions of `jobs.shard`: side by side, and the next shard while the last is written.

```
            fetch, decode ->  | -> predict ->  | -> encode, put, commit
            a thread          | a thread       | the caller's thread
                     at most 64 MiB     at most 64 MiB
```
A worker has one engine, which one shard at a time has for itself: of two shards that are begun, the second is read
while the first is predicted, and predicted while the first is written.

CPU threads: the engine has `Task.threads`, on Ray 1 unless told otherwise, and there are as many workers as fill the
CPUs with them. What else computes (the decoder's process, encoding, Parquet) has one thread each and little to do.
"""

import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from functools import cached_property
from types import TracebackType
from typing import Self

import pyarrow.parquet as pq

from jobs import hints, sink, storage
from jobs.ahead import Ahead
from jobs.contract import WALL_FACTOR, ExitCode
from jobs.guarded import PREDICT_SECONDS, DecodePool, GuardedPredictor
from jobs.manifest import Shard
from jobs.models import fetch_model
from jobs.shard import Item, Outcome, Task, load_predictor, predict_shard, read_shard, write_shard
from jobs.sink import Footer
from jobs.watchdog import Watch, watching
from unetpp.errors import ModelError, UnetppError
from unetpp.predictor import Predictor

logger = logging.getLogger(__name__)

AHEAD_BYTES = 64 << 20
TURN_S = 0.5
TELLING_S = 20.0
MAX_TRIES = 2
"""Workers that may die over a shard before its images are predicted behind a guard."""
MAX_TRIES_OF_CALL = 8
"""Workers of one call that may die over a shard; a node that goes takes several tries with it."""


class Begun:
    """A shard that a worker has begun: it is read, and predicted when its turn comes. For one thread."""

    def __init__(self, finish: Callable[[], Footer | None], stack: ExitStack) -> None:
        self._finish, self._stack = finish, stack

    def finish(self) -> Footer | None:
        """Write the shard and commit it. None where the call is to end."""
        with self._stack:
            return self._finish()

    def close(self) -> None:
        """Give the shard up, if it is not finished."""
        self._stack.close()


class Worker:
    """Takes shards through the three functions, from any number of threads. Loads the model at the first."""

    def __init__(self, task: Task, predictor: Predictor | None = None) -> None:
        self.task = task
        self._reading, self._writing = storage.io_threads(), storage.io_threads()
        self._engine, self._loading = threading.Lock(), threading.Lock()
        if predictor is not None:
            self.predictor = predictor

    @cached_property
    def predictor(self) -> Predictor:
        """The task's model. ModelError where the folder holds another one by now."""
        predictor = load_predictor(self.task.model_uri, self.task.config, self.task.threads)
        if predictor.digest != self.task.model_digest:
            raise ModelError(
                f"{self.task.model_uri} holds model {predictor.digest[:10]}, but run {self.task.run} was opened with "
                f"{self.task.model_digest[:10]}: put that model back, or start again to open a new run"
            )
        return predictor

    @cached_property
    def _decoders(self) -> DecodePool:
        return DecodePool.of(self.task.config, self.predictor.config.bands)

    def __call__(self, shard: Shard) -> Footer | None:
        """Do one shard; nothing but a look where it is committed already. None where the call is to end.

        UnetppError where it ended too many workers.
        """
        return self.begin(shard).finish()

    def begin(self, shard: Shard) -> Begun:
        """Begin a shard, for whoever finishes or closes it; raises as a call does."""
        task, uri = self.task, self.task.part_uri(shard.number)
        if storage.exists(uri):
            footer = _footer_at(uri)
            return Begun(lambda: footer, ExitStack())
        seen = hints.look(task.hints_uri, task.call, shard.number)
        if seen.is_stopped:
            return Begun(lambda: None, ExitStack())
        if seen.num_tries_of_call >= MAX_TRIES_OF_CALL:
            raise UnetppError(
                f"shard {shard.number} of run {task.run} ended {seen.num_tries_of_call} workers, even image by "
                "image: look for lack of memory where they run; the same command goes on from here"
            )
        with ExitStack() as stack:
            leave_word = stack.enter_context(hints.in_flight(task.hints_uri, task.call, shard.number))
            watch = stack.enter_context(
                watching(task.config.stall_s, lambda watch: self._give_up(shard, watch, leave_word))
            )
            with self._loading:
                decoders, config = self._decoders, self.predictor.config
            predictor = stack.enter_context(self._predictor_after(seen.num_tries))
            images = read_shard(task, shard, self._reading, decoders, config)
            items = stack.enter_context(Ahead(images, _item_bytes, AHEAD_BYTES, name="read"))
            masks = self._predicted(predictor, items, watch)
            outcomes = stack.enter_context(Ahead(masks, _outcome_bytes, AHEAD_BYTES, name="predict"))
            stack.callback(items.stop)  # first of all: the thread that predicts may wait for it
            return Begun(lambda: write_shard(task, shard, self.predictor, outcomes, self._writing), stack.pop_all())
        raise AssertionError("not reached")

    def _predicted(
        self, predictor: Predictor | GuardedPredictor, items: Ahead[Item], watch: Watch
    ) -> Generator[Outcome]:
        """What becomes of a shard's images, when the engine is free for it."""
        while not self._engine.acquire(timeout=TURN_S):
            if items.is_stopped:
                raise CancelledError
            watch.sign()  # the shard that has the engine is watched, too
        try:
            self.predictor.on_forward = watch.sign
            yield from watch.through("predict", predict_shard(predictor, watch.through("read", items)))
        finally:
            self._engine.release()

    def _give_up(self, shard: Shard, watch: Watch, leave_word: Callable[[str], None]) -> None:
        """End this process, which hangs: its shard is tried again, and in the end image by image behind a guard."""
        word = f"shard {shard.number}: nothing moved for {watch.still_s:.0f} s in stage {watch.stage}"
        word += f", after image {watch.key!r}" if watch.key else ""
        logger.error("%s; its worker is ended", word)
        telling = threading.Thread(target=leave_word, args=(f"{word}; its worker was ended",), daemon=True)
        telling.start()
        telling.join(TELLING_S)  # it may be the store that hangs
        os._exit(ExitCode.INTERRUPTED)

    @contextmanager
    def _predictor_after(self, num_tries: int) -> Iterator[Predictor | GuardedPredictor]:
        """The predictor for a shard that was begun and not ended `num_tries` times: in the end one that may die."""
        if num_tries < MAX_TRIES:
            yield self.predictor
            return
        config = self.task.config
        logger.warning("a shard ended its worker %d times: each image is predicted in a process of its own", num_tries)
        model_dir = fetch_model(self.task.model_uri)
        seconds = config.stall_s / (WALL_FACTOR + 1)  # so that the guard gives up before the watchdog does
        with GuardedPredictor(
            model_dir,
            self.predictor.level,
            config.mode,
            config.tile_px,
            seconds or PREDICT_SECONDS,
            engine=config.engine,
            flips=config.flips,
            probability="probability" in config.write,
        ) as predictor:
            yield predictor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in (self._reading, self._writing):
            threads.shutdown(cancel_futures=True)
        if "_decoders" in self.__dict__:  # it was used
            self._decoders.close()


def _footer_at(uri: str) -> Footer:
    """The footer of a committed part. AbandonedError where it says that its run was given up."""
    with storage.arrow(uri) as (filesystem, path):
        footer = sink.read_footer(pq.read_metadata(path, filesystem=filesystem), uri)
    sink.refuse_abandoned(footer)
    return footer


def _item_bytes(item: Item) -> int:
    return 0 if item.image_HWC is None else item.image_HWC.nbytes


def _outcome_bytes(outcome: Outcome) -> int:
    if (found := outcome.prediction) is None:
        return 0
    return found.mask_HW.nbytes + (0 if found.probability_HW is None else found.probability_HW.nbytes)
