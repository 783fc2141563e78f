"""The rows of a shard's part, and the PNGs that they name."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs import puts, sink, storage
from jobs.puts import Put
from unetpp.errors import ImageError, StorageError
from unetpp.images import decode_mask, encode_image, encode_mask

if TYPE_CHECKING:
    from jobs.shard import Outcome, Task


BATCH_BYTES = 1 << 20
"""Of masks that are encoded, and written to a local disk, one after the other: cores that predict are seldom disturbed.
To object storage each goes by itself, since there a put is long."""


class Begun(NamedTuple):
    """A row, and the puts of its mask and its probability, if they are objects of their own."""

    row: dict[str, Any]
    puts: tuple[Put, ...] = ()


def begin(task: "Task", outcome: "Outcome") -> Begun:
    """Encode what was predicted, and begin to put it."""
    row = row_of(task, outcome)
    if "png" not in task.config.write or row["error_code"] is not None:
        return Begun(row)
    uri = sink.png_uri(task.output_uri, task.model_digest, task.run, row, outcome.row.source, len(task.sources))
    row["mask_uri"] = storage.plain(uri)
    begun = [puts.begin(uri, row["mask_png"], root=task.output_uri)]
    if (probability := row["probability_png"]) is not None:
        begun.append(puts.begin(sink.probability_uri(uri), probability, root=task.output_uri))
    return Begun(row, tuple(begun))


def written(task: "Task", outcomes: Iterable["Outcome"], threads: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """The rows of all outcomes, in order, when the PNGs that they name are durable."""
    futures: list[Future[list[Begun]]] = []
    num_seen = 0
    try:
        for some in _batches(outcomes, 0 if storage.is_remote(task.output_uri) else BATCH_BYTES):
            futures.append(threads.submit(_begin_all, task, some))
            while num_seen < len(futures) and futures[num_seen].done():
                futures[num_seen].result()  # a store that is out of order is known before all is predicted
                num_seen += 1
        found = list(chain.from_iterable(future.result() for future in futures))
        puts.end([put for each in found for put in each.puts])
    except BaseException:
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
        _drop([each for future in begun if future.exception() is None for each in future.result()])
        raise
    rows = [each.row for each in found]
    old = [number for number, each in enumerate(found) if not all(put.is_new for put in each.puts)]
    for number, row in zip(old, threads.map(lambda number: _as_stored(found[number], task), old), strict=True):
        rows[number] = row
    return rows


def _batches(outcomes: Iterable["Outcome"], num_bytes: int) -> Iterator[list["Outcome"]]:
    """Runs of outcomes whose masks together have about so many bytes, or one."""
    batch: list[Outcome] = []
    total = 0
    for outcome in outcomes:
        batch.append(outcome)
        total += 0 if outcome.prediction is None else outcome.prediction.mask_HW.nbytes
        if total >= num_bytes:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _begin_all(task: "Task", outcomes: list["Outcome"]) -> list[Begun]:
    found: list[Begun] = []
    try:
        for outcome in outcomes:
            found.append(begin(task, outcome))
    except BaseException:
        _drop(found)
        raise
    return found


def _drop(found: list[Begun]) -> None:
    puts.drop([put for each in found for put in each.puts])


def row_of(task: "Task", outcome: "Outcome") -> dict[str, Any]:
    """The table's row of one image, not yet with a mask_uri."""
    started = time.perf_counter()
    row, prediction, error, seconds, geo = outcome
    columns: dict[str, Any] = dict.fromkeys(sink.SCHEMA.names)
    columns |= {
        "key": row.key,
        "source_uri": storage.plain(task.sources[row.source]),
        "etag": row.etag,
        "window_y": row.window_y,
        "window_x": row.window_x,
        "num_windows": row.num_windows,
        "window_px": row.window_px,
        "level": task.network.level,
        "model_digest": task.model_digest,
        "attempts": row.attempts + 1,
        "geo": geo,
        "extra": row.extra,
        "schema_version": sink.SCHEMA_VERSION,
    }
    if row.num_windows > 1:
        columns |= {name: getattr(row, name) for name in ("window_h", "window_w", "height", "width")}
    if prediction is None:
        assert error is not None
        return columns | {"seconds": seconds, "error_code": error.code, "error": error.detail}
    mask_HW = prediction.mask_HW
    height, width = mask_HW.shape
    return columns | {
        "window_h": height,
        "window_w": width,
        "height": row.height or height,
        "width": row.width or width,
        "mask_png": encode_mask(mask_HW, task.network.num_classes),
        "probability_png": None if (found := prediction.probability_HW) is None else encode_image(found),
        "class_pixels": _class_pixels(mask_HW, task.network.num_classes),
        "uncertainty": prediction.uncertainty,
        "degraded": prediction.degraded,
        "seconds": seconds + time.perf_counter() - started,
    }


def _as_stored(begun: Begun, task: "Task") -> dict[str, Any]:
    """The row with the bytes that are stored, where a PNG was there before: row and PNG agree all the same."""
    row, stored = begun.row, [put.stored for put in begun.puts]
    row["probability_png"] = stored[1] if len(stored) > 1 else None
    if stored[0] == row["mask_png"]:
        return row
    num_classes = task.network.num_classes
    try:
        mask_HW = decode_mask(stored[0], num_classes)
    except ImageError as error:
        uri = begun.puts[0].uri
        raise StorageError(f"{uri} is not the mask that a run put there ({error.detail}); remove it") from None
    return row | {"mask_png": stored[0], "class_pixels": _class_pixels(mask_HW, num_classes)}


def _class_pixels(mask_HW: NDArray[np.uint8], num_classes: int) -> list[int]:
    """Pixels of every class id; counting them one by one is 20 times as fast as bincount while they are few."""
    if num_classes > 16:
        return np.bincount(mask_HW.ravel(), minlength=num_classes).tolist()
    found = [int(np.count_nonzero(mask_HW == number)) for number in range(1, max(2, num_classes))]
    return [mask_HW.size - sum(found), *found]
