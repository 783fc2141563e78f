"""The whole night: train if the labels are new, gate, segment what is new: `python -m flows.nightly --config F`."""

import flows.embedded  # noqa: F401  before Prefect is imported

from prefect import flow

from flows import publish
from flows.archive import archive
from flows.command import main
from flows.config import ArchiveFlowConfig, NightlyConfig, TrainFlowConfig
from flows.publish import TrainOutcome
from flows.train import train
from jobs.contract import PredictResult


@flow(name="nightly")
def nightly(config: NightlyConfig) -> tuple[TrainOutcome, PredictResult]:
    """Train, measure, prune and gate; then predict with whatever model is current."""
    outcome = train(TrainFlowConfig(**{name: getattr(config, name) for name in TrainFlowConfig.model_fields}))
    predicted = archive(ArchiveFlowConfig(**{name: getattr(config, name) for name in ArchiveFlowConfig.model_fields}))
    return outcome, predicted


if __name__ == "__main__":
    main("flows.nightly", NightlyConfig, lambda config: publish.show(*nightly(config)))
