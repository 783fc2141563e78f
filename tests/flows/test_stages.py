"""What a flow makes of the ends that a job can have."""

import flows.embedded  # noqa: F401  before Prefect is imported

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows import publish, ray_jobs, stages
from flows.config import FlowOptions, TrainFlowConfig
from flows.outcome import TrainOutcome
from flows.ray_jobs import JobStatus
from flows.train import make_model
from jobs import storage
from jobs.contract import GcConfig, GcResult
from tests.flows.test_ray_jobs import RUNNING, STOPPED, SUCCEEDED, Cluster
from unetpp.errors import JobError

SPEC: dict[str, object] = {"what": "a job"}
NAME = ray_jobs.submission_id("gc", None, SPEC)


class Working(Cluster):
    """A job that is started there succeeds, and leaves its result."""

    def __init__(self, root: Path, states: list[JobStatus | Exception | None]) -> None:
        super().__init__()
        self.root, self.jobs[NAME] = root, states

    def submit(self, submission_id: str, command: str, metadata: dict[str, str]) -> bool:
        super().submit(submission_id, command, metadata)
        self.jobs[submission_id] = [RUNNING, SUCCEEDED]
        result = GcResult(output_uri=str(self.root), objects={}, size_bytes=0, deleted=False)
        uri = storage.join(str(self.root), "results", f"{NAME}.json")
        storage.write_bytes(uri, result.model_dump_json().encode())
        return True


@pytest.fixture
def once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function: have a job done whose name is known to a cluster in these states; the cluster."""
    monkeypatch.setattr(ray_jobs, "POLL_S", 0.001)
    monkeypatch.setattr(publish, "create_markdown_artifact", lambda *_, **__: None)

    def have_done(*states: JobStatus) -> Working:
        cluster = Working(tmp_path, list(states))
        monkeypatch.setattr(stages, "backend_of", lambda place: cluster)
        job = GcConfig(output=str(tmp_path))
        stages._once(FlowOptions(), "gc", SPEC, job, GcResult, str(tmp_path), lambda _: True, time.monotonic() + 60)
        return cluster

    return have_done


def test_a_job_that_was_being_stopped_when_we_came_is_started_again(once) -> None:
    cluster = once(RUNNING, RUNNING, STOPPED)
    assert cluster.submitted == [f"{NAME}-a1"]


def test_a_job_that_is_stopped_while_we_follow_ends_the_flow(once, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "STOP_S", 0.0)
    with pytest.raises(JobError, match="it was stopped; the next start goes on from there"):
        once(RUNNING, RUNNING, STOPPED)


def test_a_model_that_could_not_be_quantised_shows_its_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise JobError("unetpp-quantise", 20, "int8 wants openvino")

    shown: list[TrainOutcome] = []
    for stage in ("labelled_fingerprint", "train_stage", "evaluate_stage", "prune_stage"):
        monkeypatch.setattr(stages, stage, lambda *_: SimpleNamespace(model_uri="m", digest="d"))
    monkeypatch.setattr(stages, "gate_stage", lambda *_: "it replaces the current model")
    monkeypatch.setattr(stages, "quantise_stage", fail)
    monkeypatch.setattr("flows.train.TrainOutcome", TrainOutcome.model_construct)
    monkeypatch.setattr(publish, "publish_levels", shown.append)
    with pytest.raises(JobError, match="openvino"):
        make_model(TrainFlowConfig(data="d", models="m", work="w", quantise=True), time.monotonic() + 60)
    assert [(outcome.gate, outcome.quantised) for outcome in shown] == [("it replaces the current model", None)]
