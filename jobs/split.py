"""Shards on Ray in three stages: what reads, what predicts and what writes need not be on one machine.

```
read            ->  Engine      ->  write
a task, 1 CPU       an actor        a task, 1 CPU
       decoded images      masks
```
For GPUs that have few CPUs beside them: decoding is the work of others, and the images travel through Ray's object
store, a shard in one piece, whose memory OBJECT_STORE_BYTES bounds. Where an actor does everything
(`jobs.backends.ShardActor`) nothing travels.
"""

import pickle
from typing import Any

from jobs.answers import Row, answer, shard_of
from jobs.shard import Task
from jobs.sink import Footer
from jobs.worker import Worker
from unetpp.errors import UnetppError

OBJECT_STORE_BYTES = 512 << 20
"""Of images and masks that are on their way; Ray holds back what would be more."""


def answers(rows: Any, task: Task, engines: Any, per_engine: dict[str, Any], others: dict[str, Any]) -> Any:
    """Ray Data's dataset of answers of a dataset of shards. Between the stages a row is both, and has `data`: the work.

    `engines` is the pool of actors that predict, `per_engine` what each of them holds, `others` what a task is given.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=OBJECT_STORE_BYTES
    )
    actor: Any = Engine
    of_engine = (task, per_engine.get("num_gpus", 1.0))
    alone = {"num_cpus": 1, **others}
    read_rows = rows.map(read, fn_args=(task,), **alone)
    # Ray makes one stage of two that need the same: a byte of memory tells these apart.
    predicted = read_rows.map(actor, fn_constructor_args=of_engine, compute=engines, memory=1, **per_engine)
    return predicted.map(write, fn_args=(task,), **alone)


def read(row: Row, task: Task) -> Row:
    """Fetch and decode a shard's images."""
    try:
        found = _worker(task).read(shard_of(row))
    except UnetppError as error:
        return _answered(row, error)
    return _made(row, found) if isinstance(found, list) else _answered(row, found)


class Engine:
    """An actor that predicts."""

    def __init__(self, task: Task, gpu_share: float) -> None:
        self._worker = Worker(task, gpu_share=gpu_share)

    def __call__(self, row: Row) -> Row:
        """The masks of a shard's images."""
        if not row["data"]:
            return row
        try:
            return _made(row, self._worker.predict(shard_of(row), pickle.loads(row["data"])))
        except UnetppError as error:
            return _answered(row, error)


def write(row: Row, task: Task) -> Row:
    """Commit a shard."""
    if not row["data"]:
        return {"stop": row["stop"], "text": row["text"]}
    try:
        return answer(_worker(task).write(shard_of(row), pickle.loads(row["data"])))
    except UnetppError as error:
        return answer(error)


def _made(row: Row, data: Any) -> Row:
    return row | {"stop": "", "text": "", "data": pickle.dumps(data)}


def _answered(row: Row, made: Footer | UnetppError | None) -> Row:
    return row | answer(made) | {"data": b""}


_workers: dict[str, Worker] = {}


def _worker(task: Task) -> Worker:
    """This process's worker for a call: its threads and its decoder's process are there for the next shard."""
    if task.call not in _workers:
        for stale in _workers.values():
            stale.close()
        _workers.clear()
        _workers[task.call] = Worker(task)
    return _workers[task.call]
