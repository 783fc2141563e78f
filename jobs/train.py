"""Train a UNet++ with deep supervision on Ray Train: `unetpp train --config F`.

A run is named after the fingerprints of its config and its data: the same call resumes it, a changed one starts anew.

```
<output>/<name>-<fingerprint>/checkpoints/   best and last epochs, see jobs.checkpoints
<output>/<name>-<fingerprint>/records/       log.txt, epochs.csv, and events for TensorBoard
<output>/<name>-<fingerprint>/model/         the best epoch, exported
<output>/<name>-<fingerprint>/result.json    written last
```
"""

import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence

import ray
import ray.train
from ray.data import Dataset
from ray.exceptions import RayTaskError
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig, RunConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from jobs import checkpoints, models, storage
from jobs.calibrate import calibrate
from jobs.checkpoints import EpochMetrics
from jobs.cluster import is_cluster, local_ray
from jobs.config_file import write_command
from jobs.contract import TrainConfig, TrainResult, fingerprint
from jobs.dataset import CropSampler, LabelledImage, load, open_labelled_set
from jobs.labelled import LabelledSet
from jobs.provenance import training_data
from jobs.stream import STREAM, crop_stream
from jobs.train_records import followed
from jobs.train_worker import is_over, train_worker
from jobs.training import trained_network
from unetpp.allocator import KEEP_FREED
from unetpp.checkpoint import Pretrained, digest, from_pretrained, save_pretrained
from unetpp.config import ModelConfig
from unetpp.devices import has_gpu
from unetpp.errors import ConfigError, ModelError, StorageError, UnetppError

logger = logging.getLogger(__name__)

MAX_MINUTES_WITHOUT_ROOM = 15
"""Ray Train waits a minute for its workers, then counts a failure and asks again."""
MAX_WORKER_FAILURES = 3
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For processes that make crops side by side: of 256 px, numpy's eight threads took up to 4 times the CPU time."""
NEVER_RETRIED = (ConfigError, ModelError)


class GiveUp(UserCallback):
    """Ends a training at the first error of a worker that every worker would meet again.

    Ray Train starts its workers anew after whatever they raise; what its controller meets itself it raises.
    """

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller."""
        for error in worker_exceptions.values():
            if isinstance(error, NEVER_RETRIED):
                raise error


def run(config: TrainConfig) -> TrainResult:
    """Train, resume, or return the result of the finished run. ConfigError for data that cannot be trained on."""
    labelled = open_labelled_set(storage.canonical(config.data), config.split_column)
    said: dict[str, object] = {"config": config.run_fingerprint(), "data": labelled.fingerprint}
    if config.init is not None:
        initial = from_pretrained(models.fetch_model(config.init))
        said["init"] = digest(initial)  # a place may hold other weights by now
        tell_other_reading(config.model, initial.config)
    name = f"{config.name}-{fingerprint(said)[:10]}"
    run_uri = storage.join(config.output, name)
    result_uri = storage.join(run_uri, "result.json")
    if storage.exists(result_uri) and models.is_there(storage.join(run_uri, "model")):
        logger.info("%s is trained already: nothing to do", name)
        return TrainResult.model_validate_json(storage.read_bytes(result_uri))

    started = time.monotonic()
    samples = labelled.split(config.train_split)
    train = None if config.cache == "stream" else _load(config, labelled, config.train_split)
    val = _load(config, labelled, config.val_split)
    if train is not None:
        CropSampler(train, config)  # refuses groups that do not fit before anything is started
    steps_per_epoch = config.steps_per_epoch or max(1, len(samples) // config.batch_size)
    logger.info(
        "%s: %d training and %d validation images, %d steps",
        name,
        len(samples),
        len(val),
        config.epochs * steps_per_epoch,
    )
    with local_ray(config.worker_bounds[0] * (config.threads_per_worker or 1) + _num_readers(config)):
        place = storage.canonical(run_uri)  # workers are in folders of their own
        stream = crop_stream(samples, config, steps_per_epoch, place) if train is None else None
        _fit(config, place, train, stream, val, steps_per_epoch)
    model_uri = storage.join(run_uri, "model")
    best, model_digest = _export(config, labelled, val, run_uri, model_uri)
    last = checkpoints.complete(run_uri)[0].metrics
    result = TrainResult(
        run=name,
        model_uri=model_uri,
        digest=model_digest,
        epochs=last.epoch + 1,
        steps=last.step,
        best_epoch=best.epoch,
        val_iou={int(level[1:]): value for level, value in best.val_iou.items() if level != "accurate"},
        seconds=time.monotonic() - started,
    )
    storage.write_bytes(result_uri, result.model_dump_json(indent=2).encode())
    return result


def tell_other_reading(ours: ModelConfig, theirs: ModelConfig) -> None:
    """Warn where the model to start from read its images otherwise than this config does: that is for other images."""
    for name in ("value_range", "bands"):
        if getattr(theirs, name) != getattr(ours, name):
            logger.warning(
                "init: the model to start from was trained with %s %s, this config has %s: right for images that "
                "differ as much, else set model.%s to the former",
                name,
                getattr(theirs, name),
                getattr(ours, name),
                name,
            )


def _load(config: TrainConfig, labelled: LabelledSet, split: str) -> Sequence[LabelledImage]:
    cache = "auto" if config.cache == "stream" else config.cache
    return load(labelled.split(split), config.model, cache=cache, fingerprint=labelled.fingerprint)


def _num_readers(config: TrainConfig) -> int:
    """CPUs that are left to what reads the images, where they are streamed."""
    return 2 if config.cache == "stream" else 0  # one lists what is to be cut, one cuts


def _uses_gpu(config: TrainConfig) -> bool:
    """What device auto means. Ray finds GPUs by their driver: on this machine torch must be made for them, too."""
    if config.device != "auto":
        return config.device == "cuda"
    return ray.cluster_resources().get("GPU", 0) >= 1 and (is_cluster() or has_gpu())


def _threads(config: TrainConfig, use_gpu: bool) -> int:
    """CPU threads of a worker, which make crops where it has a GPU: what was asked for, else its share of a node.

    That is the largest node that there is, of those with a GPU where one is used. ConfigError where none has so many
    CPUs as were asked for.
    """
    if use_gpu and config.cache == "stream":
        return 1  # Ray Data makes the crops, with what is left of the CPUs
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fewest, most = config.worker_bounds
    if use_gpu:
        nodes = [has for has in nodes if has.get("GPU", 0) >= 1]
        most = min(most, max(fewest, int(sum(has["GPU"] for has in nodes))))
    cpus = [int(has.get("CPU", 0)) for has in nodes]
    largest, num_nodes = max(cpus, default=0), max(1, sum(number > 0 for number in cpus))
    if config.threads_per_worker is None:
        return max(1, (largest - _num_readers(config)) // math.ceil(most / num_nodes))
    if 0 < largest < config.threads_per_worker:
        raise ConfigError(
            f"threads_per_worker {config.threads_per_worker} is more than the {largest} CPUs of the largest node; "
            "ask for fewer"
        )
    return config.threads_per_worker


def look_for_room(num_workers: int, of_each: Mapping[str, int]) -> None:
    """Say at once of what Ray has less than these workers need. ConfigError on one machine; a cluster may yet grow."""
    there = ray.cluster_resources()
    for name, number in of_each.items():
        if num_workers * number <= (has := int(there.get(name, 0))):
            continue
        place = "the cluster" if is_cluster() else "this machine"
        sentence = (
            f"num_workers asks for at least {num_workers} with {number} {name} each, {place} has {has} {name}; "
            f"ask for fewer{', or set device to cpu' if name == 'GPU' else ''}"
        )
        if not is_cluster():
            raise ConfigError(sentence)
        logger.warning("%s; waiting %d minutes for it to grow", sentence, MAX_MINUTES_WITHOUT_ROOM)


def _fit(
    config: TrainConfig,
    run_uri: str,
    train: Sequence[LabelledImage] | None,
    stream: Dataset | None,
    val: Sequence[LabelledImage],
    steps_per_epoch: int,
) -> None:
    """Train to the end of the run, through the deaths of workers; the checkpoints are the result."""
    found = checkpoints.newest(run_uri)
    if is_over(config, found[0].history if found else ()):
        return
    use_gpu = _uses_gpu(config)
    with storage.arrow(run_uri) as (filesystem, storage_path):
        pass
    threads = _threads(config, use_gpu)
    fewest, most = config.worker_bounds
    of_each = {"CPU": threads, "GPU": 1} if use_gpu else {"CPU": threads}
    look_for_room(fewest, of_each)
    trainer = TorchTrainer(
        train_worker,
        # The images are decoded once, and shared by the workers of a node through the object store.
        train_loop_config={
            "config": config,
            "run_uri": run_uri,
            "init": config.init and models.canonical(config.init),
            "train": None if train is None else ray.put(train),
            "val": ray.put(val),
            "steps_per_epoch": steps_per_epoch,
            "threads": threads,
        },
        datasets=None if stream is None else {STREAM: stream},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=of_each,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]
            name="ray",
            # Ray calls train_worker in a thread of its own, where it is too late to tell the allocator, or numpy.
            worker_runtime_env={"env_vars": ONE_THREAD if use_gpu else KEEP_FREED},
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=MAX_WORKER_FAILURES, controller_failure_limit=MAX_MINUTES_WITHOUT_ROOM
            ),
            callbacks=[GiveUp()],
        ),
    )
    try:
        with followed(run_uri):
            trainer.fit()
    except WorkerGroupError as error:
        ours = [cause for cause in error.worker_failures.values() if isinstance(cause, UnetppError)]
        if ours:
            raise ours[0] from None
        raise
    except ControllerError as error:
        if isinstance(error.controller_failure, NEVER_RETRIED):
            raise error.controller_failure from None
        raise UnetppError(_without_workers(error.controller_failure, fewest, of_each)) from error


def _without_workers(error: Exception, num_workers: int, of_each: Mapping[str, int]) -> str:
    """The sentence for what Ray Train met itself, not in a worker."""
    if not isinstance(error, WorkerGroupStartupTimeoutError):
        cause = error.cause if isinstance(error, RayTaskError) else error
        return f"Ray Train gave up ({type(cause).__name__}: {cause}); once that is mended, the same command goes on"
    each = " and ".join(f"{number} {name}" for name, number in of_each.items())
    return (
        f"the workers could not start within {MAX_MINUTES_WITHOUT_ROOM} minutes: wanted {num_workers} with {each} each "
        f"({error}); make room for them in the cluster, or ask for less, then the same command goes on from here"
    )


def _export(
    config: TrainConfig, labelled: LabelledSet, val: Sequence[LabelledImage], run_uri: str, model_uri: str
) -> tuple[EpochMetrics, str]:
    """Write the averaged weights of the best epoch, calibrated, as a model folder; that epoch, and its digest."""
    found = checkpoints.best(run_uri)
    if found is None:
        raise StorageError(f"{run_uri} has no checkpoint that is whole: say the same command again to train it anew")
    checkpoint, content = found
    model, calibration = calibrate(trained_network(config.model, content), val, seed=config.seed)
    training = {
        "command": write_command("train", config.model_copy(update={"result": None})),
        "seed": config.seed,
        "config": config.model_dump(mode="json", exclude={"model", "result"}),
        "epoch": checkpoint.epoch,
        "val_iou": checkpoint.metrics.val_iou,
        "environment": checkpoint.environment,
    }
    binary = config.model.num_classes == 1
    classes = ("foreground",) if binary else (f"class {number}" for number in range(1, config.model.num_classes))
    pretrained = Pretrained(
        model=model.config,
        classes=("background", *classes),
        training=training,
        calibration=calibration,
        data=training_data(labelled, (config.train_split, config.val_split), config.data_licence),
        licence=config.licence,
        intended_use=config.intended_use,
    )
    with tempfile.TemporaryDirectory() as model_dir:
        save_pretrained(model, model_dir, pretrained)
        storage.upload_folder(model_dir, model_uri, last="config.json")
    return checkpoint.metrics, digest(model)


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("train")
