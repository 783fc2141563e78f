"""The private Ray of a job: it takes no more than the job was given."""

import os

import pytest

from jobs.cluster import local_ray
from tests.fresh import in_a_fresh_process


def a_private_ray_has_the_cpus_of_its_process() -> None:
    import ray

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with local_ray(1):
        assert ray.cluster_resources()["CPU"] == 1


def test_a_private_ray_has_the_cpus_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    in_a_fresh_process(a_private_ray_has_the_cpus_of_its_process)
