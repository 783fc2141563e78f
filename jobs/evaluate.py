"""Measure quality and cost of every level of a model: `unetpp evaluate --model DIR --data DIR --split test`.

One pass over the images serves all levels and accurate mode; `--flips` takes three more. The level choice
(`prune --tolerance`) uses the same pass.
"""

import csv
import io
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from jobs import storage
from jobs.contract import ACCURATE, ACCURATE_FLIPS, METRICS, EvaluateConfig, EvaluateResult, LevelReport, Score
from jobs.dataset import load, open_labelled_set
from jobs.frontier import frontier_png
from jobs.labelled import Sample, group_column
from jobs.models import fetch_model
from jobs.provenance import data_name
from unetpp import packaged
from unetpp.allocator import keep_freed_memory
from unetpp.checkpoint import (
    GroupScore,
    LevelScore,
    arrays_of,
    digest,
    from_pretrained,
    read_pretrained,
    save_pretrained,
)
from unetpp.devices import cpu_flags, has_gpu
from unetpp.engine_names import EngineName, auto_engines
from unetpp.engines import MIRRORS, Engine, Mode
from unetpp.errors import ConfigError
from unetpp.measuring import masks_by_level, where_fastest
from unetpp.metrics import Counts, bootstrap_interval, confusion_counts, dice, iou
from unetpp.model import UNetPlusPlus, count_parameters
from unetpp.predictor import load_engine, refuse_single_head
from unetpp.prune import prune
from unetpp.weights import kmacs_per_pixel

logger = logging.getLogger(__name__)

COST_TILE_PX = 512
COST_ROUNDS = 5
CHUNK_IMAGES = 64


def run(config: EvaluateConfig) -> EvaluateResult:
    """Evaluate; write metrics.json, levels.csv, frontier.png to `output` and, if asked, the scores into the model.

    ConfigError for flips of a model with one head, and for the card of a packaged model.
    """
    if config.update_card and packaged.name_of(config.model) is not None:
        raise ConfigError(
            f"{config.model} comes with the package, which is not written to; update a copy of its folder"
        )
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    model = from_pretrained(fetch_model(config.model))
    if config.flips:
        refuse_single_head(model.config)
    labelled = open_labelled_set(config.data, config.split_column)
    samples = labelled.split(config.split)
    column = group_column(samples, config.group_by)
    logger.info("evaluating %d images of %s", len(samples), config.data)
    counts = measure_quality(model, samples, config.tile_px, flips=config.flips)
    on_gpu = has_gpu()
    engine = auto_engines(on_gpu=on_gpu, cpu_flags=cpu_flags())[0]
    seconds = measure_seconds(model, list(counts), engine, "cuda" if on_gpu else "cpu", config.threads)
    result = EvaluateResult(
        model_uri=config.model,
        digest=digest(model),
        data=config.data,
        data_fingerprint=labelled.fingerprint,
        split=config.split,
        seed=config.seed,
        tile_px=config.tile_px,
        engine=engine,
        reports=tuple(
            LevelReport(
                name=name,
                score=_score(counts[name], config),
                groups=_group_scores(counts[name], samples, column, config) if column else {},
                num_parameters=count_parameters(output_network(model, name)),
                gmacs_per_megapixel=gmacs_per_megapixel(model, name),
                seconds_per_megapixel=seconds[name],
            )
            for name in counts
        ),
        image_ids=tuple(sample.id for sample in samples),
        image_iou={name: tuple(iou(image) for image in counts[name]) for name in counts},
    )
    if config.output:
        _write_outputs(config.output, result)
    if config.update_card:
        _update_card(config.model, model, result)
    return result


def measure_quality(
    model: UNetPlusPlus, samples: Sequence[Sample], tile_px: int, *, flips: bool = False
) -> dict[str, list[Counts]]:
    """Confusion counts of every image in order, by output name: see `unetpp.measuring.masks_by_level`."""
    counts: dict[str, list[Counts]] = {}
    measured = where_fastest(model)
    for start in range(0, len(samples), CHUNK_IMAGES):
        for image in load(samples[start : start + CHUNK_IMAGES], model.config):
            masks = masks_by_level(measured, image.image_HWC, tile_px=tile_px, flips=flips)
            for name, mask_HW in masks.items():
                counts.setdefault(name, []).append(confusion_counts(mask_HW, image.target_HW, model.config.num_classes))
    return counts


def output_network(model: UNetPlusPlus, name: str) -> UNetPlusPlus:
    """What has to be computed for an output: the pruned network of `L<n>`, everything for accurate mode."""
    return model if name in (ACCURATE, ACCURATE_FLIPS) else prune(model, int(name.removeprefix("L")))


def gmacs_per_megapixel(model: UNetPlusPlus, name: str) -> float:
    """Billions of multiply-adds for 10**6 pixels of one output, halos and padding not counted."""
    num_passes = len(MIRRORS) if name == ACCURATE_FLIPS else 1
    return num_passes * kmacs_per_pixel(output_network(model, name).config)


def measure_seconds(
    model: UNetPlusPlus, names: Sequence[str], engine: EngineName, device: str, threads: int | None
) -> dict[str, float]:
    """Median seconds for a megapixel (10**6) of the named outputs with an engine here, interleaved."""

    def engine_of(name: str) -> Engine:
        network = output_network(model, name)
        mode: Mode = "accurate" if name in (ACCURATE, ACCURATE_FLIPS) else "fast"
        flips = name == ACCURATE_FLIPS
        return load_engine(engine, network.config, arrays_of(network), mode, device, threads=threads, flips=flips)

    engines = {name: engine_of(name) for name in names}
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (1, COST_TILE_PX, COST_TILE_PX, model.config.in_channels), np.uint8)
    whole = (slice(None), slice(None))
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(1 + COST_ROUNDS):  # the first round warms up
        for name, compute in engines.items():
            started = time.perf_counter()
            compute(tile, whole)
            seconds[name].append((time.perf_counter() - started) / (tile[..., 0].size / 1e6))
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def _score(counts: Sequence[Counts], config: EvaluateConfig) -> Score:
    ious, dices = [iou(image) for image in counts], [dice(image) for image in counts]
    options = {"num_bootstrap": config.num_bootstrap, "seed": config.seed}
    return Score(
        num_images=len(counts),
        mean_iou=float(np.mean(ious)),
        mean_iou_interval=bootstrap_interval(ious, **options),
        mean_dice=float(np.mean(dices)),
        mean_dice_interval=bootstrap_interval(dices, **options),
        pooled_iou=iou(np.sum(counts, axis=0)),
    )


def _group_scores(
    counts: Sequence[Counts], samples: Sequence[Sample], column: str, config: EvaluateConfig
) -> dict[str, Score]:
    by_group: dict[str, list[Counts]] = {}
    for image, sample in zip(counts, samples, strict=True):
        by_group.setdefault(sample.group(column), []).append(image)
    return {group: _score(by_group[group], config) for group in sorted(by_group)}


def _write_outputs(output: str, result: EvaluateResult) -> None:
    storage.write_bytes(storage.join(output, METRICS), result.model_dump_json(indent=2).encode())
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    quality_columns = ["mean_iou", "iou_low", "iou_high", "mean_dice", "pooled_iou"]
    cost_columns = ["parameters", "gmacs_per_megapixel", "seconds_per_megapixel"]
    writer.writerow(["output", "group", "images", *quality_columns, *cost_columns])
    for report in result.reports:
        cost = [report.num_parameters, report.gmacs_per_megapixel, report.seconds_per_megapixel]
        for group, score in {"": report.score, **report.groups}.items():
            quality = [score.mean_iou, *score.mean_iou_interval, score.mean_dice, score.pooled_iou]
            writer.writerow([report.name, group, score.num_images, *quality, *cost])
    storage.write_bytes(storage.join(output, "levels.csv"), table.getvalue().encode())
    storage.write_bytes(storage.join(output, "frontier.png"), frontier_png(result.reports))


def level_scores(result: EvaluateResult) -> dict[str, LevelScore]:
    """The scores of an evaluation as a model folder keeps them."""
    return {
        report.name: LevelScore(
            split=result.split,
            num_images=report.score.num_images,
            mean_iou=report.score.mean_iou,
            mean_iou_interval=report.score.mean_iou_interval,
            num_parameters=report.num_parameters,
            gmacs_per_megapixel=report.gmacs_per_megapixel,
            seconds_per_megapixel=report.seconds_per_megapixel,
            groups={
                group: GroupScore(
                    num_images=score.num_images, mean_iou=score.mean_iou, mean_iou_interval=score.mean_iou_interval
                )
                for group, score in report.groups.items()
            },
            data=data_name(result.data),
            data_fingerprint=result.data_fingerprint,
        )
        for report in result.reports
    }


def _update_card(model_uri: str, model: UNetPlusPlus, result: EvaluateResult) -> None:
    pretrained = read_pretrained(fetch_model(model_uri)).model_copy(update={"scores": level_scores(result)})
    with tempfile.TemporaryDirectory() as model_dir:
        save_pretrained(model, Path(model_dir), pretrained)
        storage.upload_folder(model_dir, model_uri, last="config.json")


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("evaluate")
