"""What every training worker runs: epochs of steps, each validated at every level and saved as a checkpoint."""

import math
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model

from jobs import checkpoints
from jobs.checkpoints import EpochMetrics
from jobs.contract import TrainConfig
from jobs.dataset import SHARED_MEMORY, CropSampler, LabelledImage, processes_with_room
from jobs.models import fetch_model
from jobs.provenance import provenance
from jobs.stream import streamed_batches
from jobs.train_records import Progress, RunLog, write_records
from jobs.training import DivergedError, TrainingState, first_network
from unetpp.checkpoint import from_pretrained
from unetpp.errors import ConfigError, StorageError
from unetpp.measuring import masks_by_level
from unetpp.metrics import confusion_counts, iou
from unetpp.model import UNetPlusPlus

MAX_DIVERGED = 3
"""So often training goes back to the last checkpoint with half the learning rate, before it gives up."""
CLOCK_STEPS = 10
"""So often the workers agree on the time, where it decides the learning rate."""

History = tuple[EpochMetrics, ...]


def train_worker(settings: dict[str, Any]) -> None:
    """Train from the newest checkpoint to the end of the run. ConfigError where a GPU has too little memory for it."""
    try:
        _train(settings)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU has too little memory ({error}); lower batch_size or micro_batch, set recompute, or a precision "
            "of bfloat16 or float16"
        ) from None


def _train(settings: dict[str, Any]) -> None:
    worker = Worker(settings)
    history = worker.resume()
    num_diverged = 0
    while not is_over(worker.config, history):
        try:
            history = worker.epoch(history)
        except DivergedError as error:
            worker.remove_diverged()
            num_diverged += 1
            if num_diverged > MAX_DIVERGED:
                rate = worker.state.learning_rate
                raise ConfigError(
                    f"{error}, {num_diverged} times, the last at a learning rate of {rate:.2g}; lower learning_rate, "
                    "set max_gradient_norm, or look for broken values in the data"
                ) from None
            worker.progress.tell(f"{error}: going back to the last checkpoint before them, with half the learning rate")
            history = worker.resume(worker.state.learning_rate_factor / 2)
    ray.train.report(history[-1].model_dump(mode="json"))  # once: it waits for the controller, for seconds


def is_over(config: TrainConfig, history: History) -> bool:
    """Whether a run with these epochs is at its end: all epochs, the time, or the patience."""
    if not history:
        return False
    if config.max_seconds is not None and history[-1].seconds >= config.max_seconds:
        return True
    best = max(range(len(history)), key=lambda number: (history[number].val_mean_iou, -number))
    return len(history) >= config.epochs or (config.patience is not None and len(history) - 1 - best >= config.patience)


class Worker:
    """One of the processes that train together."""

    def __init__(self, settings: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config: TrainConfig = settings["config"]
        self.run_uri: str = settings["run_uri"]
        self.init: str | None = settings["init"]
        self.steps_per_epoch: int = settings["steps_per_epoch"]
        self.device = get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(settings["threads"])
        self.environment = provenance()
        self.val = ray.get(settings["val"])
        self.sampler = CropSampler(ray.get(settings["train"]), self.config) if settings["train"] else None
        log = RunLog(self.run_uri) if self.rank == 0 else None
        self.progress = Progress(log, self.config.epochs, self.steps_per_epoch)
        self.num_processes = 0  # that make crops; a worker without a GPU needs its cores itself
        if self.sampler is not None and self.device.type != "cpu":
            self.num_processes = self._with_room(settings["threads"], context.get_local_world_size())

    def _with_room(self, num_processes: int, num_here: int) -> int:
        """As many of the processes that make crops as shared memory has room for, with so many workers on this node."""
        room = processes_with_room(self.config, self.world_size, num_here)
        if room < num_processes:
            self.progress.tell(
                f"{SHARED_MEMORY} has room for the batches of {room} processes that make crops, not {num_processes}: "
                "fewer make them, which takes longer; give a container more with --shm-size"
            )
        return min(room, num_processes)

    def resume(self, learning_rate_factor: float | None = None) -> History:
        """Go to the newest checkpoint, or to the beginning; the epochs before it."""
        found = checkpoints.newest(self.run_uri)
        self._agree_on(0 if found is None else int(found[0].sha256[:15], 16))
        initial = from_pretrained(fetch_model(self.init)) if self.init and found is None else None
        num_steps = self.config.epochs * self.steps_per_epoch
        network = first_network(self.config, initial)
        self.state = TrainingState(self.config, num_steps, network, self.device, prepare_model)
        history: History = ()
        if found is not None:
            checkpoint, content = found
            self.state.restore(content)
            history = checkpoint.history
        if learning_rate_factor is not None:
            self.state.slow_down(learning_rate_factor)
        self._started = time.monotonic() - self.state.seconds
        return history

    def _agree_on(self, checkpoint: int) -> None:
        """StorageError where workers, which each look for the newest checkpoint, found different ones."""
        if self.world_size == 1:
            return
        largest = torch.tensor([checkpoint, -checkpoint], device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if int(largest[0]) != -int(largest[1]):
            raise StorageError(
                f"workers found different newest checkpoints in {self.run_uri}: it shows some of them late, or another "
                "training writes there; wait, and start the same command again"
            )

    def remove_diverged(self) -> None:
        """Remove the checkpoints after which no step had a finite gradient: from there it would diverge again."""
        if self.rank == 0:
            checkpoints.remove(self.run_uri, self.state.num_steps_done - self.state.skipped_in_a_row)
        if self.world_size > 1:
            dist.barrier()  # until then the others may still find them

    def epoch(self, history: History) -> History:
        """Train an epoch, validate, save; the history with it."""
        epoch, state = len(history), self.state
        losses, rates = self._steps(epoch)
        val_iou = self._validate(state.averaged)
        state.seconds = self._seconds()
        finite = [loss for loss in losses if math.isfinite(loss)]
        heads = [value for name, value in val_iou.items() if name != "accurate"]
        metrics = EpochMetrics(
            epoch=epoch,
            step=state.num_steps_done,
            loss=sum(finite) / len(finite) if finite else math.nan,
            learning_rate=rates[-1] if rates else 0.0,
            val_iou=val_iou,
            val_mean_iou=sum(heads) / len(heads),
            num_skipped=state.num_skipped,
            seconds=state.seconds,
        )
        history = (*history, metrics)
        if self.rank == 0:
            checkpoints.save(self.run_uri, state.save(), history, self.environment)
            checkpoints.tidy(self.run_uri, self.config.keep_checkpoints)
            write_records(self.run_uri, history, losses, rates)
        self.progress.epoch(metrics)
        return history

    def _steps(self, epoch: int) -> tuple[list[float], list[float]]:
        """The epoch's steps, or as many as there is time for: losses of the whole batches, and learning rates."""
        state = self.state
        state.train()
        losses: list[torch.Tensor] = []
        rates: list[float] = []
        with closing(self._batches(epoch)) as batches:
            for x_BCHW, target_BHW in batches:
                if self.config.max_seconds is not None and len(losses) % CLOCK_STEPS == 0:
                    state.seconds = self._seconds()
                    if state.seconds >= self.config.max_seconds:
                        break
                rates.append(state.learning_rate)
                size = self.config.micro_batch or len(x_BCHW)
                micro_batches = list(zip(x_BCHW.split(size), target_BHW.split(size), strict=True))
                losses.append(state.step(micro_batches, self.world_size))
                self.progress.step(epoch, len(losses), losses[-1] * self.world_size)
        if not losses:  # nor has any other worker: they agree on the time
            return [], rates
        whole = torch.stack(losses)
        if self.world_size > 1:
            dist.all_reduce(whole)
        return whole.tolist(), rates

    def _batches(self, epoch: int) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
        """This worker's part of every batch of an epoch."""
        if self.sampler is not None:
            yield from self.sampler.batches(epoch, self.steps_per_epoch, self.rank, self.world_size, self.num_processes)
        else:
            yield from streamed_batches(self.config, self.world_size)

    def _seconds(self) -> float:
        """How long the run has trained, validated and saved, over all resumptions: the first worker's clock."""
        seconds = time.monotonic() - self._started
        if self.world_size == 1:
            return seconds
        told = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        dist.broadcast(told, src=0)
        return float(told)

    def _validate(self, model: UNetPlusPlus) -> dict[str, float]:
        """Mean per-image IoU of every level and of accurate mode, over the images of all workers."""
        if self.world_size > 1:
            for buffer in model.buffers():  # those that are saved: every worker has statistics of its own
                dist.broadcast(buffer, src=0)
        model.eval()
        names = [f"L{level}" for level in model.config.head_levels]
        names += ["accurate"] if len(names) > 1 else []
        sums = torch.zeros(len(names), dtype=torch.float64)
        for image in self._own(self.val):
            masks = masks_by_level(model, image.image_HWC)
            counts = [confusion_counts(masks[name], image.target_HW, model.config.num_classes) for name in names]
            sums += torch.tensor([iou(each) for each in counts])
        if self.world_size > 1:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return dict(zip(names, (sums / len(self.val)).tolist(), strict=True))

    def _own(self, images: Sequence[LabelledImage]) -> Sequence[LabelledImage]:
        return [images[number] for number in range(self.rank, len(images), self.world_size)]
