"""Ways to take the shards of a run through `jobs.worker.Worker`: in this process, or on Ray."""

import logging
from collections.abc import Generator, Sequence
from typing import Any

from jobs import forecast, hints, split
from jobs.answers import Row, answer, footer_of, row_of, shard_of
from jobs.cluster import is_cluster, local_ray
from jobs.contract import PredictConfig
from jobs.manifest import Shard
from jobs.planning import PIXELS_A_BYTE
from jobs.progress import Drain, draining
from jobs.shard import Task
from jobs.sink import Footer
from jobs.worker import Worker
from unetpp.config import ModelConfig
from unetpp.devices import cpu_flags, has_gpu
from unetpp.engine_names import EngineName, auto_engines
from unetpp.errors import ConfigError, UnetppError
from unetpp.predictor import Predictor

START_S = 900
"""How long the first workers may take to start: longer than a node takes to come."""
MAX_PER_GPU = 4
"""Actors that share a GPU unless told otherwise."""
SILENT_STALLS = 4
"""A run without a commit for so many stall_s, and as often what its largest shard may take, is given up: longer than
the three tries of a shard that hangs."""

logger = logging.getLogger(__name__)


def auto_engines_of(config: PredictConfig) -> tuple[EngineName, ...]:
    """What engine `auto` may mean where the work is done, the fastest first.

    Nodes of a cluster may have other CPUs than this one.
    """
    if config.backend == "ray" and is_cluster():
        with local_ray(1):
            import ray

            return auto_engines(on_gpu=ray.cluster_resources().get("GPU", 0) > 0, cpu_flags=())
    return auto_engines(on_gpu=has_gpu(), cpu_flags=cpu_flags())


def inline(task: Task, shards: Sequence[Shard], predictor: Predictor, drain: Drain) -> Generator[Footer]:
    """One shard after the other in this process, with the model that is loaded already; fewer when told to drain."""
    with Worker(task, predictor) as worker, draining(drain, task.config.drain_s):
        for shard in shards:
            if drain.is_asked or (footer := worker(shard)) is None:
                return
            yield footer


def on_ray(task: Task, shards: Sequence[Shard], drain: Drain) -> Generator[Footer]:
    """Shards on a pool of actors, footers as they come. One block a shard: Ray's task, retry and commit are one thing.

    What a worker refuses to go on with (StorageError, ...) comes back as data and is raised here. Ray restarts a worker
    that dies, always; shards count how many they end. When told to drain, those that are not begun come to nothing.
    """
    num_cpus, num_workers = task.threads or 1, task.config.num_workers

    def tell_workers() -> None:
        hints.stop(task.hints_uri, task.call)

    with (
        local_ray(num_cpus * (num_workers or 1) + (task.config.topology == "split")),
        draining(drain, task.config.drain_s, tell_workers),
    ):
        import ray.data
        import ray.exceptions
        from ray.data.exceptions import ExecutionTimeoutError

        compute, per_actor = _pool(ray, len(shards), task.config, num_cpus)
        silent_s = _silent_s(task.config, task.network, shards)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.wait_for_min_actors_s = START_S
        context.execution_no_progress_timeout_s = silent_s or -1
        rows = ray.data.from_items([row_of(shard) for shard in shards], override_num_blocks=len(shards))
        if task.config.topology == "split":
            found = split.answers(rows, task, compute, per_actor, _labels(task.config))
        else:
            actor: Any = ShardActor
            of_actor = (task, per_actor.get("num_gpus", 1.0))
            found = rows.map(actor, fn_constructor_args=of_actor, compute=compute, **per_actor)
        try:
            # Not iter_rows, which reads one block ahead: it holds each footer back until the next one comes.
            answers: Any
            for answers in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in answers.to_pylist():
                    if (footer := footer_of(row)) is not None:
                        yield footer
        except ray.exceptions.GetTimeoutError as error:
            wanted = ", ".join(f"{name} {value}" for name, value in per_actor.items())
            raise UnetppError(
                f"no worker of run {task.run} could start within {START_S} s: the cluster has no room for one with "
                f"{wanted}; make some, then the same command goes on from here"
            ) from error
        except ExecutionTimeoutError as error:
            raise UnetppError(
                f"nothing of run {task.run} was committed for {silent_s:.0f} s ({SILENT_STALLS} x stall_s, and what "
                "its largest shard may take): the cluster lost its workers, or a shard takes longer; "
                "the same command goes on from here, with --stall-s for more patience"
            ) from error
        except ray.exceptions.RayError as error:
            raise UnetppError(
                f"Ray gave up on run {task.run} ({type(error).__name__}: {str(error).splitlines()[0]}); "
                "the same command goes on from here"
            ) from error
        finally:
            for word in hints.words(task.hints_uri):
                logger.warning("%s", word)


def _silent_s(config: PredictConfig, network: ModelConfig, shards: Sequence[Shard]) -> float:
    """How long a run may be without a commit; 0: for ever.

    A shard of a compressed tar is a share of it, however large that is; its last try is on one thread of a CPU.
    """
    if not config.stall_s:
        return 0.0
    pixels = PIXELS_A_BYTE * max(shard.size_bytes for shard in shards)
    each_s = config.stall_s + forecast.seconds_of_a_worker(config, network, pixels)
    return SILENT_STALLS * each_s + forecast.seconds_of_a_thread(config, network, pixels)


def _pool(ray: Any, num_shards: int, config: PredictConfig, num_cpus: int) -> tuple[Any, dict[str, Any]]:
    """Actors and what each holds: a share of a GPU where there are GPUs, else as many as the CPUs carry.

    Unless `num_workers` fixes it, their number follows the nodes that come and go. In topology split a CPU stays free
    for what reads and writes, and a GPU's actors hold none.
    """
    resources = ray.cluster_resources()
    num_gpus, available_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    is_split = config.topology == "split"
    if num_cpus + is_split * (not num_gpus) > available_cpus and not is_cluster():
        raise ConfigError(f"threads {num_cpus} is more than the {available_cpus} CPUs that Ray has; ask for fewer")
    # a cluster without nodes may well bring some when asked
    per_gpu = _per_gpu(ray, config, num_cpus) if num_gpus else 1
    room = num_gpus * per_gpu or max(1, (available_cpus - is_split) // num_cpus)
    size = max(1, min(num_shards, room, config.num_workers or room))
    per_actor: dict[str, Any] = {"num_cpus": 0 if num_gpus and is_split else num_cpus, **_labels(config)}
    if num_gpus:
        per_actor["num_gpus"] = 10_000 // per_gpu / 10_000  # Ray counts to four decimals: three thirds are to fit
    if config.num_workers is not None:
        return ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2), per_actor
    initial = 1 if config.node_labels else size  # how many of the nodes have them is not known
    # What reads and writes takes no room from engines: these would grow until nothing was left for it.
    sizes = {"min_size": 1, "initial_size": initial, "max_size": size if is_split else num_shards}
    return ray.data.ActorPoolStrategy(**sizes, max_tasks_in_flight_per_actor=2), per_actor


def _per_gpu(ray: Any, config: PredictConfig, num_cpus: int) -> int:
    """Actors that share a GPU: one decodes less than a GPU predicts. As many as the scarcest node's CPUs carry."""
    if config.workers_per_gpu is not None:
        return config.workers_per_gpu
    if config.topology == "split":
        return MAX_PER_GPU
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    carried = min((node.get("CPU", 0) / node["GPU"] / num_cpus for node in nodes), default=1)
    return max(1, min(MAX_PER_GPU, int(carried)))


def _labels(config: PredictConfig) -> dict[str, Any]:
    """Where Ray is to place what it starts."""
    if not config.node_labels:
        return {}
    return {"label_selector": dict(label.split("=", 1) for label in config.node_labels)}


class ShardActor:
    """A Worker in an actor of Ray."""

    def __init__(self, task: Task, gpu_share: float) -> None:
        self._worker = Worker(task, gpu_share=gpu_share)

    def __call__(self, row: Row) -> Row:
        """One shard, and what became of it."""
        try:
            return answer(self._worker(shard_of(row)))
        except UnetppError as error:
            return answer(error)
