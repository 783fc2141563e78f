"""What happens to a job when its flow run ends early. Cancelled: the job is stopped. Crashed: it goes on.

Prefect calls hooks in whatever process is left, with nothing but the flow run: its artifacts name the jobs.
"""

import logging
import time
from typing import Any

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType

from flows import ray_jobs
from flows.backends import backend_of
from flows.publish import JOB_ARTIFACT

logger = logging.getLogger(__name__)


def stop_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """On cancellation: stop the jobs that the flow run follows and let them drain, for `STOP_S` in all."""
    deadline = time.monotonic() + ray_jobs.STOP_S
    try:
        place = (flow_run.parameters.get("config") or {}).get("jobs", "auto")
        backend = backend_of(place)
        if not (followed := _followed(flow_run.id)):
            logger.info("this flow run has named no job; should one run all the same, stop it by hand")
        for name in followed:
            if others := _followers(name) - {str(flow_run.id)}:
                logger.info("%s goes on: flow run %s follows it too", name, ", ".join(sorted(others)))
                continue
            left_s = max(0.0, deadline - time.monotonic())
            logger.info("%s: %s", name, ray_jobs.stop_in_words(backend, name, timeout_s=left_s))
    except Exception as error:  # a hook has nobody to raise to
        logger.warning("the job could not be stopped (%s: %s): stop it by hand", type(error).__name__, error)


def leave_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """On a crash: nothing but a word. The job goes on, and the next flow run attaches to it."""
    logger.warning("the flow run crashed; its job goes on, and the next flow run attaches to it")


def others_following(name: str) -> set[str]:
    """Ids of the flow runs that follow a job, besides the one that asks; none where Prefect cannot be asked."""
    try:
        return _followers(name) - {str(runtime.flow_run.id)}
    except Exception as error:
        logger.warning("who else follows %s is not known (%s: %s)", name, type(error).__name__, error)
        return set()


def _followed(flow_run_id: Any) -> set[str]:
    """Submission ids of the jobs that a flow run started or attached to."""
    return {name for name, _ in _job_artifacts(FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))}


def _followers(name: str) -> set[str]:
    """Ids of the flow runs that follow a job and are running."""
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    return {flow_run_id for job, flow_run_id in _job_artifacts(running) if job == name}


def _job_artifacts(flow_runs: FlowRunFilter) -> list[tuple[str, str]]:
    """(submission id, flow run id) of the jobs that these flow runs have named."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[JOB_ARTIFACT])), flow_run_filter=flow_runs
        )
    return [(artifact.description, str(artifact.flow_run_id)) for artifact in found if artifact.description]
