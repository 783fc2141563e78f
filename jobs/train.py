"""Train a UNet++ with deep supervision on Ray Train: `unetpp train --config F`.

A run is named after the fingerprints of its config and its data: the same call resumes it, a changed one starts anew.

```
<output>/<name>-<fingerprint>/checkpoints/   Ray Train's: best and last epochs, resumed by name
<output>/<name>-<fingerprint>/model/         the best epoch, exported
<output>/<name>-<fingerprint>/result.json    written last
```
"""

import logging
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util.queue import Queue
from torch.optim.swa_utils import AveragedModel

from jobs import storage
from jobs.cluster import local_ray
from jobs.config_file import write_command
from jobs.contract import TrainConfig, TrainResult, fingerprint
from jobs.dataset import CropSampler, LabelledImage, load, open_labelled_set
from jobs.labelled import LabelledSet
from jobs.training import Progress, TrainingState, logged
from unetpp.checkpoint import Pretrained, digest, save_pretrained
from unetpp.engines import keep_freed_memory
from unetpp.errors import ConfigError, UnetppError
from unetpp.metrics import confusion_counts, iou
from unetpp.model import UNetPlusPlus
from unetpp.predictor import masks_by_level

logger = logging.getLogger(__name__)

STATE = "state.pt"
MAX_MINUTES_WITHOUT_ROOM = 15
"""Ray Train waits a minute for its workers, then counts a failure and asks again."""
MAX_WORKER_FAILURES = 3


def run(config: TrainConfig) -> TrainResult:
    """Train, resume, or return the result of the finished run. ConfigError for data that cannot be trained on."""
    labelled = open_labelled_set(config.data, config.split_column)
    name = f"{config.name}-{fingerprint({'config': config.run_fingerprint(), 'data': labelled.fingerprint})[:10]}"
    run_uri = storage.join(config.output, name)
    result_uri = storage.join(run_uri, "result.json")
    if storage.exists(result_uri):
        logger.info("%s is trained already: nothing to do", name)
        return TrainResult.model_validate_json(storage.read_bytes(result_uri))

    started = time.monotonic()
    train, val = (
        load(labelled.split(split), config.model, cache=config.cache, fingerprint=labelled.fingerprint)
        for split in (config.train_split, config.val_split)
    )
    CropSampler(train, config)  # refuses groups that do not fit before anything is started
    steps_per_epoch = config.steps_per_epoch or max(1, len(train) // config.batch_size)
    logger.info(
        "%s: %d training and %d validation images, %d steps",
        name,
        len(train),
        len(val),
        config.epochs * steps_per_epoch,
    )
    with local_ray(num_cpus=config.num_workers * (config.threads_per_worker or 1)):
        fitted = _fit(config, run_uri, train, val, steps_per_epoch)
        model_uri = storage.join(run_uri, "model")
        best_checkpoint, best = max(fitted.best_checkpoints or (), key=lambda pair: pair[1]["val_mean_iou"])
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
    """CPU threads of a worker: what was asked for, else its share of the largest node there is.

    ConfigError where no node has so many CPUs as were asked for.
    """
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    largest, num_nodes = max(cpus, default=0), max(1, sum(number > 0 for number in cpus))
    if config.threads_per_worker is None:
        return max(1, largest // math.ceil(config.num_workers / num_nodes))
    if 0 < largest < config.threads_per_worker:
        raise ConfigError(
            f"threads_per_worker {config.threads_per_worker} is more than the {largest} CPUs of the largest node; "
            "ask for fewer"
        )
    return config.threads_per_worker


def _fit(
    config: TrainConfig,
    run_uri: str,
    train: Sequence[LabelledImage],
    val: Sequence[LabelledImage],
    steps_per_epoch: int,
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
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1 if use_gpu else _threads(config)},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=MAX_WORKER_FAILURES, controller_failure_limit=MAX_MINUTES_WITHOUT_ROOM
            ),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep_checkpoints,
                checkpoint_score_attribute="val_mean_iou",
                checkpoint_score_order="max",
            ),
        ),
    )
    try:
        with logged(news):
            return trainer.fit()
    except WorkerGroupError as error:
        ours = [cause for cause in error.worker_failures.values() if isinstance(cause, UnetppError)]
        if ours:
            raise ours[0] from None
        raise
    except ControllerError as error:
        raise UnetppError(
            f"the workers could not start within {MAX_MINUTES_WITHOUT_ROOM} minutes: wanted {config.num_workers} with "
            f"{trainer.scaling_config.resources_per_worker} each ({error}); make room for them in the cluster, or ask "
            "for less, then the same command goes on from here"
        ) from error


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
        val_iou = _validate(state.averaged, val[rank::world_size], len(val), world_size)
        metrics = {
            "epoch": epoch,
            "loss": sum(losses) / len(losses),
            "val_iou": val_iou,
            "val_mean_iou": sum(val_iou.values()) / len(val_iou),
            "seconds": time.monotonic() - started,
        }
        progress.epoch(metrics)
        _report(state, metrics, rank)


def _validate(
    model: UNetPlusPlus, images: Sequence[LabelledImage], num_images: int, world_size: int
) -> dict[str, float]:
    """Mean per-image IoU of every level and of accurate mode, over the images of all workers."""
    model.eval()
    names = [f"L{level}" for level in model.config.head_levels]
    names += ["accurate"] if len(names) > 1 else []
    sums = torch.zeros(len(names), dtype=torch.float64)
    for image in images:
        masks = masks_by_level(model, image.image_HWC)
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


def _export(
    config: TrainConfig, labelled: LabelledSet, checkpoint: Checkpoint, metrics: dict[str, Any], model_uri: str
) -> str:
    """Write the averaged weights of a checkpoint as a model folder; returns its digest."""
    model = UNetPlusPlus(config.model)
    average = AveragedModel(model, use_buffers=True)
    with checkpoint.as_directory() as checkpoint_dir:
        saved = torch.load(Path(checkpoint_dir) / STATE, map_location="cpu", weights_only=True)
    average.load_state_dict(saved["average"])
    model.load_state_dict(average.module.state_dict())
    model.eval()
    training = {
        "command": write_command("train", config.model_copy(update={"result": None})),
        "seed": config.seed,
        "config": config.model_dump(mode="json", exclude={"model", "result"}),
        "data_fingerprint": labelled.fingerprint,
        "num_training_images": len(labelled.split(config.train_split)),
        "epoch": metrics["epoch"],
        "val_iou": metrics["val_iou"],
    }
    with tempfile.TemporaryDirectory() as model_dir:
        save_pretrained(model, model_dir, Pretrained(model=config.model, training=training))
        storage.upload_folder(model_dir, model_uri, last="config.json")
    return digest(model)


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("train")
