"""What a cancelled flow run does about its jobs."""

import flows.embedded  # noqa: F401  before Prefect is imported

import time
from types import SimpleNamespace

import pytest

from flows import hooks
from flows.ray_jobs import JobStatus, State
from tests.flows.test_ray_jobs import RUNNING, STOPPED, SUCCEEDED, Stubborn
from unetpp.errors import TransientError


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch):
    """Function: cancel the flow run that follows the jobs of a cluster."""

    def cancel(cluster: Stubborn) -> None:
        monkeypatch.setattr(hooks, "backend_of", lambda place: cluster)
        monkeypatch.setattr(hooks, "_followed", lambda flow_run_id: sorted(cluster.jobs))
        monkeypatch.setattr(hooks, "_followers", lambda name: {"7"})
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        hooks.stop_jobs(None, SimpleNamespace(id="7", parameters={"config": {}}), None)

    return cancel


def test_a_cancelled_run_tells_its_job_to_stop_until_the_cluster_answers(cancelled, caplog) -> None:
    caplog.set_level("INFO")
    silence = TransientError("the Ray cluster answers 502")
    cluster = Stubborn(predict=[silence, silence, RUNNING, silence, STOPPED], train=[SUCCEEDED])
    cluster.num_lost = 2
    cancelled(cluster)
    assert cluster.stopped == ["predict"] * 3
    assert "predict: it was stopped" in caplog.text
    assert "train: it ended by itself" in caplog.text


def test_a_cancelled_run_that_has_named_no_job_says_so(cancelled, caplog) -> None:
    caplog.set_level("INFO")
    cancelled(Stubborn())
    assert "named no job; should one run all the same, stop it by hand" in caplog.text


def test_where_prefect_cannot_be_asked_nobody_else_follows(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def away(name: str) -> set[str]:
        raise OSError("the server is away")

    monkeypatch.setattr(hooks, "_followers", away)
    assert hooks.others_following("predict") == set()
    assert "who else follows predict is not known" in caplog.text
    monkeypatch.setattr(hooks, "_followers", lambda name: {"7", "None"})
    assert hooks.others_following("predict") == {"7"}


def test_a_silent_cluster_does_not_hold_a_cancelled_run(cancelled, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("flows.ray_jobs.STOP_S", 0.0)
    silence = TransientError("the Ray cluster answers 502")
    cluster = Stubborn(evaluate=[silence], predict=[JobStatus(State.RUNNING), STOPPED])
    cancelled(cluster)
    assert "evaluate: the cluster did not say whether it stopped, so it may run on" in caplog.text
    assert cluster.stopped == ["predict"]
