"""One shard: read_shard -> predict_shard -> write_shard. The same three functions whatever runs them.

Each makes its results one after the other, as they are asked for, and drops what it consumed. `jobs.worker` runs them
side by side.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from jobs import manifest, rows, sink, storage, windows
from jobs.archives import contents
from jobs.contract import PredictConfig
from jobs.guarded import DecodePool, GuardedPredictor
from jobs.manifest import ManifestRow, Shard
from jobs.models import fetch_model
from jobs.sink import Footer
from jobs.sources import columns_of, limits_of
from unetpp.config import ModelConfig
from unetpp.errors import ImageError, UnetppError
from unetpp.predictor import Image, Prediction, Predictor
from unetpp.tiles import Box

BATCH_PIXELS = 16_000_000


@dataclass(frozen=True)
class Task:
    """What the shards of a run have in common: plain data, so that it travels to any worker."""

    run: str
    sources: tuple[str, ...]
    output_uri: str
    model_uri: str
    model_digest: str
    network: ModelConfig
    """As it is computed."""
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


def read_shard(task: Task, shard: Shard, threads: ThreadPoolExecutor, decoders: DecodePool) -> Generator[Item]:
    """Fetch the shard's images side by side and decode them in turn. StorageError where the world is bad.

    Of an image that is cut into windows, what the network wants for each is read by itself.
    """
    listed, config = manifest.read_rows(task.manifest_uri, shard), task.config
    for row, content in contents(task.sources, listed, threads, limits_of(config), columns_of(config)):
        if isinstance(content, ImageError):
            yield Item(row, None, content, 0.0)
            continue
        started, part = time.perf_counter(), windows.reading(row, task.network)
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
    """Predict in batches as the engine likes them, each begun before the one before it is read: a GPU never waits.

    On CPU a batch is one image.
    """
    in_flight: Iterator[Outcome] = iter(())
    for batch in _batches(predictor.batch_images, items):
        begun = _started(predictor, batch)
        yield from in_flight
        in_flight = begun
    yield from in_flight


def _batches(batch_images: int, items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    num_pixels = 0
    for item in items:
        batch.append(item)
        num_pixels += 0 if item.image_HWC is None else item.image_HWC.shape[0] * item.image_HWC.shape[1]
        if len(batch) >= batch_images or num_pixels >= BATCH_PIXELS:
            yield batch
            batch, num_pixels = [], 0
    yield batch


def _started(predictor: Predictor | GuardedPredictor, batch: list[Item]) -> Iterator[Outcome]:
    """Begin to predict a batch; what comes back waits for it."""
    images = [item.image_HWC for item in batch if item.image_HWC is not None]
    kept = [item.kept for item in batch if item.image_HWC is not None]
    started = time.perf_counter()
    wait = predictor.start(images, kept) if images else lambda: []
    return _read(predictor, batch, wait, time.perf_counter() - started)


def _read(
    predictor: Predictor | GuardedPredictor,
    batch: list[Item],
    wait: Callable[[], list[Prediction]],
    seconds: float,
) -> Iterator[Outcome]:
    """Outcomes of a batch whose begin took `seconds`."""
    started = time.perf_counter() - seconds
    failure: ImageError | None = None
    try:
        predictions = iter(wait())
    except Exception as error:  # the guard of a row: whatever one image does, the others go on
        if isinstance(error, UnetppError) and not isinstance(error, ImageError):
            raise  # no image did it
        if len(batch) > 1:
            for item in batch:
                yield from _started(predictor, [item])
            return
        failure = error if isinstance(error, ImageError) else ImageError("crash", f"{type(error).__name__}: {error}")
    seconds = (time.perf_counter() - started) / max(1, sum(item.image_HWC is not None for item in batch))
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


def write_shard(task: Task, shard: Shard, outcomes: Iterable[Outcome], threads: ThreadPoolExecutor) -> Footer:
    """Put the shard's PNGs, then its part: the commit. Return the footer of the part that holds.

    Masks are encoded, and PNGs on their way, in `threads` while outcomes come.
    """
    started = time.perf_counter()
    found = rows.written(task, outcomes, threads)
    assert len(found) == shard.num_images, (len(found), shard)
    return sink.commit(
        task.part_uri(shard.number),
        found,
        run=task.run,
        manifest_sha256=task.manifest_sha256,
        shard=shard.number,
        seconds=time.perf_counter() - started,
        root=task.output_uri,
    )


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
