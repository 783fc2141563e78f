"""What the stages of a night hand to each other and to people."""

from jobs.contract import EvaluateResult, PruneResult, TrainResult
from unetpp.config import Frozen


class GateResult(Frozen):
    """Whether a new model became the current one, and why."""

    accepted: bool
    digest: str
    val_iou: float
    reason: str


class TrainOutcome(Frozen):
    """The results of the four stages that make a model."""

    trained: TrainResult
    measured: EvaluateResult
    pruned: PruneResult
    gate: GateResult
