"""Train where the labelled set is new, and publish the model if it is not worse: `python -m flows.train --config F`."""

import flows.embedded  # noqa: F401  before Prefect is imported

from prefect import flow

from flows import hooks, publish, stages
from flows.command import main
from flows.config import TrainFlowConfig
from flows.outcome import TrainOutcome


@flow(name="train", on_cancellation=[hooks.stop_jobs], on_crashed=[hooks.leave_jobs])
def train(config: TrainFlowConfig) -> TrainOutcome:
    """Train, measure every level, prune by tolerance, gate, quantise; nothing is done twice for a labelled set."""
    return make_model(config, stages.deadline(config))


def make_model(config: TrainFlowConfig, until: float) -> TrainOutcome:
    """The stages of a model, inside whatever flow runs."""
    labelled = stages.labelled_fingerprint(config.data)
    trained = stages.train_stage(config, labelled, until)
    measured = stages.evaluate_stage(config, labelled, trained.model_uri, trained.digest, until)
    pruned = stages.prune_stage(config, labelled, trained, until)
    gate = stages.gate_stage(config, labelled, measured, pruned, until)
    outcome = TrainOutcome(trained=trained, measured=measured, pruned=pruned, gate=gate)
    try:
        if config.quantise:
            outcome = outcome.model_copy(update={"quantised": stages.quantise_stage(config, labelled, until)})
    finally:
        publish.publish_levels(outcome)
    return outcome


if __name__ == "__main__":
    main("flows.train", TrainFlowConfig, lambda config: publish.show(train(config), None))
