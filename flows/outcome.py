"""What the stages of a night hand to each other and to people."""

from jobs.contract import EvaluateResult, PruneResult, QuantiseResult, TrainResult
from unetpp.config import Frozen


class GateResult(Frozen):
    """Whether a new model became the current one, and why."""

    accepted: bool
    digest: str
    val_iou: float
    reason: str


class TrainOutcome(Frozen):
    """The results of the stages that make a model.

    `quantised` is of the current model; None where it was not asked for, or has its int8 form already.
    """

    trained: TrainResult
    measured: EvaluateResult
    pruned: PruneResult
    gate: GateResult
    quantised: QuantiseResult | None = None
