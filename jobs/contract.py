"""The config and the result of every job: the one door that the command line, the flows and Ray all use.

Pydantic only: importing this loads neither torch nor Ray.
"""

import hashlib
import json
from datetime import datetime
from enum import IntEnum
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from unetpp.card import MIN_GUARDED_IMAGES, UNSTATED, Int8Output, LevelChoice
from unetpp.config import BANDS, AugmentConfig, Bands, Frozen, Level, ModelConfig, Pages, SynthKind, ValueRange
from unetpp.engine_names import PRECISION, EngineChoice, EngineName
from unetpp.errors import ImageErrorCode


class ExitCode(IntEnum):
    """How a job ended, for shells and schedulers.

    `inspect` ends with DONE_WITH_FAILED_IMAGES for warnings, and with CONFIG for a set that cannot be trained on;
    `quantise` ends with CONFIG where int8 loses too much.
    """

    DONE = 0
    OTHER = 1
    DONE_WITH_FAILED_IMAGES = 3
    INTERRUPTED = 4
    BREAKER = 5
    CONFIG = 10
    MODEL = 11
    STORAGE = 20


def fingerprint(content: BaseModel | dict[str, object]) -> str:
    """SHA-256 (hex) of the canonical JSON: equal content gives an equal fingerprint, whatever the key order."""
    plain = content.model_dump(mode="json") if isinstance(content, BaseModel) else content
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ train

Cache = Literal["auto", "memory", "disk"]
StreamOrCache = Literal["auto", "memory", "disk", "stream"]

LABELLED_DATA = (
    "labelled data set: folder or s3:// prefix with images/ and masks/ or annotations.json, or of .parquet files"
)
MODEL = "model folder, s3:// prefix of one, or the name of a packaged one, as nuclei"
SPLIT_COLUMN = "column that names the split of an image: of splits.csv, of Parquet, or a key of COCO images"


Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""NumPy takes no negative seed, torch none of more than 64 bits."""

WorkerBounds = Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class TrainOptions(Frozen):
    """How to train, wherever the data is: the part of `TrainConfig` that a flow's config holds."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")] = Field(
        "unetpp", description="the run's name; the config's fingerprint is added to it"
    )
    model: ModelConfig = ModelConfig()
    split_column: str = Field("split", description=SPLIT_COLUMN)
    train_split: str = Field("train", description="split to train on")
    val_split: str = Field("val", description="split to validate on after every epoch")
    crop_px: Annotated[int, Field(ge=16, multiple_of=16)] = Field(96, description="side of a training crop")
    batch_size: Annotated[int, Field(ge=1)] = Field(16, description="crops a step, over all workers, however many")
    micro_batch: Annotated[int, Field(ge=1)] | None = Field(
        None, description="crops a worker computes at once, where its share does not fit into memory; default: all"
    )
    epochs: Annotated[int, Field(ge=1)] = Field(20, description="validations, and checkpoints, of the whole run")
    steps_per_epoch: Annotated[int, Field(ge=1)] | None = Field(
        None, description="optimiser steps between two validations; default: every training image once"
    )
    max_time: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[smh]$")] | None = Field(
        None, description="time for training, such as 6h or 90m: the learning rate falls in time, and the run ends"
    )
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="end after so many epochs without a better validation; default: never"
    )
    init: str | None = Field(
        None, description=f"{MODEL}, to start from: its nodes and heads are taken by name (fine-tuning)"
    )
    optimiser: Literal["adamw", "sgd"] = Field("adamw", description="sgd has momentum 0.9")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="largest step size of the optimiser")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(100, description="steps over which the learning rate rises")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-4, description="pull of the weights towards zero")
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="longer gradients are cut to this length; default: never"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.998, description="moving average of the weights; 0: off")
    freeze_norm: bool = Field(False, description="keep BatchNorm's statistics as they are, with init")
    head_weights: dict[Level, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="weight of each level's loss; default: equal"
    )
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="weight of each class's pixels in the cross-entropy, background first; default: equal"
    )
    distillation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of a shallower head's loss that is measured against the teacher's probabilities"
    )
    teacher: Literal["deepest", "mean"] = Field("deepest", description="whose probabilities: one head's, or the mean")
    balance_by: str | None = Field(None, description="column of the set whose groups are sampled by group_weights")
    group_weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="share of crops a group of balance_by; default: equal"
    )
    balance_within: str | None = Field(
        None,
        description="column of the set, such as the field of view, whose groups are equally likely within those of "
        "balance_by",
    )
    foreground: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of crops around a random foreground pixel; the others lie anywhere in their image"
    )
    augment: AugmentConfig = AugmentConfig()
    seed: Seed = Field(0, description="of the first weights, the crops and their augmentation")
    num_workers: WorkerBounds = Field(
        1, description="processes that share every batch; [1, 8]: as many as there is room for, and one is enough"
    )
    threads_per_worker: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="CPU threads a worker, on a GPU processes that make its crops; default: its share of a node's CPUs",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU where there is one")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the convolutions, by autocast; auto: bfloat16 on a GPU, else float32"
    )
    compile: bool = Field(False, description="torch.compile the network: a minute or more at the start, then faster")
    recompute: bool = Field(False, description="keep less for the backward pass: less memory, a third more time")
    cache: StreamOrCache = Field(
        "auto",
        description="where decoded images are: auto is memory up to a quarter of a node's, else a file there; stream: "
        "nowhere, Ray Data reads them again in every epoch, for sets larger than a node",
    )
    keep_checkpoints: Annotated[int, Field(ge=1)] = Field(
        2, description="checkpoints kept: the last one, and the best of the others"
    )
    licence: str = Field(UNSTATED, description="of the weights, for the model's card: a name such as Apache-2.0")
    data_licence: str = Field(UNSTATED, description="of the labelled set, for the model's card")
    intended_use: str = Field(UNSTATED, description="what the model is for, and what not, for its card")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        fewest, most = self.worker_bounds
        if fewest > most:
            raise ValueError(f"num_workers [{fewest}, {most}]: the first must be at most the second")
        if self.batch_size < most:
            raise ValueError(f"batch_size {self.batch_size} must be at least num_workers {most}: one crop a worker")
        if self.group_weights is not None and self.balance_by is None:
            raise ValueError("group_weights needs balance_by, the column that names the groups")
        if self.head_weights is not None and set(self.head_weights) != set(self.model.head_levels):
            raise ValueError(
                f"head_weights names levels {sorted(self.head_weights)}, "
                f"the model has heads {list(self.model.head_levels)}"
            )
        num_weights = max(2, self.model.num_classes)
        if self.class_weights is not None and (len(self.class_weights) != num_weights or not any(self.class_weights)):
            raise ValueError(f"class_weights must be {num_weights} values, not all 0, got {list(self.class_weights)}")
        if self.max_seconds == 0:
            raise ValueError(f"max_time {self.max_time} leaves no time to train: give more, or leave it out")
        if self.freeze_norm and self.init is None:
            raise ValueError("freeze_norm needs init, a model whose statistics are worth keeping")
        if self._computes_single_values():
            raise ValueError(
                f"a crop of {self.crop_px} px is 1 pixel at level {self.model.level}, and a worker may compute one "
                "crop alone: BatchNorm has nothing to normalise by; take a larger crop_px, batch_size or micro_batch, "
                "fewer num_workers, or model.norm none"
            )
        if self.distillation > 0 and len(self.model.head_levels) == 1:
            raise ValueError(
                f"distillation {self.distillation:g} teaches shallower heads, and the model's only head is at level "
                f"{self.model.level}; leave it out, or take deep_supervision and a deeper level"
            )
        if self.compile and self.recompute:
            raise ValueError(
                "compile and recompute cannot be together: torch.compile knows no recomputing; leave one out"
            )
        return self

    def _computes_single_values(self) -> bool:
        """Whether BatchNorm may be given a single value a channel, from which it makes no statistics."""
        model, (fewest, most) = self.model, self.worker_bounds
        deepest_px = -(-self.crop_px // model.pad_multiple) * model.pad_multiple // model.stride
        if deepest_px > 1 or model.norm == "none" or self.freeze_norm:
            return False
        batch, micro = self.batch_size, self.micro_batch or self.batch_size
        shares = {share for number in range(fewest, most + 1) for share in (batch // number, -(-batch // number))}
        return micro == 1 or any(share % micro == 1 for share in shares)

    @property
    def worker_bounds(self) -> tuple[int, int]:
        """The fewest workers that are enough, and the most that are used."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        if self.max_time is None:
            return None
        return float(self.max_time[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.max_time[-1]]


class TrainConfig(TrainOptions):
    """Train a UNet++ with deep supervision on a labelled data set."""

    data: str = Field(description=LABELLED_DATA)
    output: str = Field(description="folder or s3:// prefix for checkpoints and the trained model")
    result: str | None = Field(None, description="also write the result as JSON to this URI")

    def run_fingerprint(self) -> str:
        """What must be equal for a run to be resumed: everything that changes the weights."""
        changes_nothing = {
            "result",
            "output",
            "name",
            "num_workers",
            "threads_per_worker",
            "device",
            "recompute",
            "cache",
            "keep_checkpoints",
            "licence",
            "data_licence",
            "intended_use",
        }
        order = {"stream": True} if self.cache == "stream" else {}  # the same crops in another order
        return fingerprint(self.model_dump(mode="json", exclude=changes_nothing) | order)


class TrainResult(Frozen):
    """A finished training run."""

    run: str
    model_uri: str
    digest: str
    epochs: int
    steps: int
    best_epoch: int
    val_iou: dict[Level, float]
    seconds: float


# --------------------------------------------------------------------------------------------- evaluate


ACCURATE, ACCURATE_FLIPS = "accurate", "accurate+flips"
"""Names of accurate mode's outputs, beside L1 to L4."""


METRICS = "metrics.json"
"""What `evaluate` writes below its output, and `prune` may choose by."""


class EvaluateConfig(Frozen):
    """Measure quality and cost of every level of a model on a labelled data set."""

    model: str = Field(description=MODEL)
    data: str = Field(description=LABELLED_DATA)
    split_column: str = Field("split", description=SPLIT_COLUMN)
    split: str | None = Field(None, description="split to measure on; default: every image")
    output: str | None = Field(None, description="folder or URI for metrics.json, levels.csv and frontier.png")
    update_card: bool = Field(False, description="write the scores into the model's config.json and card")
    group_by: str | None = Field(None, description="column of the set to report by; default: modality if there")
    flips: bool = Field(
        False, description="also measure accurate mode over the four mirror images; four passes, not one"
    )
    num_bootstrap: Annotated[int, Field(ge=100)] = Field(2000, description="resamplings of the images, for intervals")
    seed: Seed = Field(0, description="of the bootstrap")
    tile_px: Annotated[int, Field(ge=16, multiple_of=16)] = Field(512, description="side of a tile's core")
    threads: Annotated[int, Field(ge=1)] | None = Field(None, description="CPU threads; default: all cores")
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class Score(Frozen):
    """Quality over a set of images; intervals are 95 % bootstrap intervals over images."""

    num_images: int
    mean_iou: float
    mean_iou_interval: tuple[float, float]
    mean_dice: float
    mean_dice_interval: tuple[float, float]
    pooled_iou: float


class LevelReport(Frozen):
    """One level (`L1`..`L4`), `accurate` or `accurate+flips`: quality, by group, and cost."""

    name: str
    score: Score
    groups: dict[str, Score]
    num_parameters: int
    gmacs_per_megapixel: float
    seconds_per_megapixel: float


class EvaluateResult(Frozen):
    """What `evaluate` writes to metrics.json."""

    model_uri: str
    digest: str
    data: str
    data_fingerprint: str = ""
    split: str | None
    seed: int
    tile_px: int
    engine: EngineName = Field(description="whose seconds the reports state")
    reports: tuple[LevelReport, ...]
    image_ids: tuple[str, ...]
    image_iou: dict[str, tuple[float, ...]] = Field(
        description="per-image IoU by report name, in the order of image_ids"
    )


# ------------------------------------------------------------------------------------------------ prune


class PruneConfig(Frozen):
    """Export the sub-network of one level, given or chosen on validation data."""

    model: str = Field(description=MODEL)
    out: str = Field(description="folder or URI for the pruned model")
    level: Level | None = Field(None, description="the level to keep")
    tolerance: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="keep the cheapest level that loses at most this much mean IoU against the best"
    )
    data: str | None = Field(None, description="labelled data set to choose on, with tolerance")
    split_column: str = Field("split", description=SPLIT_COLUMN)
    split: str | None = Field("val", description="split to choose on")
    metrics: str | None = Field(
        None, description="metrics.json of an evaluation of this model to choose by, instead of data"
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="one-sided confidence, over images, that the loss is within the tolerance"
    )
    num_bootstrap: Annotated[int, Field(ge=100)] = Field(2000, description="resamplings of the images, for intervals")
    seed: Seed = Field(0, description="of the bootstrap")
    threads: Annotated[int, Field(ge=1)] | None = Field(None, description="CPU threads; default: all cores")
    result: str | None = Field(None, description="also write the result as JSON to this URI")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.level is None) == (self.tolerance is None):
            raise ValueError("give either level, or tolerance with data")
        if self.tolerance is not None and (self.data is None) == (self.metrics is None):
            raise ValueError("tolerance needs data, a labelled set to choose the level on, or an evaluation's metrics")
        return self


class PruneResult(Frozen):
    """The exported model and, when a tolerance decided, why."""

    model_uri: str
    digest: str
    level: Level
    choices: tuple[LevelChoice, ...]


# --------------------------------------------------------------------------------------------- quantise


MAX_IOU_DROP = "mean IoU that int8 may lose against float32 over all images"


class QuantiseConfig(Frozen):
    """Make the int8 form of a model for CPUs, unless it loses too much IoU against float32: exit code 10."""

    model: str = Field(description=MODEL)
    data: str = Field(description=LABELLED_DATA)
    out: str | None = Field(
        None, description="folder or URI for a copy of the model with its int8 form; default: into the model's own"
    )
    level: Level | None = Field(None, description="this level alone; default: every head that the model has")
    split_column: str = Field("split", description=SPLIT_COLUMN)
    split: str | None = Field("val", description="split to measure on")
    calibration_split: str | None = Field("train", description="split to cut the crops from")
    group_by: str | None = Field(None, description="column of the set to judge by; default: modality if there")
    max_iou_drop: Annotated[float, Field(ge=0, lt=1)] = Field(0.002, description=MAX_IOU_DROP)
    max_group_drop: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.005, description=f"the same in every group of {MIN_GUARDED_IMAGES} images or more"
    )
    refusal_ok: bool = Field(False, description="exit 0 although int8 lost too much: the result says so")
    num_crops: Annotated[int, Field(ge=1)] = Field(200, description="crops that value ranges are measured on")
    crop_px: Annotated[int, Field(ge=16, multiple_of=16)] = Field(128, description="side of such a crop")
    seed: Seed = Field(0, description="of the crops")
    tile_px: Annotated[int, Field(ge=16, multiple_of=16)] = Field(512, description="side of a tile's core")
    threads: Annotated[int, Field(ge=1)] | None = Field(None, description="CPU threads; default: all cores")
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class QuantiseResult(Frozen):
    """The int8 form and what it costs, or why there is none."""

    model_uri: str
    digest: str = Field(description="of the model, whose weights are as they were")
    accepted: bool
    message: str = Field(description="why there is no int8 form, or which convolutions stay in float32")
    scores: dict[str, Int8Output] = Field(description="by output name, of what was measured last")
    exit_code: int


# ---------------------------------------------------------------------------------------------- predict

WALL_FACTOR = 5
"""Waiting for other processes is no work: the clock on the wall may run this much longer than the CPU's."""

WriteFormat = Literal["parquet", "png", "probability"]


MANY_INPUTS = (
    "folder or s3:// prefix of images, an archive (.tar, .tar.gz, .tar.zst, .zip, .parquet), or a manifest (.csv or "
    ".parquet with a column uri)"
)


class PredictOptions(Frozen):
    """How to predict, whatever the archive: the part of `PredictConfig` that a flow's config holds."""

    level: Level | None = Field(None, description="use this level's head; default: the model's deepest")
    mode: Literal["fast", "accurate"] = Field("fast", description="one head, or the mean probability of all heads")
    flips: bool = Field(False, description="accurate mode over the four mirror images, at four times its cost")
    write: tuple[WriteFormat, ...] = Field(
        ("parquet", "png"),
        description="parquet, the table; png, masks as files, too; probability, of the foreground, 8 bits, wherever "
        "masks go",
    )
    include: tuple[str, ...] = Field(
        ("*.png", "*.jpg", "*.jpeg", "*.tif", "*.tiff", "*.svs", "*.bmp", "*.webp"),
        description="globs on the key, case-insensitive; rows of Parquet files and of manifests are images whatever "
        "they are called",
    )
    exclude: tuple[str, ...] = Field((), description="globs on the key of what is left out, archives too")
    image_column: str | None = Field(
        None, description="of Parquet files, with image bytes; default: image, image_bytes, bytes or content"
    )
    name_column: str | None = Field(
        None,
        description="of Parquet files, with the images' names; default: key, id, name, file_name, filename or path",
    )
    max_members: Annotated[int, Field(ge=1)] = Field(
        1_000_000, description="members of an archive that are looked at; the rest becomes one too_large row"
    )
    max_member_mb: Annotated[int, Field(ge=1)] = Field(
        1024, description="size, MiB, of an archive's member; larger ones become too_large rows"
    )
    max_ratio: Annotated[float, Field(ge=1)] = Field(
        200.0, description="an archive above 256 MiB may unpack to so many times its size; the rest is too_large"
    )
    backend: Literal["ray", "inline"] = Field("ray", description="inline: this process alone, no Ray")
    topology: Literal["fused", "split"] = Field(
        "fused",
        description="on Ray, fused: an actor reads, predicts and writes its shards; split: for GPUs short of CPUs, "
        "others read and write, and images travel between them",
    )
    num_workers: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="actors, a fixed number; default: workers_per_gpu a GPU, or one a core, and on a cluster more as "
        "it grows",
    )
    workers_per_gpu: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None,
        description="actors that share a GPU and its memory; default: as many as the CPUs beside it carry, at most 4; "
        "in topology split 4",
    )
    node_labels: tuple[str, ...] = Field(
        (), description="name=value labels that a node of the cluster must have to be given work"
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPU threads of an engine; default: 1 with Ray, all cores inline"
    )
    shard_images: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="images a shard: the unit of commit; default: about 30 s of work by forecast, at most 1024"
    )
    tile_px: Annotated[int, Field(ge=16, multiple_of=16)] = Field(512, description="side of a tile's core")
    window_px: Annotated[int, Field(ge=0, multiple_of=16)] = Field(
        4096,
        description="larger images are cut into windows of this side, each with a row and a mask of its own; 0: never",
    )
    max_pixels: Annotated[int, Field(ge=1)] = Field(
        178_956_970,
        description="larger images become too_large rows, but for those that can be read window by window",
    )
    bands: Bands | None = Field(
        None, description="channels of the files to read, from 0, such as 3,2,1; default: those that the model names"
    )
    pages: Pages = Field("first", description="of a file with several pages or frames: its first, or a decode row")
    decode_seconds: Annotated[float, Field(gt=0)] = Field(
        60.0, description="CPU time that decoding one image may take; longer ones become timeout rows"
    )
    decode_memory_mb: Annotated[int, Field(ge=64)] = Field(
        4096, description="memory, MiB, that decoding one image may take; others become too_large rows"
    )
    max_failed_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="stop (exit 5) when more than this share of at least 500 images failed; 1: never"
    )
    lease_s: Annotated[float, Field(ge=0)] = Field(
        60.0, description="silence after which another driver of the same run takes over; 0: no lease, all work at once"
    )
    drain_s: Annotated[float, Field(ge=0)] = Field(
        30.0, description="time that shards in flight get to be committed after Ctrl-C or SIGTERM"
    )
    stall_s: Annotated[float, Field(ge=0)] = Field(
        1800.0, description="a worker in which nothing moves for so long is ended, and its shard tried again; 0: never"
    )
    single_writer: bool = Field(
        False, description="accept a store that cannot refuse overwrites; never start two runs on it at once"
    )
    engine: EngineChoice = Field(
        "auto",
        description="what computes the masks, see README.md; auto: the fastest here of the precision of "
        "the masks that the output has of this model, else the fastest",
    )

    @property
    def output_name(self) -> str | None:
        """What `evaluate` calls these masks: accurate, accurate+flips; None in fast mode, where their level does."""
        return None if self.mode == "fast" else ACCURATE_FLIPS if self.flips else ACCURATE

    @model_validator(mode="after")
    def _table_always(self) -> Self:
        if "parquet" not in self.write:
            raise ValueError("write must name parquet: the table is the record of what is done")
        if self.flips and self.mode != "accurate":
            raise ValueError(
                "flips average over mirror images in accurate mode: set mode to accurate, or leave them out"
            )
        if self.topology == "split" and self.backend != "ray":
            raise ValueError("topology split is Ray's: set backend to ray, or leave it out")
        if not self.include:
            raise ValueError("include must name at least one glob")
        if unlabelled := [label for label in self.node_labels if not all(label.partition("="))]:
            raise ValueError(f"node_labels are name=value, not {unlabelled[0]!r}")
        if 0 < self.stall_s <= (needed := WALL_FACTOR * self.decode_seconds):
            raise ValueError(f"stall_s {self.stall_s:g} must be above {needed:g}, {WALL_FACTOR} x decode_seconds")
        return self


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


OnNewModel = Literal["new_only", "backfill", "all"]
ON_NEW_MODEL = (
    "what is done of images that older models have masks of: new_only leaves them, backfill does backfill_images of "
    "them again, all does every one"
)
BACKFILL_IMAGES = "images of older models that one call, with on_new_model backfill, does again"


class PredictConfig(PredictOptions):
    """Segment every image of an archive; run it again to do what is new."""

    model: str = Field(description=MODEL)
    input: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = Field(
        min_length=1, description=f"{MANY_INPUTS}; may be given more than once"
    )
    output: str = Field(description="folder or s3:// prefix for the table, the PNGs and the run records")
    on_new_model: OnNewModel = Field("all", description=ON_NEW_MODEL)
    backfill_images: Annotated[int, Field(ge=1)] = Field(10_000, description=BACKFILL_IMAGES)
    partial_ok: bool = Field(False, description="exit 0 although some images failed")
    result: str | None = Field(None, description="also write the result as JSON to this URI, at every ending")

    def output_fingerprint(self) -> str:
        """What must be equal for two calls to do the same work: everything that changes the output."""
        changes_nothing = {
            "result",
            "partial_ok",
            "backend",
            "topology",
            "num_workers",
            "workers_per_gpu",
            "node_labels",
            "threads",
            "engine",  # but for its precision: masks of another are another model's
            "decode_seconds",
            "decode_memory_mb",
            "max_failed_share",
            "lease_s",
            "drain_s",
            "stall_s",
            "single_writer",
        }
        precision = {} if self.engine == "auto" else {"precision": PRECISION[self.engine]}
        return fingerprint(self.model_dump(mode="json", exclude=changes_nothing) | precision)


class PredictResult(Frozen):
    """What a `predict` call did, all its runs together. A window of a huge image counts as an image.

    `num_listed == num_predicted + num_failed + num_unchanged` always holds.
    """

    status: Literal["complete", "partial", "unchanged", "interrupted", "failed"]
    exit_code: int
    runs: tuple[str, ...]
    model_digest: str
    table_uri: str
    report_uri: str | None
    num_listed: int
    num_predicted: int
    num_failed: int
    num_unchanged: int
    failures: dict[str, int]
    megapixels: float
    seconds: float
    message: str = ""


# ------------------------------------------------------------------------------------- looking after runs

RunUri = Annotated[
    str, Field(description="folder or URI of the run: <output>/runs/<run id>", json_schema_extra={"positional": True})
]


class RetryConfig(Frozen):
    """Try the failed images of a run again, in a run of its own."""

    run: RunUri
    only: tuple[str, ...] = Field((), description="error codes to try again; default: every one")
    model: str | None = Field(None, description="where the run's model is now; default: where it was")
    backend: Literal["ray", "inline"] = Field("ray", description="inline: this process alone, no Ray")
    num_workers: Annotated[int, Field(ge=1)] | None = Field(None, description="actors; default: as predict has them")
    threads: Annotated[int, Field(ge=1)] | None = Field(None, description="CPU threads of an engine")
    max_pixels: Annotated[int, Field(ge=1)] | None = Field(None, description="another limit than the run had")
    pages: Pages | None = Field(None, description="another policy than the run had")
    partial_ok: bool = Field(False, description="exit 0 although some images failed")
    result: str | None = Field(None, description="also write the result as JSON to this URI, at every ending")

    @model_validator(mode="after")
    def _known_codes(self) -> Self:
        if unknown := sorted(set(self.only) - set(get_args(ImageErrorCode))):
            raise ValueError(
                f"only: no error code {', '.join(unknown)}; there are {', '.join(get_args(ImageErrorCode))}"
            )
        if "forgotten" in self.only:
            raise ValueError("only: what is forgotten stays so and is never tried again; name other error codes")
        return self


class StatusConfig(Frozen):
    """Say how far a run is, also while it works."""

    run: RunUri
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class StatusResult(Frozen):
    """How far a run is."""

    run: str
    state: Literal["open", "sealed", "abandoned", "compacted"]
    sources: tuple[str, ...]
    model_digest: str
    opened_at: datetime
    parent: str | None
    compacted_into: str | None = Field(None, description="the run that holds this one's rows; parts count what is left")
    num_shards: int
    num_shards_done: int
    num_images: int
    num_predicted: int
    num_failed: int
    num_unchanged: int
    failures: dict[str, int]
    last_commit_at: datetime | None
    images_per_second: float | None
    seconds_left: float | None


class ExplainConfig(Frozen):
    """Tell the story of one image in a run: listed, tried, what became of it, where its mask is."""

    run: RunUri
    key: str = Field(description="key of the image: its path below the input", json_schema_extra={"positional": True})
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class Attempt(Frozen):
    """One row of an image, or of a window of it, in the table."""

    run: str
    etag: str
    attempts: int
    outcome: str
    error: str | None
    height: int | None
    width: int | None
    window_y: int
    window_x: int
    num_windows: int
    level: Level
    class_pixels: tuple[int, ...] | None
    uncertainty: float | None
    mask_uri: str | None
    part_uri: str


class ExplainResult(Frozen):
    """What became of one image."""

    run: str
    key: str
    is_in_manifest: bool
    shard: int | None
    etag: str | None
    size_bytes: int | None
    is_committed: bool
    rows: tuple[Attempt, ...] = Field((), description="of this image and model, over all runs, newest first")


class RebuildConfig(Frozen):
    """Make a finished run's report.html, result.json and _SUCCESS.json anew from its parts."""

    run: RunUri
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class AbandonConfig(Frozen):
    """End an unfinished run that nothing is to finish: what it committed stays, what is left is a later run's."""

    run: RunUri
    result: str | None = Field(None, description="also write the run's status as JSON to this URI")


OutputUri = Annotated[
    str, Field(description="the output of the runs: folder or s3:// prefix", json_schema_extra={"positional": True})
]


class GcConfig(Frozen):
    """List what no reader of an output needs: PNGs without a row, parts that were copied, old notes, leftovers."""

    output: OutputUri
    delete: bool = Field(False, description="remove it")
    older_than_hours: Annotated[float, Field(ge=0)] = Field(
        24.0, description="leave what is newer, but PNGs without a row"
    )
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class GcResult(Frozen):
    """What is, or was, garbage."""

    output_uri: str
    objects: dict[str, int] = Field(description="number by kind: part, png, note, manifest, index, leftover")
    size_bytes: int
    deleted: bool


class CompactConfig(Frozen):
    """Copy the newest rows of finished runs from many small parts into few large ones; gc removes the small ones."""

    output: OutputUri
    part_mb: Annotated[int, Field(ge=1)] = Field(128, description="size of a part, MiB, that is aimed at")
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class Compaction(Frozen):
    """One run that copied others."""

    run: str
    model_digest: str
    sources: tuple[str, ...]
    compacted: tuple[str, ...] = Field(description="runs whose parts no reader needs any more")
    num_rows: int
    num_parts_before: int
    num_parts: int


class CompactResult(Frozen):
    """What was compacted; nothing where no part would be saved."""

    output_uri: str
    compactions: tuple[Compaction, ...]


class ForgetConfig(Frozen):
    """Remove every mask of an image from an output; its rows stay and say `forgotten`.

    No model segments this version of the image there again, whatever the level or mode. There is no way back but a new
    version of the image, which is a new image, or another output. An image is known by its input and its key: read
    below another prefix, or from a copy elsewhere, it is another image, to be forgotten there too.
    """

    output: OutputUri
    key: str = Field(description="key of the image: its path below the input", json_schema_extra={"positional": True})
    source: str | None = Field(
        None, description="the archive, as the table's source_uri says; default: every one that has the key"
    )
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class ForgetResult(Frozen):
    """What was forgotten."""

    key: str
    num_rows: int
    runs: tuple[str, ...]


class AssembleConfig(Frozen):
    """Put the masks of the windows of a huge image together into one tiled BigTIFF."""

    output: OutputUri
    key: str = Field(description="key of the image: its path below the input", json_schema_extra={"positional": True})
    out: str = Field(description="file or URI of the mask, a .tif")
    model: str | None = Field(
        None,
        description="digest, whole or its first ten digits, of the model whose masks are meant; default: the newest",
    )
    source: str | None = Field(
        None, description="the archive, as the table's source_uri says, if the key is in several"
    )
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class AssembleResult(Frozen):
    """The mask that was put together."""

    key: str
    out: str
    height: int
    width: int
    num_windows: int
    runs: tuple[str, ...]
    model_digest: str


class RollbackConfig(Frozen):
    """Make the model that was current before this one current again."""

    models: str = Field(
        description="where models live: <digest>/ and current-<number>.json",
        json_schema_extra={"positional": True},
    )
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class RollbackResult(Frozen):
    """Which model is current now."""

    number: int
    digest: str
    level: Level
    model_uri: str
    reason: str


# ---------------------------------------------------------------------------------------------- inspect


class InspectConfig(Frozen):
    """Look at a labelled data set before it is trained on: what does not fit, and what would make scores too good."""

    data: str = Field(description=LABELLED_DATA, json_schema_extra={"positional": True})
    output: str | None = Field(
        None, description="folder or URI for contact_sheet.png, images.csv (a line an image) and inspect.json"
    )
    split_column: str = Field("split", description=SPLIT_COLUMN)
    leave_out: tuple[str, ...] = Field(
        ("excluded",), description="splits that are neither trained nor measured on: not compared with the others"
    )
    group_by: str | None = Field(None, description="column to show values by; default: modality if there")
    num_classes: Annotated[int, Field(ge=1, le=255)] = Field(
        1, description="classes that the model will have; 1: every pixel of a mask that is not 0 is foreground"
    )
    ignore_index: Literal[255] | None = Field(None, description="value of masks that says a pixel is not labelled")
    value_range: ValueRange = ValueRange()
    bands: Bands | None = Field(None, description=BANDS)
    result: str | None = Field(None, description="also write the result as JSON to this URI")


Severity = Literal["error", "warning", "note"]


class Finding(Frozen):
    """One kind of thing that is wrong with a set, or odd."""

    code: str
    severity: Severity
    count: int = Field(
        description="how many images it concerns; of shared groups, how many groups; of neighbours, pairs"
    )
    ids: tuple[str, ...] = Field(description="the first of them; those that belong together with a plus between")
    what: str
    advice: str


class GroupValues(Frozen):
    """What the images of one group of one split hold. Values are the files'; None where nothing could be decoded."""

    split: str
    group: str
    num_images: int
    sizes: str
    pixel_types: str
    low: float | None
    high: float | None
    mean: float | None
    foreground: float | None = Field(description="share of the labelled pixels that are not background")


class InspectResult(Frozen):
    """What `inspect` found. Exit code 0: nothing but notes, 3: warnings, 10: errors, it cannot be trained on."""

    data: str
    form: str
    split_column: str
    fingerprint: str
    num_images: int
    groups: tuple[GroupValues, ...]
    findings: tuple[Finding, ...] = Field((), description="errors first")
    exit_code: int
    output: str | None


# ------------------------------------------------------------------------------------------------ synth


class SynthConfig(Frozen):
    """Write a seeded set of synthetic microscopy images with exact masks."""

    out: str = Field(description="folder for images/, masks/ and splits.csv")
    kind: SynthKind = Field(
        "nuclei",
        description="nuclei: RGB, foreground; cells: stained RGB, mask ids 1 cytoplasm and 2 nucleus; camera16: one "
        "channel of 16 bits, counts 0 to 4095 of a fluorescence camera, foreground",
    )
    num: Annotated[int, Field(ge=1, le=1_000_000)] = Field(64, description="number of images")
    size: Annotated[int, Field(ge=16, le=8192)] = Field(192, description="side of an image, pixels")
    seed: Seed = Field(0, description="of the whole set: equal seeds give equal bytes")
    result: str | None = Field(None, description="also write the result as JSON to this URI")


class SynthResult(Frozen):
    """Where the synthetic set is."""

    data_uri: str
    num_images: int
