"""A labelled data set -> training crops and validation images.

The set is a folder or prefix with `images/<id>.<ext>`, `masks/<id>.png` and, if there, `splits.csv` (id, split, and any
group columns such as modality). Without splits.csv, a fifth of the images, drawn by the hash of their ids, is `val`.
"""

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from jobs import storage
from jobs.contract import TrainConfig, fingerprint
from unetpp.augment import Foreground, augment, random_view
from unetpp.config import Frozen, ModelConfig
from unetpp.engines import scale
from unetpp.errors import ConfigError, ImageError
from unetpp.images import decode_image, decode_mask, to_channels

MAX_PIXELS = 178_956_970
NUM_READERS = 8


class Sample(Frozen):
    """One labelled image: where it and its mask are, its split and its groups (the other columns of splits.csv)."""

    id: str
    image_uri: str
    mask_uri: str
    split: str
    groups: dict[str, str] = Field({})


class LabelledSet(Frozen):
    """The samples of a data set in the order of their ids, and a fingerprint of their listing."""

    uri: str
    samples: tuple[Sample, ...]
    fingerprint: str

    def split(self, name: str | None) -> tuple[Sample, ...]:
        """The samples of a split, all for None; ConfigError where there is none."""
        chosen = tuple(sample for sample in self.samples if name is None or sample.split == name)
        if not chosen:
            names = sorted({sample.split for sample in self.samples})
            raise ConfigError(f"{self.uri} has no image in split {name!r}; its splits are {', '.join(names)}")
        return chosen


class LabelledImage:
    """Decoded arrays of one sample: image_HWC of file values, target_HW of class ids (uint8)."""

    __slots__ = ("image_HWC", "sample", "target_HW")

    def __init__(self, sample: Sample, image_HWC: NDArray[np.generic], target_HW: NDArray[np.uint8]) -> None:
        self.sample = sample
        self.image_HWC = image_HWC
        self.target_HW = target_HW


def open_labelled_set(uri: str) -> LabelledSet:
    """List a labelled set and pair its files. ConfigError where images, masks or rows of splits.csv lack a partner."""
    listing = {entry.key: entry.etag for entry in storage.list_objects(uri)}
    images, masks = _by_id(uri, listing, "images"), _by_id(uri, listing, "masks")
    if not images:
        raise ConfigError(
            f"{uri} holds no images/: a labelled data set is a folder with images/, masks/ and splits.csv"
        )
    rows = _read_splits(uri) if "splits.csv" in listing else {id_: {"split": _hashed_split(id_)} for id_ in images}
    for what, ids, where in (("mask", masks, "masks/"), ("row", rows, "splits.csv")):
        lacking = sorted(images.keys() - ids.keys())
        if lacking:
            raise ConfigError(f"{uri}: {len(lacking)} image(s) have no {what} in {where}, the first is {lacking[0]!r}")
    absent = sorted(rows.keys() - images.keys())
    if absent:
        raise ConfigError(f"{uri}: splits.csv names {len(absent)} id(s) without an image, the first is {absent[0]!r}")
    samples = tuple(
        Sample(
            id=id_,
            image_uri=storage.join(uri, images[id_]),
            mask_uri=storage.join(uri, masks[id_]),
            split=rows[id_]["split"],
            groups={column: value for column, value in rows[id_].items() if column not in ("id", "split")},
        )
        for id_ in sorted(images)
    )
    relevant = {key: etag for key, etag in listing.items() if key.split("/")[0] in ("images", "masks", "splits.csv")}
    return LabelledSet(uri=uri, samples=samples, fingerprint=fingerprint(dict(relevant)))


def _by_id(uri: str, listing: dict[str, str], folder: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for key in listing:
        path = PurePosixPath(key)
        if path.parts[0] != folder or path.name.startswith("."):
            continue
        id_ = str(path.relative_to(folder).with_suffix(""))
        if id_ in keys:
            raise ConfigError(f"{uri}: {keys[id_]} and {key} have the same id {id_!r}; remove or rename one")
        keys[id_] = key
    return keys


def _read_splits(uri: str) -> dict[str, dict[str, str]]:
    text = storage.read_bytes(storage.join(uri, "splits.csv")).decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text))
    columns = reader.fieldnames or []
    if "id" not in columns or "split" not in columns:
        raise ConfigError(f"{uri}/splits.csv has columns {', '.join(columns)}; wanted at least id and split")
    return {row["id"]: {column: value or "" for column, value in row.items() if column} for row in reader}


def _hashed_split(id_: str) -> str:
    return "val" if hashlib.sha256(id_.encode()).digest()[0] < 51 else "train"


def load(samples: Sequence[Sample], model: ModelConfig) -> list[LabelledImage]:
    """Read and decode samples, several at a time, in order.

    ConfigError, naming the file, where an image or mask cannot be decoded, sizes differ, or a mask holds a class that
    the model does not have: a set with labels that cannot be trusted is not trained on.
    """
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(lambda sample: _load_one(sample, model), samples))


def _load_one(sample: Sample, model: ModelConfig) -> LabelledImage:
    uri = sample.image_uri
    try:
        image_HWC = to_channels(decode_image(storage.read_bytes(uri), max_pixels=MAX_PIXELS), model.in_channels)
        uri = sample.mask_uri
        target_HW = decode_mask(storage.read_bytes(uri), model.num_classes, max_pixels=MAX_PIXELS)
    except ImageError as error:
        raise ConfigError(f"{uri} cannot be used: {error.detail}; replace it, or take it out of the set") from None
    if image_HWC.shape[:2] != target_HW.shape:
        (height, width), (mask_height, mask_width) = image_HWC.shape[:2], target_HW.shape
        raise ConfigError(
            f"mask {sample.mask_uri} is {mask_height} x {mask_width} pixels, its image {sample.image_uri} is "
            f"{height} x {width} (height x width); they must be equal"
        )
    return LabelledImage(sample, image_HWC, target_HW)


def scaled(image_HWC: NDArray[np.generic], model: ModelConfig) -> NDArray[np.float32]:
    """File values -> float32 HWC, 0..1 over the value range: the same arithmetic as at prediction."""
    x_1CHW = scale(torch.from_numpy(np.array(image_HWC))[None], model)
    return x_1CHW[0].permute(1, 2, 0).numpy()


class CropSampler:
    """Training crops by number: crop n of epoch e is the same whatever the world size, and after a resume.

    With `balance_by`, the group of a crop is drawn by `group_weights` (default equal) before the image; else images
    are drawn uniformly. A share `foreground` of the crops lies around a random pixel of the image's foreground, as far
    as the borders let it; where an image has none, anywhere.
    """

    def __init__(self, images: Sequence[LabelledImage], config: TrainConfig) -> None:
        self.config = config
        self.images = images
        self._foregrounds: dict[int, Foreground] = {}
        self._cumulative = np.cumsum(self._image_probabilities())
        self._cumulative[-1] = 1.0

    def _image_probabilities(self) -> NDArray[np.float64]:
        column = self.config.balance_by
        if column is None:
            return np.full(len(self.images), 1 / len(self.images))
        groups = [image.sample.groups.get(column) for image in self.images]
        if None in groups:
            raise ConfigError(f"balance_by: splits.csv of {self.config.data} has no column {column!r}")
        names, sizes = np.unique(np.array(groups), return_counts=True)
        weights = self.config.group_weights or dict.fromkeys(names.tolist(), 1.0)
        if set(weights) != set(names.tolist()):
            raise ConfigError(
                f"group_weights names {sorted(weights)}, the training images have {column} {sorted(names.tolist())}"
            )
        share = {name: weights[name] / size for name, size in zip(names.tolist(), sizes.tolist(), strict=True)}
        probability = np.array([share[str(group)] for group in groups])
        return probability / probability.sum()

    def crop(self, epoch: int, number: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Crop `number` of `epoch`: float32 HWC and its target uint8 HW."""
        rng = np.random.default_rng([self.config.seed, epoch, number])
        number_of_image = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        image = self.images[number_of_image]
        crop_px, changes = self.config.crop_px, self.config.augment
        centre = self._foreground(number_of_image).pixel(rng) if rng.random() < self.config.foreground else None
        view = random_view(image.target_HW.shape, crop_px, changes, rng, centre)
        window_HWC = scaled(view.cut(image.image_HWC), self.config.model)
        return augment(window_HWC, view.cut(image.target_HW), view, changes, rng)

    def _foreground(self, number_of_image: int) -> Foreground:
        if number_of_image not in self._foregrounds:
            self._foregrounds[number_of_image] = Foreground(self.images[number_of_image].target_HW)
        return self._foregrounds[number_of_image]

    def batches(self, epoch: int, num_steps: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of every global batch: x_BCHW float32 and target_BHW uint8; the next is made meanwhile."""
        size = self.config.batch_size

        def make(step: int) -> tuple[Tensor, Tensor]:
            crops = [self.crop(epoch, number) for number in range(step * size + rank, (step + 1) * size, world_size)]
            x_BHWC = torch.from_numpy(np.stack([image for image, _ in crops]))
            return x_BHWC.permute(0, 3, 1, 2), torch.from_numpy(np.stack([target for _, target in crops]))

        # A second team of OpenMP threads would only wait in the way of the one that trains.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ahead = pool.submit(make, 0)
            for step in range(num_steps):
                batch = ahead.result()
                if step + 1 < num_steps:
                    ahead = pool.submit(make, step + 1)
                yield batch
