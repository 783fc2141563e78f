"""How many actors a run gets, and what each of them holds, for machines that are not at hand."""

from typing import Any

import pytest

from jobs import backends
from jobs.contract import PredictConfig
from jobs.manifest import Shard
from unetpp.config import ModelConfig


class FakeRay:
    """Nodes of so many CPUs and GPUs, and the pools that are asked for."""

    def __init__(self, *nodes: tuple[int, int]) -> None:
        self._nodes = [{"CPU": cpus, **({"GPU": gpus} if gpus else {})} for cpus, gpus in nodes]
        self.data = self

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self._nodes] + [{"Alive": False, "Resources": {}}]

    def cluster_resources(self) -> dict[str, int]:
        return {name: sum(node.get(name, 0) for node in self._nodes) for name in ("CPU", "GPU")}

    def ActorPoolStrategy(self, **how: int) -> dict[str, int]:
        return how


def pool(*nodes: tuple[int, int], **settings: Any) -> tuple[Any, Any]:
    """The size of the pool at its start, or where it is fixed, and what an actor holds."""
    config = PredictConfig(model="m", input=("i",), output="o", **settings)
    sizes, per_actor = backends._pool(FakeRay(*nodes), 1000, config, config.threads or 1)
    return sizes.get("initial_size", sizes.get("size")), per_actor


@pytest.mark.parametrize(
    ("nodes", "settings", "size", "cpus", "gpus"),
    [
        (((8, 0),), {}, 8, 1, None),
        (((8, 0),), {"workers_per_gpu": 3}, 8, 1, None),
        (((16, 1),), {}, 4, 1, 0.25),
        (((3, 1),), {}, 3, 1, 0.3333),
        (((16, 8),), {}, 16, 1, 0.5),
        (((16, 1),), {"threads": 8}, 2, 8, 0.5),
        (((4, 8),), {}, 8, 1, 1),
        (((4, 2), (64, 0), (16, 1)), {}, 6, 1, 0.5),
        (((16, 2),), {"num_workers": 3}, 3, 1, 0.25),
        (((16, 2),), {"workers_per_gpu": 1}, 2, 1, 1),
        (((16, 1),), {"workers_per_gpu": 7}, 7, 1, 0.1428),
        (((2, 2),), {"topology": "split"}, 8, 0, 0.25),
        (((2, 2),), {"topology": "split", "workers_per_gpu": 1}, 2, 0, 1),
    ],
)
def test_a_gpu_is_shared_by_as_many_actors_as_its_cpus_carry(
    nodes: Any, settings: dict[str, Any], size: int, cpus: int, gpus: float | None
) -> None:
    seen, per_actor = pool(*nodes, **settings)
    assert (seen, per_actor["num_cpus"], per_actor.get("num_gpus")) == (size, cpus, gpus)


def test_as_many_actors_as_share_a_gpu_fit_into_it() -> None:
    for sharing in range(1, 65):
        _, per_actor = pool((64, 1), workers_per_gpu=sharing)
        units = round(per_actor["num_gpus"] * 10_000)
        assert units / 10_000 == per_actor["num_gpus"]
        assert units * sharing <= 10_000 < units * (sharing + 1)


@pytest.mark.parametrize(("engine", "gib", "hours"), [("openvino", 0, 2), ("openvino", 6, 24), ("compiled", 6, 6)])
def test_a_run_is_not_given_up_while_a_shard_of_a_huge_archive_is_predicted(
    engine: Any, gib: int, hours: float
) -> None:
    config = PredictConfig(model="m", input=("i",), output="o", engine=engine)
    shards = [Shard(0, 0, 1, 1000), Shard(1, 1, 2, gib << 30)]
    assert backends._silent_s(config, ModelConfig(), shards) / 3600 > hours
    assert backends._silent_s(config.model_copy(update={"stall_s": 0}), ModelConfig(), shards) == 0
    small = backends._silent_s(config, ModelConfig(), shards[:1])
    assert small == pytest.approx(backends.SILENT_STALLS * config.stall_s, rel=0.01)
