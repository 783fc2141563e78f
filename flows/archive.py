"""Segment what is new in an archive with the current model: `python -m flows.archive --config F`."""

import flows.embedded  # noqa: F401  before Prefect is imported

from prefect import flow

from flows import hooks, publish, stages
from flows.command import main
from flows.config import ArchiveFlowConfig
from jobs.contract import PredictResult


@flow(name="archive", on_cancellation=[hooks.stop_jobs], on_crashed=[hooks.leave_jobs])
def archive(config: ArchiveFlowConfig) -> PredictResult:
    """Predict what is new and publish the counts."""
    return publish.ended(segment(config, stages.tonight(config), stages.deadline(config)))


def segment(config: ArchiveFlowConfig, night: str, until: float) -> PredictResult:
    """One night of an archive, inside whatever flow runs."""
    predicted = stages.predict_stage(config, night, until)
    publish.publish_archive(predicted)
    return predicted


if __name__ == "__main__":
    main("flows.archive", ArchiveFlowConfig, lambda config: publish.show(None, archive(config)))
