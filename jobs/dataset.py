"""A labelled data set -> training crops and validation images. `jobs.labelled` says what such a set is.

Images are decoded once: into memory, or into one file of the node (`jobs.array_file`) where they would take too much.
"""

import gc
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jobs import array_file, contract
from jobs.array_file import ArrayFile, Arrays
from jobs.contract import Cache, TrainConfig
from jobs.labelled import LabelledSet, Sample, find_set, refuse_absent_column
from jobs.samples import Encoded, list_samples, readers
from unetpp.augment import Foreground, augment, random_view
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError, ImageError
from unetpp.images import to_channels
from unetpp.torch_engine import scale

NUM_READERS = 8
MEMORY_SHARE = 0.25
"""Decoded images that take more than this share of the node's memory go to a file, with `cache` auto."""
DECODING = 2
"""Raised with every change of what files are decoded to: node files of another number are made anew."""

SHARED_MEMORY = "/dev/shm"
BATCHES_AHEAD = 2
"""So many of each process that makes crops may wait in shared memory."""


class LabelledImage:
    """Decoded arrays of one sample: image_HWC of file values, target_HW of class ids (uint8)."""

    __slots__ = ("image_HWC", "sample", "target_HW")

    def __init__(self, sample: Sample, image_HWC: NDArray[np.generic], target_HW: NDArray[np.uint8]) -> None:
        self.sample = sample
        self.image_HWC = image_HWC
        self.target_HW = target_HW


def open_labelled_set(uri: str, split_column: str = "split") -> LabelledSet:
    """List a labelled set and pair its parts. ConfigError where images, masks or rows lack a partner."""
    listing = find_set(uri)
    samples, problems = list_samples(listing, split_column)
    for problem in problems:
        if problem.is_fatal:
            raise ConfigError(problem.sentence)
    return LabelledSet(uri=uri, samples=samples, fingerprint=listing.fingerprint)


def load(
    samples: Sequence[Sample],
    model: ModelConfig,
    *,
    cache: Cache = "memory",
    fingerprint: str = "",
    memory_bytes: float | None = None,
) -> Sequence[LabelledImage]:
    """Read and decode samples, several at a time, in order.

    Args:
        samples: of one labelled set.
        model: says how many channels and classes there are.
        cache: memory holds the arrays; disk maps them from a file of this node, which a second call finds; auto is
            memory up to a quarter of the node's, then disk.
        fingerprint: of the set, a part of the file's name.
        memory_bytes: the node's memory; default: asked of the system.

    Raises:
        ConfigError: names the file, where an image or mask cannot be decoded, sizes differ, or a mask holds a class
            that the model does not have: a set with labels that cannot be trusted is not trained on.
        StorageError: there is no room for the file.
    """
    mapped = MappedImages(samples, model, fingerprint)
    if cache == "disk" or (cache == "auto" and mapped.is_built):
        return mapped.built()
    limit_bytes = MEMORY_SHARE * (memory_bytes or node_memory_bytes()) if cache == "auto" else np.inf
    decoded = _decoded(samples, model)
    images: dict[int, LabelledImage] = {}
    num_bytes = 0
    for position, image in decoded:
        images[position] = image
        num_bytes += image.image_HWC.nbytes + image.target_HW.nbytes
        if num_bytes > limit_bytes:
            return mapped.built(chain(_handed_over(images), decoded))
    return [images[position] for position in range(len(samples))]


def _handed_over(images: dict[int, LabelledImage]) -> Iterator[tuple[int, LabelledImage]]:
    while images:
        yield images.popitem()


class MappedImages(Sequence[LabelledImage]):
    """Images mapped from a file of this node. Sent to another node, that one builds a file of its own.

    An index gives an image whose pixels are read when they are touched, a slice some of the images.
    """

    def __init__(self, samples: Sequence[Sample], model: ModelConfig, fingerprint: str) -> None:
        self._samples, self._model = tuple(samples), model
        self._positions = range(len(samples))
        self._arrays: ArrayFile | None = None
        self._key = contract.fingerprint(
            {
                "decoding": DECODING,
                "set": fingerprint,
                "samples": [sample.model_dump(mode="json", exclude={"split", "groups"}) for sample in samples],
                "in_channels": model.in_channels,
                "bands": model.bands,
                "num_classes": model.num_classes,
                "ignore": model.ignore_index,
            }
        )

    @property
    def is_built(self) -> bool:
        """Whether this node has the file."""
        return array_file.find(self._key) is not None

    def built(self, decoded: Iterator[tuple[int, LabelledImage]] | None = None) -> "MappedImages":
        """Itself, with the file there: found, or made of `decoded`, by default decoded now."""
        self._map(decoded)
        return self

    def _map(self, decoded: Iterator[tuple[int, LabelledImage]] | None = None) -> ArrayFile:
        if self._arrays is None:

            def arrays() -> Iterator[tuple[int, Arrays]]:
                images = _decoded(self._samples, self._model) if decoded is None else decoded
                return ((position, (image.image_HWC, image.target_HW)) for position, image in images)

            self._arrays = array_file.find_or_build(self._key, arrays)
        return self._arrays

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> LabelledImage: ...
    @overload
    def __getitem__(self, index: slice) -> "MappedImages": ...
    def __getitem__(self, index: int | slice) -> "LabelledImage | MappedImages":
        if isinstance(index, slice):
            some = copy(self)
            some._positions = self._positions[index]
            return some
        position = self._positions[index]
        image_HWC, target_HW = self._map()[position]
        return LabelledImage(self._samples[position], image_HWC, target_HW)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}


def _decoded(samples: Sequence[Sample], model: ModelConfig) -> Iterator[tuple[int, LabelledImage]]:
    """(position, image) of every sample, a few read and decoded ahead."""
    ahead: deque[tuple[int, Future[LabelledImage]]] = deque()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for position, read in readers(samples):
            ahead.append((position, pool.submit(_decode, samples[position], read, model)))
            if len(ahead) > 2 * NUM_READERS:
                earliest, future = ahead.popleft()
                yield earliest, future.result()
        for earliest, future in ahead:
            yield earliest, future.result()


def _decode(sample: Sample, read: Callable[[], Encoded], model: ModelConfig) -> LabelledImage:
    uri = sample.image_uri
    try:
        encoded = read()
        image_HWC = to_channels(encoded.image_HWC(model.bands), model.in_channels)
        uri = sample.mask_uri
        target_HW = encoded.mask_HW(model.num_classes, model.ignore_index)
    except ImageError as error:
        raise ConfigError(f"{uri} cannot be used: {error.detail}; replace it, or take it out of the set") from None
    if image_HWC.shape[:2] != target_HW.shape:
        (height, width), (mask_height, mask_width) = image_HWC.shape[:2], target_HW.shape
        raise ConfigError(
            f"mask {sample.mask_uri} is {mask_height} x {mask_width} pixels, its image {sample.image_uri} is "
            f"{height} x {width} (height x width); they must be equal"
        )
    if model.ignore_index is not None and (target_HW == model.ignore_index).all():
        raise ConfigError(
            f"{sample.mask_uri} has no labelled pixel, but {model.ignore_index} alone, the ignore_index; take its "
            "image out of the set: it would count as found without a fault"
        )
    return LabelledImage(sample, image_HWC, target_HW)


def node_memory_bytes() -> int:
    """The memory of this machine, or of this container where that is less."""
    limits = [psutil.virtual_memory().total]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def processes_with_room(config: TrainConfig, num_workers: int, num_here: int, free_bytes: int | None = None) -> int:
    """Processes a worker whose batches fit into shared memory, which `num_here` of all workers share.

    A batch that does not fit kills its process. `free_bytes`: default: asked of the system.
    """
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free if free_bytes is None else free_bytes
    crop_bytes = config.crop_px**2 * (4 * config.model.in_channels + 1)  # float32, and the class ids
    batch_bytes = -(-config.batch_size // num_workers) * crop_bytes
    return free_bytes // num_here // (BATCHES_AHEAD * batch_bytes)


def scaled(image_HWC: NDArray[np.generic], model: ModelConfig) -> NDArray[np.float32]:
    """File values -> float32 HWC, 0..1 over the value range: the same arithmetic as at prediction."""
    x_1CHW = scale(torch.from_numpy(np.array(image_HWC))[None], model)
    return x_1CHW[0].permute(1, 2, 0).numpy()


class CropSampler:
    """Training crops by number: crop n of epoch e is the same whatever the world size, and after a resume.

    With `balance_by`, the group of a crop is drawn by `group_weights` (default equal), with `balance_within` then one
    of its subgroups, all equally likely, and then one of their images; else images are drawn uniformly. A share
    `foreground` of the crops lies around a random pixel of the image's foreground, as far
    as the borders let it; where an image has none, anywhere.
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        config: TrainConfig,
        samples: Sequence[Sample] | None = None,
        num_indexed: int | None = None,
    ) -> None:
        """`samples` are those of `images`, where it would cost to ask the images for them.

        The foreground of the last `num_indexed` images is kept, which holds their targets; default: of all images.
        """
        self.config = config
        self.images = images
        self._foreground = lru_cache(num_indexed)(lambda number: Foreground(images[number].target_HW))
        samples = [image.sample for image in images] if samples is None else samples
        self._cumulative = np.cumsum(self._image_probabilities(samples))
        self._cumulative[-1] = 1.0

    def _image_probabilities(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Shares of a group, of its subgroups and of their images, multiplied."""
        groups = self._groups("balance_by", samples)
        weights = self.config.group_weights or dict.fromkeys(groups, 1.0)
        if set(weights) != set(groups):
            raise ConfigError(
                f"group_weights names {sorted(weights)}, the training images have {self.config.balance_by} "
                f"{sorted(set(groups))}"
            )
        subgroups = list(zip(groups, self._groups("balance_within", samples), strict=True))
        num_subgroups = Counter(group for group, _ in set(subgroups))
        num_images = Counter(subgroups)
        probability = np.array([weights[each[0]] / num_subgroups[each[0]] / num_images[each] for each in subgroups])
        return probability / probability.sum()

    def _groups(self, setting: Literal["balance_by", "balance_within"], samples: Sequence[Sample]) -> list[str]:
        """The group of every sample in the column that the setting names; one for all where it names none."""
        column = getattr(self.config, setting)
        if column is not None:
            refuse_absent_column(samples, column, setting)
        return [sample.group(column) for sample in samples]

    def crop(self, epoch: int, number: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Crop `number` of `epoch`: float32 HWC and its target uint8 HW."""
        rng = np.random.default_rng([self.config.seed, epoch, number])
        number_of_image = self._draw_image(rng)
        image = self.images[number_of_image]
        crop_px, changes = self.config.crop_px, self.config.augment
        centre = self._foreground(number_of_image).pixel(rng) if rng.random() < self.config.foreground else None
        view = random_view(image.target_HW.shape, crop_px, changes, rng, centre)
        window_HWC = scaled(view.cut(image.image_HWC), self.config.model)
        return augment(window_HWC, view.cut(image.target_HW), view, changes, rng)

    def image_of(self, epoch: int, number: int) -> int:
        """Position of the image that crop `number` of `epoch` is of."""
        return self._draw_image(np.random.default_rng([self.config.seed, epoch, number]))

    def _draw_image(self, rng: np.random.Generator) -> int:
        return int(np.searchsorted(self._cumulative, rng.random(), side="right"))

    def index_foreground(self) -> None:
        """Index the foreground of every image now, where crops are drawn around it."""
        for number_of_image in range(len(self.images) if self.config.foreground > 0 else 0):
            self._foreground(number_of_image)

    def batches(
        self, epoch: int, num_steps: int, rank: int, world_size: int, num_processes: int = 0
    ) -> Generator[tuple[Tensor, Tensor]]:
        """This rank's part of every global batch: x_BCHW float32 and target_BHW uint8; more are made meanwhile.

        One thread makes them, or so many processes; they end with the generator.
        """
        parts = _Parts(self, epoch, rank, world_size)
        return _by_processes(parts, num_steps, num_processes) if num_processes else _by_a_thread(parts, num_steps)


class _Parts(Dataset[tuple[Tensor, Tensor]]):
    """One rank's part of every batch of an epoch, by the number of the step."""

    def __init__(self, sampler: CropSampler, epoch: int, rank: int, world_size: int) -> None:
        self.sampler, self._epoch, self._rank, self._world_size = sampler, epoch, rank, world_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        size = self.sampler.config.batch_size
        numbers = range(step * size + self._rank, (step + 1) * size, self._world_size)
        crops = [self.sampler.crop(self._epoch, number) for number in numbers]
        x_BHWC = torch.from_numpy(np.stack([image for image, _ in crops]))
        return x_BHWC.permute(0, 3, 1, 2), torch.from_numpy(np.stack([target for _, target in crops]))


def _by_a_thread(parts: _Parts, num_steps: int) -> Generator[tuple[Tensor, Tensor]]:
    # A second team of OpenMP threads would only wait in the way of the one that trains.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = pool.submit(parts.__getitem__, 0)
        for step in range(num_steps):
            batch = ahead.result()
            if step + 1 < num_steps:
                ahead = pool.submit(parts.__getitem__, step + 1)
            yield batch


def _by_processes(parts: _Parts, num_steps: int, num_processes: int) -> Generator[tuple[Tensor, Tensor]]:
    parts.sampler.index_foreground()  # else every process does, in every epoch
    # Forked, they have the images without a copy, be they in Ray's object store or in a file; other ways pickle them to
    # each. They touch neither CUDA nor Ray, whose threads they lack: what they hold of Ray's is never collected.
    loader = DataLoader(
        parts,
        batch_size=None,
        sampler=range(num_steps),
        num_workers=min(num_processes, num_steps),
        prefetch_factor=BATCHES_AHEAD,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork",
        worker_init_fn=lambda _: gc.freeze(),
    )
    yield from loader
