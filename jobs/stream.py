"""Training crops of a set that is larger than a node: images are read, decoded and cut by Ray Data as they are needed.

The crops of an epoch are those of `CropSampler`, by number; only their order is another one. Images are visited in a
seeded order, some at a time, and the crops of those that are open together are mixed. So every image is read about
once an epoch, and a resumed run sees what an undisturbed one sees.

Every epoch is a stream of its own, begun anew. `streaming_split`, which shares the crops out, knows no epochs: in a
stream of several, some workers would be ahead of others by whole blocks, and train on crops of the next epoch.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import ray
import ray.train
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayTaskError
from torch import Tensor

from jobs import checkpoints
from jobs.contract import TrainConfig
from jobs.dataset import CropSampler, LabelledImage, load
from jobs.labelled import Sample
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError, UnetppError

STREAM = "crops"
"""The name under which Ray Train's workers find the stream."""
OPEN_IMAGES = 16
"""Images whose crops are mixed, and that a reader holds in memory."""
BLOCK_CROPS = 64


class RemoteImages(Sequence[LabelledImage]):
    """The images of a set, each read when it is asked for; the last few are kept."""

    def __init__(self, samples: Sequence[Sample], model: ModelConfig) -> None:
        self.samples, self._model = samples, model
        self._open: OrderedDict[int, LabelledImage] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> LabelledImage: ...
    @overload
    def __getitem__(self, index: slice) -> "RemoteImages": ...
    def __getitem__(self, index: int | slice) -> "LabelledImage | RemoteImages":
        if isinstance(index, slice):
            return RemoteImages(self.samples[index], self._model)
        if index not in self._open:
            (self._open[index],) = load([self.samples[index]], self._model)
            if len(self._open) > OPEN_IMAGES:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]


def crop_order(sampler: CropSampler, epoch: int, num_crops: int) -> NDArray[np.int64]:
    """The numbers of an epoch's crops in the order in which they are made: each once."""
    rng = np.random.default_rng([sampler.config.seed, epoch])
    place = rng.permutation(len(sampler.images))  # of every image in the epoch's order of images
    group = place[[sampler.image_of(epoch, number) for number in range(num_crops)]] // OPEN_IMAGES
    mixed = rng.permutation(num_crops)
    return mixed[np.argsort(group[mixed], kind="stable")]


class CropMaker:
    """Makes the crops of a block of places in the order of the epoch that follows the newest checkpoint.

    Every epoch has makers of its own. One that replaces another in mid-epoch finds the same checkpoint, since the next
    one is written when all crops of the epoch have been trained on.
    """

    def __init__(self, samples: Sequence[Sample], config: TrainConfig, num_crops: int, run_uri: str) -> None:
        self._sampler = CropSampler(RemoteImages(samples, config.model), config, samples, OPEN_IMAGES)
        found = checkpoints.newest(run_uri)  # where the workers go on: a torn one is passed over here, too
        self._epoch = 0 if found is None else found[0].epoch + 1
        self._order = crop_order(self._sampler, self._epoch, num_crops)

    def __call__(self, places: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        """`id`: places in the order -> x: float32 B, H, W, C; target: uint8 B, H, W."""
        crops = [self._sampler.crop(self._epoch, int(number)) for number in self._order[places["id"]]]
        return {"x": np.stack([x for x, _ in crops]), "target": np.stack([target for _, target in crops])}


def crop_stream(samples: Sequence[Sample], config: TrainConfig, steps_per_epoch: int, run_uri: str) -> Dataset:
    """The crops of an epoch, in order, for the workers to share; those of the next one each time that it is read.

    Call it with Ray started.
    """
    fewest, most = config.worker_bounds
    if fewest != most or config.batch_size % most:
        raise ConfigError(
            f"cache stream shares every batch out evenly: batch_size {config.batch_size} must be a multiple of "
            f"num_workers, and that a single number, not {config.num_workers}"
        )
    CropSampler(RemoteImages(samples, config.model), config, samples)  # refuses groups that do not fit
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True  # else the error of an image is hidden in one of Ray Data
    num_crops = steps_per_epoch * config.batch_size
    return ray.data.range(num_crops, override_num_blocks=-(-num_crops // BLOCK_CROPS)).map_batches(
        CropMaker,
        fn_constructor_args=(list(samples), config, num_crops, run_uri),
        batch_size=BLOCK_CROPS,
        compute=ActorPoolStrategy(min_size=1, max_size=8),
    )


def streamed_batches(config: TrainConfig, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One worker's part of the epoch that follows the newest checkpoint: x_BCHW float32 and target_BHW uint8."""
    shard = ray.train.get_dataset_shard(STREAM)
    try:
        for batch in shard.iter_torch_batches(batch_size=config.batch_size // world_size, drop_last=True):
            yield batch["x"].permute(0, 3, 1, 2), batch["target"]
    except RayTaskError as error:
        if isinstance(error.cause, UnetppError):
            raise error.cause from None  # a sentence, where Ray has a traceback
        raise
