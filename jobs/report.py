"""A run as one HTML file that opens offline: counts, failures by cause, throughput, overlays to look at, the levels."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from itertools import accumulate
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from PIL import Image as Pillow

from jobs import archives, manifest, models, overlays, storage, table
from jobs.archives import Content
from jobs.contract import PredictResult
from jobs.guarded import DecodePool
from jobs.manifest import ManifestRow, Shard
from jobs.run_records import RunRecord
from jobs.runs import Archive
from jobs.sink import Footer
from jobs.sources import columns_of, limits_of
from jobs.table import Part
from unetpp.card import LevelScore, read_pretrained
from unetpp.config import Bands
from unetpp.errors import ImageError, UnetppError
from unetpp.images import decode_mask
from unetpp.predictor import Image
from unetpp.tiles import Box

logger = logging.getLogger(__name__)

NUM_RANDOM, NUM_UNSURE, NUM_KEYS = 9, 3, 200
SHOWN_PX = 512
WINDOW = ["window_y", "window_x", "window_h", "window_w", "num_windows"]
PLOT_WIDTH, PLOT_HEIGHT, PLOT_MARGIN = 560.0, 220.0, 44.0

MEANINGS = {
    "decode": "damaged, cut short, or no image format that is read; trying again cannot help",
    "too_large": "more pixels than max_pixels",
    "archive": "an archive member that cannot be read",
    "numeric": "the network gave NaN or infinity",
    "forgotten": "its mask was removed on request (unetpp forget)",
    "gone": "deleted between listing and reading; tried again by the next run",
    "changed": "replaced between listing and reading; tried again by the next run",
    "integrity": "arrived with a wrong checksum; tried again by the next run",
    "unreadable": "its store has it and does not give it; tried again by the next run",
    "crash": "predicting it failed; tried again by the next run",
    "timeout": "took too long; tried again by the next run",
}


class Overlay(NamedTuple):
    """One picture of the report."""

    key: str
    size: str
    foreground: float
    uncertainty: float
    image_uri: str
    outline_uri: str


class Failures(NamedTuple):
    """The failed images of one cause; at most NUM_KEYS of them by name."""

    code: str
    meaning: str
    num_images: int
    examples: list[tuple[str, str]]


class Point(NamedTuple):
    """A point of a plot, in the pixels of its SVG, with the text that it shows."""

    x: float
    y: float
    text: str
    low_y: float = 0.0
    high_y: float = 0.0
    is_chosen: bool = False


class Plot(NamedTuple):
    """Points and axis ticks (position, label) of a plot."""

    points: list[Point]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def write_report(
    archive: Archive, record: RunRecord, parts: Sequence[Part], footers: Sequence[Footer], result: PredictResult
) -> None:
    """Write `report.html` of a run whose parts are all committed."""
    storage.write_bytes(
        archive.run_uri(record.run, "report.html"),
        render(archive, record, parts, footers, result).encode(),
        root=archive.output_uri,
    )


def render(
    archive: Archive, record: RunRecord, parts: Sequence[Part], footers: Sequence[Footer], result: PredictResult
) -> str:
    """The report's HTML. The sample is drawn by the manifest's hash: the same run shows the same pictures."""
    rows = _Rows()
    for batch in table.scan(parts, _Rows.COLUMNS):
        rows.add(batch)
    is_predicted, uncertainty = np.concatenate(rows.is_predicted), np.concatenate(rows.uncertainty)
    rng = np.random.default_rng(int(record.manifest_sha256[:16], 16))
    predicted = np.flatnonzero(is_predicted)
    random = rng.choice(predicted, min(NUM_RANDOM, len(predicted)), replace=False)
    unsure = predicted[np.argsort(-uncertainty[predicted], kind="stable")][:NUM_UNSURE]
    pictures = _pictures(archive, record, sorted({*random.tolist(), *unsure.tolist()}))
    first = min(footer.committed_at - footer.seconds for footer in footers)
    last = max(footer.committed_at for footer in footers)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        resources.files("jobs").joinpath("report.html").read_text(encoding="utf-8")
    )
    return template.render(
        record=record,
        result=result,
        level=rows.level,
        mode=archive.config.output_name or "fast",
        model_uri=models.canonical(archive.config.model),
        output_uri=archive.output_uri,
        started=_clock(first),
        ended=_clock(last),
        images_per_second=len(is_predicted) / max(last - first, 1e-9),
        megapixels_per_second=result.megapixels / max(last - first, 1e-9),
        failures=rows.failures(),
        samples=_overlays(parts, footers, sorted(random.tolist()), pictures),
        unsure=_overlays(parts, footers, unsure.tolist(), pictures),
        throughput=_throughput(footers, first, last),
        levels=_levels(archive, archive.config.output_name or f"L{rows.level}"),
        plot_width=PLOT_WIDTH,
        plot_height=PLOT_HEIGHT,
        plot_margin=PLOT_MARGIN,
    )


class _Rows:
    """What the report needs of a run's rows, which may be millions: they pass a batch at a time."""

    COLUMNS = ("key", "error_code", "error", "uncertainty", "level", "height", "width", *WINDOW)

    def __init__(self) -> None:
        self.level = 0
        self.is_predicted: list[NDArray[np.bool_]] = []
        self.uncertainty: list[NDArray[np.float32]] = []
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[tuple[str, str]]] = {}

    def add(self, rows: pa.RecordBatch) -> None:
        """The next rows."""
        codes = rows["error_code"]
        self.is_predicted.append(codes.is_null().to_numpy(zero_copy_only=False))
        self.uncertainty.append(rows["uncertainty"].to_numpy(zero_copy_only=False))
        self.level = rows["level"][0].as_py()
        for found in codes.drop_null().value_counts().to_pylist():
            code = found["values"]
            self._counts[code] += found["counts"]
            examples = self._examples.setdefault(code, [])
            if (num_more := NUM_KEYS - len(examples)) > 0:
                failed = rows.filter(pa.compute.equal(codes, code)).slice(0, num_more)
                examples += [(_name(row), row["error"]) for row in failed.to_pylist()]

    def failures(self) -> list[Failures]:
        """The failed images by cause, the most frequent first."""
        return [
            Failures(code, MEANINGS.get(code, ""), number, self._examples[code])
            for code, number in self._counts.most_common()
        ]


def _overlays(
    parts: Sequence[Part], footers: Sequence[Footer], chosen: list[int], pictures: Mapping[int, Pillow.Image]
) -> list[Overlay]:
    """Overlays of the rows numbered `chosen` over all parts, less those that there is no picture of."""
    ends = list(accumulate(footer.num_predicted + footer.num_failed for footer in footers))
    shown = []
    for number in filter(pictures.__contains__, chosen):
        part = int(np.searchsorted(ends, number, side="right"))
        offset = number - (ends[part - 1] if part else 0)
        columns = ["key", "etag", "mask_png", "class_pixels", "uncertainty", "height", "width", *WINDOW]
        row = table.read_rows([parts[part]], columns).slice(offset, 1).to_pylist()[0]
        picture = pictures[number]
        num_counted = len(row["class_pixels"])
        mask_HW = decode_mask(row["mask_png"], 1 if num_counted == 2 else num_counted)
        if row["num_windows"] > 1:
            mask_HW = np.ascontiguousarray(mask_HW[_middle(*mask_HW.shape).slices])
        shown.append(
            Overlay(
                key=row["key"],
                size=_size(row),
                foreground=1 - row["class_pixels"][0] / sum(row["class_pixels"]),
                uncertainty=row["uncertainty"],
                image_uri=overlays.as_data_uri(picture),
                outline_uri=overlays.as_data_uri(overlays.outline(mask_HW, picture.size)),
            )
        )
    return shown


def _pictures(archive: Archive, record: RunRecord, chosen: list[int]) -> dict[int, Pillow.Image]:
    """The images of some rows, by number, or the middles of their windows, less those that are not to be had any more.

    In a sealed run all parts together have the manifest's rows, in its order.
    """
    uri, config = archive.run_uri(record.run, record.manifest), archive.config
    rows = [manifest.read_rows(uri, Shard(0, number, number + 1))[0] for number in chosen]
    pictures = {}
    try:
        with storage.io_threads() as threads, DecodePool.of(config, _bands(archive)) as decoders:
            found = archives.contents(record.sources, rows, threads, limits_of(config), columns_of(config))
            for number, (row, content) in zip(chosen, found, strict=True):
                try:
                    pictures[number] = overlays.thumbnail(_pixels(row, content, decoders))
                except ImageError as error:
                    logger.info("the report leaves %s out: %s", row.key, error.detail)
    except UnetppError as error:  # the archive is out of reach: no reason to leave a run whose parts are all there open
        logger.warning("the report of %s has %d of %d pictures: %s", record.run, len(pictures), len(chosen), error)
    return pictures


def _pixels(row: ManifestRow, content: Content, decoders: DecodePool) -> Image:
    if isinstance(content, ImageError):
        raise content
    if isinstance(content, bytes):
        return decoders.decode(content).image_HWC
    part = _middle(row.window_h, row.window_w)
    y, x = row.window_y + part.y0, row.window_x + part.x0
    box = Box(y, x, y + part.height, x + part.width)
    return decoders.decode_region(content, (row.height, row.width), box).image_HWC


def _middle(height: int, width: int) -> Box:
    """What is shown of a window: as much as a picture shows well, for few bytes."""
    shown_h, shown_w = min(height, SHOWN_PX), min(width, SHOWN_PX)
    y, x = (height - shown_h) // 2, (width - shown_w) // 2
    return Box(y, x, y + shown_h, x + shown_w)


def _bands(archive: Archive) -> Bands | None:
    """The channels that were read of every file; those of the model where its folder is still there."""
    if archive.config.bands is not None:
        return archive.config.bands
    try:
        return read_pretrained(models.fetch_model(archive.config.model)).model.bands
    except UnetppError:
        return None


def _name(row: dict[str, Any]) -> str:
    return row["key"] if row["num_windows"] == 1 else f"{row['key']}, {_size(row)}"


def _size(row: dict[str, Any]) -> str:
    size = f"{row['height']} x {row['width']}"
    if row["num_windows"] == 1:
        return size
    return f"window of {row['window_h']} x {row['window_w']} at y {row['window_y']}, x {row['window_x']} of {size}"


def _throughput(footers: Sequence[Footer], first: float, last: float) -> Plot:
    """Images done over time, a point a commit."""
    ordered = sorted(footers, key=lambda footer: footer.committed_at)
    num_images = sum(footer.num_predicted + footer.num_failed for footer in footers)
    points, done = [Point(_across(0.0), _up(0.0), "start")], 0
    for footer in ordered:
        done += footer.num_predicted + footer.num_failed
        elapsed = footer.committed_at - first
        x, y = _across(elapsed / max(last - first, 1e-9)), _up(done / max(num_images, 1))
        points.append(Point(x, y, f"shard {footer.shard}: {done} images after {_duration(elapsed)}"))
    x_ticks = [(_across(part / 4), _duration((last - first) * part / 4)) for part in range(5)]
    y_ticks = [(_up(part / 2), f"{num_images * part / 2:.0f}") for part in range(3)]
    return Plot(points, x_ticks, y_ticks)


def _levels(archive: Archive, chosen: str) -> tuple[Plot, dict[str, LevelScore]] | None:
    """Quality against cost of the levels that the model's card has scores of; None where it has none."""
    try:
        scores = read_pretrained(models.fetch_model(archive.config.model)).scores
    except UnetppError as error:
        logger.info("the report has no levels: %s", error)
        return None
    if not scores:
        return None
    costs = [score.seconds_per_megapixel for score in scores.values()]
    low = min(score.mean_iou_interval[0] for score in scores.values())
    high = max(score.mean_iou_interval[1] for score in scores.values())
    room = max(high - low, 1e-3) * 0.1
    low, high = low - room, high + room
    points = [
        Point(
            _across(score.seconds_per_megapixel / max(costs) * 0.86),
            _up((score.mean_iou - low) / (high - low)),
            name,
            _up((score.mean_iou_interval[0] - low) / (high - low)),
            _up((score.mean_iou_interval[1] - low) / (high - low)),
            name == chosen,
        )
        for name, score in scores.items()
    ]
    x_ticks = [(_across(part / 4 * 0.86), f"{max(costs) * part / 4:.2f}") for part in range(5)]
    y_ticks = [(_up(part / 3), f"{low + (high - low) * part / 3:.3f}") for part in range(4)]
    return Plot(points, x_ticks, y_ticks), dict(scores)


def _across(fraction: float) -> float:
    return round(PLOT_MARGIN + fraction * (PLOT_WIDTH - PLOT_MARGIN - 16), 1)


def _up(fraction: float) -> float:
    return round(PLOT_HEIGHT - 28 - fraction * (PLOT_HEIGHT - 28 - 12), 1)


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
