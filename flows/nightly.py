"""The whole night: train if the labels are new, gate, segment what is new: `python -m flows.nightly --config F`."""

import flows.embedded  # noqa: F401  before Prefect is imported

import logging

from prefect import flow

from flows import hooks, publish, stages
from flows.archive import segment
from flows.command import main
from flows.config import NightlyConfig
from flows.outcome import TrainOutcome
from flows.train import make_model
from jobs import registry
from jobs.contract import PredictResult
from unetpp.errors import UnetppError

logger = logging.getLogger(__name__)


@flow(name="nightly", on_cancellation=[hooks.stop_jobs], on_crashed=[hooks.leave_jobs])
def nightly(config: NightlyConfig) -> tuple[TrainOutcome, PredictResult]:
    """Train, measure, prune and gate; then predict with whatever model is current.

    Where the first half fails, the archive is segmented with the model that is current then, which is the new one where
    the gate had let it through; the flow run fails at the end.
    Each half has `deadline_hours`, so that a training that takes too long leaves time for the archive.
    """
    night = stages.tonight(config)
    try:
        outcome = make_model(config, stages.deadline(config))
    except UnetppError as error:
        if registry.current(config.models)[1] is None:
            raise
        logger.error("the half that makes a model failed: %s", error)
        logger.info("going on with the model that is current now")
        segment(config, night, stages.deadline(config))
        raise
    predicted = segment(config, night, stages.deadline(config))
    return publish.ended(predicted, (outcome, predicted))


if __name__ == "__main__":
    main("flows.nightly", NightlyConfig, lambda config: publish.show(*nightly(config)))
