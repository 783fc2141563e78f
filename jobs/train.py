"""Train a UNet++ with deep supervision on Ray Train: `unetpp train --config F`.

A run is named after the fingerprints of its config and its data: the same call resumes it, a changed one starts anew.

```
<output>/<name>-<fingerprint>/checkpoints/   Ray Train's: best and last epochs, resumed by name
<output>/<name>-<fingerprint>/model/         the best epoch, exported
<output>/<name>-<fingerprint>/result.json    written last
```
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.queue import Empty, Queue
from torch.optim.swa_utils import AveragedModel

from jobs import storage
from jobs.cluster import local_ray
from jobs.contract import TrainConfig, TrainResult, fingerprint
from jobs.dataset import CropSampler, LabelledImage, LabelledSet, load, open_labelled_set
from unetpp.checkpoint import Pretrained, digest, save_pretrained
from unetpp.engines import keep_freed_memory
from unetpp.errors import ConfigError, UnetppError
from unetpp.loss import deep_supervision_loss
from unetpp.metrics import confusion_counts, iou
from unetpp.model import UNetPlusPlus
from unetpp.predictor import masks_by_level

logger = logging.getLogger(__name__)

STATE = "state.pt"
MAX_WORKER_FAILURES = 3
PROGRESS_S = 30


def run(config: TrainConfig) -> TrainResult:
    """Train, resume, or return the result of the finished run. ConfigError for data that cannot be trained on."""
    labelled = open_labelled_set(config.data)
    name = f"{config.name}-{fingerprint({'config': config.run_fingerprint(), 'data': labelled.fingerprint})[:10]}"
    run_uri = storage.join(config.output, name)
    result_uri = storage.join(run_uri, "result.json")
    if storage.exists(result_uri):
        logger.info("%s is trained already: nothing to do", name)
        return TrainResult.model_validate_json(storage.read_bytes(result_uri))

    started = time.monotonic()
    train = load(labelled.split(config.train_split), config.model)
    val = load(labelled.split(config.val_split), config.model)
    CropSampler(train, config)  # refuses groups that do not fit before anything is started
    steps_per_epoch = config.steps_per_epoch or max(1, len(train) // config.batch_size)
    logger.info("%s: %d training and %d validation images, %d steps", name, len(train), len(val), config.epochs * steps_per_epoch)
    with local_ray(num_cpus=config.num_workers * _threads(config)):
        fitted = _fit(config, run_uri, train, val, steps_per_epoch)
        model_uri = storage.join(run_uri, "model")
        best_checkpoint, best = max(fitted.best_checkpoints, key=lambda pair: pair[1]["val_mean_iou"])
        model_digest = _export(config, labelled, best_checkpoint, best, model_uri)
    result = TrainResult(
        run=name,
        model_uri=model_uri,
        digest=model_digest,
        epochs=config.epochs,
        steps=steps_per_epoch * config.epochs,
        best_epoch=best["epoch"],
        val_iou={int(level[1:]): value for level, value in best["val_iou"].items() if level != "accurate"},
        seconds=time.monotonic() - started,
    )
    storage.write_bytes(result_uri, result.model_dump_json(indent=2).encode())
    return result


def _threads(config: TrainConfig) -> int:
    return config.threads_per_worker or max(1, (os.cpu_count() or 1) // config.num_workers)


def _fit(
    config: TrainConfig, run_uri: str, train: list[LabelledImage], val: list[LabelledImage], steps_per_epoch: int
) -> ray.train.Result:
    use_gpu = config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    with storage.arrow(run_uri) as (filesystem, storage_path):
        pass
    news = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_worker,
        # The images are decoded once, and shared by the workers of a node through the object store.
        train_loop_config={
            "config": config,
            "train": ray.put(train),
            "val": ray.put(val),
            "steps_per_epoch": steps_per_epoch,
            "news": news,
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1 if use_gpu else _threads(config)}
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep_checkpoints,
                checkpoint_score_attribute="val_mean_iou",
                checkpoint_score_order="max",
            ),
        ),
    )
    try:
        with _logged(news):
            return trainer.fit()
    except WorkerGroupError as error:
        ours = [cause for cause in error.worker_failures.values() if isinstance(cause, UnetppError)]
        if ours:
            raise ours[0] from None
        raise


@contextmanager
def _logged(news: Queue) -> Iterator[None]:
    """Log what the workers tell, while the block runs."""
    over = threading.Event()

    def listen() -> None:
        while True:
            try:
                logger.info(news.get(timeout=1))
            except Empty:
                if over.is_set():
                    return

    listener = threading.Thread(target=listen, name="training progress")
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()
        news.shutdown()


class TrainingState:
    """What an epoch changes and a checkpoint holds: weights, their moving average, optimiser, schedule."""

    def __init__(self, config: TrainConfig, num_steps: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        model = UNetPlusPlus(config.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = AveragedModel(model, avg_fn=_warmed_up_average(config.ema_decay), use_buffers=True)
        self.model = prepare_model(model)
        self.optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, _warm_up_and_cosine(config.warmup_steps, num_steps))
        self.parts: dict[str, Any] = {
            "model": model,
            "average": self.average,
            "optimiser": self.optimiser,
            "schedule": self.schedule,
        }

    def save(self, path: Path, epoch: int) -> None:
        """Write everything that the next epoch starts from."""
        torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in self.parts.items()}}, path)

    def restore(self, path: Path, device: torch.device) -> int:
        """Read it back and return the next epoch."""
        saved = torch.load(path, map_location=device, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return int(saved["epoch"]) + 1

    def step(self, x_BCHW: torch.Tensor, target_BHW: torch.Tensor, head_weights: dict[int, float] | None) -> float:
        """One optimiser step; the loss. ConfigError when it is not finite."""
        loss = deep_supervision_loss(self.model(x_BCHW), target_BHW, head_weights)
        if not loss.isfinite():
            raise ConfigError(f"the loss became {loss.item()}; lower learning_rate, or look for broken values in the data")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.average.update_parameters(self.parts["model"])
        return loss.item()


def _warmed_up_average(decay: float) -> Any:
    """Exponential moving average whose early steps forget the random start faster."""

    def average(averaged: torch.Tensor, current: torch.Tensor, num_averaged: torch.Tensor | int) -> torch.Tensor:
        n = float(num_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        return torch.lerp(averaged, current, weight) if averaged.is_floating_point() else current

    return average


def _warm_up_and_cosine(warmup_steps: int, num_steps: int) -> Any:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, progress)))))

    return factor


def train_worker(settings: dict[str, Any]) -> None:
    """What every worker runs: epochs of steps, each epoch validated at every level and reported with a checkpoint."""
    keep_freed_memory()
    config: TrainConfig = settings["config"]
    train, val = ray.get([settings["train"], settings["val"]])
    steps_per_epoch: int = settings["steps_per_epoch"]
    context = ray.train.get_context()
    progress = Progress(settings["news"] if context.get_world_rank() == 0 else None, config.epochs, steps_per_epoch)
    rank, world_size, device = context.get_world_rank(), context.get_world_size(), get_device()
    if device.type == "cpu":
        torch.set_num_threads(_threads(config))
    state = TrainingState(config, config.epochs * steps_per_epoch, device)
    sampler = CropSampler(train, config)
    first_epoch = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as checkpoint_dir:
            first_epoch = state.restore(Path(checkpoint_dir) / STATE, device)
    for epoch in range(first_epoch, config.epochs):
        started = time.monotonic()
        state.model.train()
        losses: list[float] = []
        for x_BCHW, target_BHW in sampler.batches(epoch, steps_per_epoch, rank, world_size):
            losses.append(state.step(x_BCHW.to(device), target_BHW.to(device), config.head_weights))
            progress.step(epoch, losses)
        val_iou = _validate(state.average.module, val[rank::world_size], len(val), world_size)
        metrics = {
            "epoch": epoch,
            "loss": sum(losses) / len(losses),
            "val_iou": val_iou,
            "val_mean_iou": sum(val_iou.values()) / len(val_iou),
            "seconds": time.monotonic() - started,
        }
        progress.epoch(metrics)
        _report(state, metrics, rank)


def _validate(model: torch.nn.Module, images: Sequence[LabelledImage], num_images: int, world_size: int) -> dict[str, float]:
    """Mean per-image IoU of every level and of accurate mode, over the images of all workers."""
    assert isinstance(model, UNetPlusPlus)
    model.eval()
    names = [f"L{level}" for level in model.config.head_levels]
    names += ["accurate"] if len(names) > 1 else []
    sums = torch.zeros(len(names), dtype=torch.float64)
    for image in images:
        masks = masks_by_level(model, image.image_HWC)  # type: ignore[arg-type]
        sums += torch.tensor(
            [iou(confusion_counts(masks[name], image.target_HW, model.config.num_classes)) for name in names]
        )
    if world_size > 1:
        sums = sums.to(next(model.parameters()).device)
        dist.all_reduce(sums)
    return dict(zip(names, (sums / num_images).tolist(), strict=True))


def _report(state: TrainingState, metrics: dict[str, Any], rank: int) -> None:
    with tempfile.TemporaryDirectory() as checkpoint_dir:
        checkpoint = None
        if rank == 0:
            state.save(Path(checkpoint_dir) / STATE, metrics["epoch"])
            checkpoint = Checkpoint.from_directory(checkpoint_dir)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{metrics['epoch']:04d}")


class Progress:
    """Sentences for the driver's log: one an epoch, and one now and then between. Silent without a channel."""

    def __init__(self, news: Queue | None, num_epochs: int, steps_per_epoch: int) -> None:
        self.news = news
        self.num_epochs = num_epochs
        self.steps_per_epoch = steps_per_epoch
        self._told = time.monotonic()

    def step(self, epoch: int, losses: list[float]) -> None:
        """Say how far the epoch is, at most every PROGRESS_S seconds."""
        if self.news is not None and time.monotonic() - self._told > PROGRESS_S:
            recent = losses[-20:]
            self._tell(
                f"epoch {epoch + 1}/{self.num_epochs}  step {len(losses)}/{self.steps_per_epoch}  "
                f"loss {sum(recent) / len(recent):.4f}"
            )

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Say how the epoch ended."""
        levels = "  ".join(f"{name} {value:.4f}" for name, value in metrics["val_iou"].items())
        self._tell(
            f"epoch {metrics['epoch'] + 1}/{self.num_epochs}  loss {metrics['loss']:.4f}  val IoU {levels}  "
            f"{metrics['seconds']:.0f} s"
        )

    def _tell(self, sentence: str) -> None:
        self._told = time.monotonic()
        if self.news is not None:
            self.news.put(sentence)


def _export(
    config: TrainConfig, labelled: LabelledSet, checkpoint: Checkpoint, metrics: dict[str, Any], model_uri: str
) -> str:
    """Write the averaged weights of a checkpoint as a model folder; returns its digest."""
    model = UNetPlusPlus(config.model)
    average = AveragedModel(model, use_buffers=True)
    with checkpoint.as_directory() as checkpoint_dir:
        saved = torch.load(Path(checkpoint_dir) / STATE, map_location="cpu", weights_only=True)
    average.load_state_dict(saved["average"])
    exported = average.module.eval()
    training = {
        "config": config.model_dump(mode="json", exclude={"model", "result"}),
        "data_fingerprint": labelled.fingerprint,
        "num_training_images": len(labelled.split(config.train_split)),
        "epoch": metrics["epoch"],
        "val_iou": metrics["val_iou"],
    }
    with tempfile.TemporaryDirectory() as model_dir:
        save_pretrained(exported, model_dir, Pretrained(model=config.model, training=training))
        storage.upload_folder(model_dir, model_uri, last="config.json")
    return digest(exported)


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("train")
