"""One shard: read_shard -> predict_shard -> write_shard. The same three functions whatever runs them.

They are chained lazily: one batch of images is decoded at a time, and a stage drops what it consumed.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs import hints, manifest, sink, storage, windows
from jobs.archives import contents
from jobs.contract import WALL_FACTOR, ExitCode, PredictConfig
from jobs.guarded import PREDICT_SECONDS, DecodePool, GuardedPredictor
from jobs.manifest import ManifestRow, Shard
from jobs.models import fetch_model
from jobs.sink import Footer
from jobs.sources import columns_of, limits_of
from jobs.watchdog import Watch, watching
from unetpp.config import ModelConfig
from unetpp.errors import ImageError, ModelError, StorageError, UnetppError
from unetpp.images import decode_mask, encode_image, encode_mask
from unetpp.predictor import Image, Prediction, Predictor
from unetpp.tiles import Box

logger = logging.getLogger(__name__)

BATCH_PIXELS = 16_000_000
TELLING_S = 20.0
MAX_TRIES = 2
"""Workers that may die over a shard before its images are predicted behind a guard."""
MAX_TRIES_OF_CALL = 8
"""Workers of one call that may die over a shard; a node that goes takes several tries with it."""


@dataclass(frozen=True)
class Task:
    """What the shards of a run have in common: plain data, so that it travels to any worker."""

    run: str
    sources: tuple[str, ...]
    output_uri: str
    model_uri: str
    model_digest: str
    manifest_uri: str
    manifest_sha256: str
    config: PredictConfig
    threads: int | None
    """CPU threads of the engine; None: all cores."""
    hints_uri: str
    call: str
    """Names the driver's call, which may be told to stop."""

    def part_uri(self, shard: int) -> str:
        """Where a shard's part is committed."""
        return storage.join(sink.parts_uri(self.output_uri, self.model_digest, self.run), sink.part_name(shard))


class Item(NamedTuple):
    """One image of a shard as read: decoded, or why not."""

    row: ManifestRow
    image_HWC: Image | None
    error: ImageError | None
    seconds: float
    geo: str | None = None
    kept: Box | None = None
    """Of a window: where it lies in what was read, which is more."""


class Outcome(NamedTuple):
    """One image of a shard as predicted: its mask, or why not."""

    row: ManifestRow
    prediction: Prediction | None
    error: ImageError | None
    seconds: float
    geo: str | None = None


def read_shard(
    task: Task, shard: Shard, threads: ThreadPoolExecutor, decoders: DecodePool, model: ModelConfig
) -> Iterator[Item]:
    """Fetch the shard's images side by side and decode them in turn. StorageError where the world is bad.

    Of an image that is cut into windows, what `model` wants for each is read by itself.
    """
    rows, config = manifest.read_rows(task.manifest_uri, shard), task.config
    for row, content in contents(task.sources, rows, threads, limits_of(config), columns_of(config)):
        if isinstance(content, ImageError):
            yield Item(row, None, content, 0.0)
            continue
        started, part = time.perf_counter(), windows.reading(row, model)
        try:
            if isinstance(content, bytes):
                decoded = decoders.decode(content)
            else:
                assert part is not None
                decoded = decoders.decode_region(content, (row.height, row.width), part.outer)
        except ImageError as refused:
            yield Item(row, None, refused, time.perf_counter() - started)
            continue
        yield Item(row, decoded.image_HWC, None, time.perf_counter() - started, decoded.geo, part and part.kept)


def predict_shard(predictor: Predictor | GuardedPredictor, items: Iterable[Item]) -> Iterator[Outcome]:
    """Predict in batches as the engine likes them: on CPU one image at a time."""
    batch: list[Item] = []
    num_pixels = 0
    for item in items:
        batch.append(item)
        num_pixels += 0 if item.image_HWC is None else item.image_HWC.shape[0] * item.image_HWC.shape[1]
        if len(batch) >= predictor.batch_images or num_pixels >= BATCH_PIXELS:
            yield from _predict(predictor, batch)
            batch, num_pixels = [], 0
    yield from _predict(predictor, batch)


def _predict(predictor: Predictor | GuardedPredictor, batch: list[Item]) -> Iterator[Outcome]:
    images = [item.image_HWC for item in batch if item.image_HWC is not None]
    kept = [item.kept for item in batch if item.image_HWC is not None]
    started = time.perf_counter()
    failure: ImageError | None = None
    try:
        predictions = iter(predictor.predict(images, kept) if images else ())
    except Exception as error:  # the guard of a row: whatever one image does, the others go on
        if len(batch) > 1:
            for item in batch:
                yield from _predict(predictor, [item])
            return
        failure = error if isinstance(error, ImageError) else ImageError("crash", f"{type(error).__name__}: {error}")
    seconds = (time.perf_counter() - started) / max(1, len(images))
    for item in batch:
        if item.image_HWC is None or failure is not None:
            yield Outcome(item.row, None, item.error or failure, item.seconds, item.geo)
            continue
        prediction = next(predictions)
        if prediction.finite:
            yield Outcome(item.row, prediction, None, item.seconds + seconds, item.geo)
        else:
            numeric = ImageError("numeric", "the network gave NaN or infinity for this image")
            yield Outcome(item.row, None, numeric, item.seconds + seconds, item.geo)


def write_shard(
    task: Task, shard: Shard, predictor: Predictor, outcomes: Iterable[Outcome], threads: ThreadPoolExecutor
) -> Footer:
    """Put the shard's PNGs, then its part: the commit. Return the footer of the part that holds."""
    started = time.perf_counter()
    with_png = "png" in task.config.write

    def put_pngs(row: dict[str, Any], source: int) -> dict[str, Any]:
        return _put_pngs(task, row, source, predictor.num_classes) if with_png and row["error_code"] is None else row

    written = [threads.submit(put_pngs, _row(task, predictor, outcome), outcome.row.source) for outcome in outcomes]
    rows = [future.result() for future in written]
    return sink.commit(
        task.part_uri(shard.number),
        rows,
        run=task.run,
        manifest_sha256=task.manifest_sha256,
        shard=shard.number,
        seconds=time.perf_counter() - started,
        root=task.output_uri,
    )


def _row(task: Task, predictor: Predictor, outcome: Outcome) -> dict[str, Any]:
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
        "level": predictor.level,
        "model_digest": predictor.digest,
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
        "mask_png": encode_mask(mask_HW, predictor.num_classes),
        "probability_png": None if (found := prediction.probability_HW) is None else encode_image(found),
        "class_pixels": _class_pixels(mask_HW, predictor.num_classes),
        "uncertainty": prediction.uncertainty,
        "degraded": prediction.degraded,
        "seconds": seconds + time.perf_counter() - started,
    }


def _put_pngs(task: Task, row: dict[str, Any], source: int, num_classes: int) -> dict[str, Any]:
    """Put mask and probability as objects of their own.

    Where one is, its bytes go into the row: row and PNG always agree.
    """
    window = (row["window_y"], row["window_x"]) if row["num_windows"] > 1 else None
    folder = source if len(task.sources) > 1 else None
    uri = sink.png_uri(task.output_uri, task.model_digest, task.run, row["key"], window, folder)
    row = row | {"mask_uri": storage.plain(uri)}
    if (png := row["probability_png"]) is not None:
        row["probability_png"] = _put_png(sink.probability_uri(uri), png, task)
    there = _put_png(uri, row["mask_png"], task)
    if there == row["mask_png"]:
        return row
    try:
        mask_HW = decode_mask(there, num_classes)
    except ImageError as error:
        raise StorageError(f"{uri} is not the mask that a run put there ({error.detail}); remove it") from None
    return row | {"mask_png": there, "class_pixels": _class_pixels(mask_HW, num_classes)}


def _put_png(uri: str, content: bytes, task: Task) -> bytes:
    """Put an object, and return what is there."""
    return content if storage.put_if_absent(uri, content, root=task.output_uri) else storage.read_bytes(uri)


def _class_pixels(mask_HW: NDArray[np.uint8], num_classes: int) -> list[int]:
    return np.bincount(mask_HW.ravel(), minlength=max(2, num_classes)).tolist()


class Worker:
    """Takes shards, one after the other, through the three functions. Loads the model at the first."""

    def __init__(self, task: Task, predictor: Predictor | None = None) -> None:
        self.task = task
        self._threads = storage.io_threads()
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
        uri = self.task.part_uri(shard.number)
        if storage.exists(uri):
            with storage.arrow(uri) as (filesystem, path):
                footer = sink.read_footer(pq.read_metadata(path, filesystem=filesystem), uri)
            sink.refuse_abandoned(footer)
            return footer
        seen = hints.look(self.task.hints_uri, self.task.call, shard.number)
        if seen.is_stopped:
            return None
        if seen.num_tries_of_call >= MAX_TRIES_OF_CALL:
            raise UnetppError(
                f"shard {shard.number} of run {self.task.run} ended {seen.num_tries_of_call} workers, even image by "
                "image: look for lack of memory where they run; the same command goes on from here"
            )
        with (
            hints.in_flight(self.task.hints_uri, self.task.call, shard.number) as leave_word,
            watching(self.task.config.stall_s, lambda watch: self._give_up(shard, watch, leave_word)) as watch,
            self._predictor_after(seen.num_tries) as predictor,
        ):
            self.predictor.on_forward = watch.sign
            images = read_shard(self.task, shard, self._threads, self._decoders, self.predictor.config)
            items = watch.through("read", images)
            outcomes = watch.through("predict", predict_shard(predictor, items))
            return write_shard(self.task, shard, self.predictor, outcomes, self._threads)

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
        self._threads.shutdown(cancel_futures=True)
        if "_decoders" in self.__dict__:  # it was used
            self._decoders.close()


def load_predictor(model_uri: str, config: PredictConfig, threads: int | None) -> Predictor:
    """Fetch and load the model on the best device here. ModelError, ConfigError, StorageError as they come."""
    return Predictor.from_pretrained(
        fetch_model(model_uri),
        mode=config.mode,
        level=config.level,
        engine=config.engine,
        tile_px=config.tile_px,
        threads=threads,
        flips=config.flips,
        bands=config.bands,
        probability="probability" in config.write,
    )
