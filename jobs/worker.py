"""Takes shards through the functions of `jobs.shard`, which work side by side within a shard.

```
fetch, decode  ->  predict  ->  encode, put  ->  commit
a thread           the caller   threads          the caller
        at most 64 MiB
```
CPU threads: the engine has `Task.threads`, on Ray 1 unless told otherwise, and there are as many workers as fill the
CPUs with them. What else computes (the decoder's process, encoding, Parquet) has one thread each and little to do.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import Self

import pyarrow.parquet as pq

from jobs import forecast, hints, models, sink, storage
from jobs.ahead import Ahead
from jobs.contract import WALL_FACTOR, ExitCode
from jobs.guarded import PREDICT_SECONDS, DecodePool, GuardedPredictor
from jobs.manifest import Shard
from jobs.shard import Item, Outcome, Task, load_predictor, predict_shard, read_shard, write_shard
from jobs.sink import Footer
from jobs.watchdog import Watch, watching
from unetpp.allocator import return_large_arrays
from unetpp.errors import DeviceError, UnetppError
from unetpp.predictor import Predictor

logger = logging.getLogger(__name__)

AHEAD_BYTES = 64 << 20
TELLING_S = 20.0
MAX_TRIES = 2
"""Workers that may die over a shard before its images are predicted behind a guard."""
MAX_TRIES_OF_CALL = 8
"""Workers of one call that may die over a shard; a node that goes takes several tries with it."""


class Worker:
    """Takes shards, one after the other, through the three functions. Loads the model at the first."""

    def __init__(self, task: Task, predictor: Predictor | None = None, gpu_share: float = 1.0) -> None:
        """`gpu_share` of a GPU's memory is the model's, where it is loaded here."""
        return_large_arrays()
        self.task, self._gpu_share = task, gpu_share
        self._reading, self._writing = storage.io_threads(), storage.io_threads()
        if predictor is not None:
            self.predictor = predictor

    @cached_property
    def predictor(self) -> Predictor:
        """The task's model. ModelError where the folder holds another one by now."""
        task = self.task
        predictor = load_predictor(task.model_uri, task.config, task.threads, self._gpu_share)
        models.refuse_another(
            task.model_uri, predictor.digest, task.run, task.model_digest, "start again to open a new run"
        )
        return predictor

    @cached_property
    def _decoders(self) -> DecodePool:
        return DecodePool.of(self.task.config, self.task.network.bands)

    def __call__(self, shard: Shard) -> Footer | None:
        """Do one shard; nothing but a look where it is committed already. None where the call is to end.

        UnetppError where it ended too many workers.
        """
        if not isinstance(seen := self._look(shard), hints.Seen):
            return seen
        with self._begun(shard) as watch, self._predictor_after(seen.num_tries, watch) as predictor:
            self.predictor.on_forward = watch.sign
            images = read_shard(self.task, shard, self._reading, self._decoders, watch.sign)
            with Ahead(images, _num_bytes, AHEAD_BYTES, name="read") as ahead:
                items = watch.through("read", ahead)
                outcomes = watch.through("predict", predict_shard(predictor, items))
                return self.write(shard, outcomes)

    def read(self, shard: Shard) -> list[Item] | Footer | None:
        """The first part of a call alone: the images, or what a call returns where there is nothing to do."""
        if not isinstance(seen := self._look(shard), hints.Seen):
            return seen
        with self._begun(shard) as watch:
            images = read_shard(self.task, shard, self._reading, self._decoders, watch.sign)
            return list(watch.through("read", images))

    def predict(self, shard: Shard, items: list[Item]) -> list[Outcome]:
        """The second part of a call alone."""
        seen = hints.look(self.task.hints_uri, self.task.call, shard.number)
        self._refuse_deadly(shard, seen)
        with self._begun(shard) as watch, self._predictor_after(seen.num_tries, watch) as predictor:
            self.predictor.on_forward = watch.sign
            return list(watch.through("predict", predict_shard(predictor, items)))

    def write(self, shard: Shard, outcomes: Iterable[Outcome]) -> Footer:
        """The last part of a call."""
        return write_shard(self.task, shard, outcomes, self._writing)

    def _look(self, shard: Shard) -> Footer | hints.Seen | None:
        """What stands before a shard is begun: its footer if it is committed, None where the call is to end."""
        if storage.exists(uri := self.task.part_uri(shard.number)):
            return _footer_at(uri)
        seen = hints.look(self.task.hints_uri, self.task.call, shard.number)
        if seen.is_stopped:
            return None
        self._refuse_deadly(shard, seen)
        return seen

    def _refuse_deadly(self, shard: Shard, seen: hints.Seen) -> None:
        if seen.num_tries_of_call >= MAX_TRIES_OF_CALL:
            raise UnetppError(
                f"shard {shard.number} of run {self.task.run} ended {seen.num_tries_of_call} workers, even image by "
                "image: look for lack of memory where they run; the same command goes on from here"
            )

    @contextmanager
    def _begun(self, shard: Shard) -> Iterator[Watch]:
        """Inside the block the shard is noted as begun, and watched."""
        task = self.task
        with (
            hints.in_flight(task.hints_uri, task.call, shard.number) as leave_word,
            watching(task.config.stall_s, lambda watch: self._give_up(shard, watch, leave_word)) as watch,
        ):
            try:
                yield watch
            except DeviceError as error:
                if task.config.backend == "ray":  # which starts another process; inline there is none but this
                    self._end(f"shard {shard.number}: {error}", leave_word)
                raise

    def _give_up(self, shard: Shard, watch: Watch, leave_word: Callable[[str], None]) -> None:
        """End this process, which hangs: its shard is tried again, and in the end image by image behind a guard."""
        word = f"shard {shard.number}: nothing moved for {watch.still_s:.0f} s in stage {watch.stage}"
        word += f", after image {watch.key!r}" if watch.key else ""
        self._end(word, leave_word)

    def _end(self, word: str, leave_word: Callable[[str], None]) -> None:
        """End this process, with a word why: its shard is as unfinished as that of one that was killed."""
        logger.error("%s; its worker is ended", word)
        telling = threading.Thread(target=leave_word, args=(f"{word}; its worker was ended",), daemon=True)
        telling.start()
        telling.join(TELLING_S)  # it may be the store that hangs
        os._exit(ExitCode.INTERRUPTED)

    @contextmanager
    def _predictor_after(self, num_tries: int, watch: Watch) -> Iterator[Predictor | GuardedPredictor]:
        """The predictor for a shard that was begun and not ended `num_tries` times: in the end one that may die."""
        if num_tries < MAX_TRIES:
            yield self.predictor
            return
        config = self.task.config
        logger.warning("a shard ended its worker %d times: each image is predicted in a process of its own", num_tries)
        model_dir = models.fetch_model(self.task.model_uri)
        seconds = config.stall_s / (WALL_FACTOR + 1)  # and more for a large image
        with GuardedPredictor(
            model_dir,
            self.task.network.level,
            config.mode,
            config.tile_px,
            seconds or PREDICT_SECONDS,
            seconds_per_pixel=forecast.PATIENCE * forecast.seconds_of_a_thread(config, self.task.network, 1),
            waiting=watch.sign,
            engine=config.engine,
            flips=config.flips,
            probability="probability" in config.write,
        ) as predictor:
            yield predictor

    def close(self) -> None:
        """End its threads and its decoder's process."""
        for threads in (self._reading, self._writing):
            threads.shutdown(cancel_futures=True)
        if "_decoders" in self.__dict__:  # it was used
            self._decoders.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _footer_at(uri: str) -> Footer:
    """The footer of a committed part. AbandonedError where it says that its run was given up."""
    with storage.arrow(uri) as (filesystem, path):
        footer = sink.read_footer(pq.read_metadata(path, filesystem=filesystem), uri)
    sink.refuse_abandoned(footer)
    return footer


def _num_bytes(item: Item) -> int:
    return 0 if item.image_HWC is None else item.image_HWC.nbytes
