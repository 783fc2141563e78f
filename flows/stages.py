"""The stages of a night as Prefect tasks. Each runs one job, or finds that its result is there and still true.

A stage's record is `<work>/stages/<stage>-<fingerprint>.json`: the job's result, under the fingerprint of all that
went in. Prefect's own result cache is not used: a record is trusted only while what it names exists.
"""

import logging
from typing import TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ValidationError

from flows import registry
from flows.config import ArchiveFlowConfig, TrainFlowConfig
from flows.local_jobs import run_job
from flows.registry import CurrentModel
from jobs import storage
from jobs.contract import (
    EvaluateConfig,
    EvaluateResult,
    PredictConfig,
    PredictResult,
    PruneConfig,
    PruneResult,
    TrainConfig,
    TrainResult,
    fingerprint,
)
from unetpp.config import Frozen
from unetpp.errors import ConfigError

logger = logging.getLogger(__name__)

Result = TypeVar("Result", bound=BaseModel)

LABELLED = ("images", "masks", "splits.csv")


class GateResult(Frozen):
    """Whether a new model became the current one, and why."""

    accepted: bool
    digest: str
    val_iou: float
    reason: str


def labelled_fingerprint(data: str) -> str:
    """Return the fingerprint of a labelled set: the keys and versions of images/, masks/ and splits.csv."""
    listing = {entry.key: entry.etag for entry in storage.list_objects(data)}
    return fingerprint({key: etag for key, etag in listing.items() if key.split("/")[0] in LABELLED})


@task(name="train", cache_policy=NO_CACHE)
def train_stage(config: TrainFlowConfig, labelled: str) -> TrainResult:
    """Train on the labelled set, or return the result of having done so."""
    job = TrainConfig(data=config.data, output=storage.join(config.work, "train"), **dict(config.train))
    key = fingerprint({"config": job.run_fingerprint(), "labelled": labelled})
    return _once(config.work, "train", key, job, TrainResult)


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate_stage(config: TrainFlowConfig, labelled: str, model_uri: str, digest: str) -> EvaluateResult:
    """Measure every level of a model on the validation split."""
    job = EvaluateConfig(
        model=model_uri,
        data=config.data,
        split=config.train.val_split,
        output=_evaluation_uri(config, labelled, digest),
        group_by=config.group_by,
    )
    return _once(config.work, "evaluate", _key(job, digest, labelled), job, EvaluateResult)


def _evaluation_uri(config: TrainFlowConfig, labelled: str, digest: str) -> str:
    measured_on = fingerprint({"labelled": labelled, "split": config.train.val_split})
    return storage.join(config.work, "evaluate", f"{digest[:10]}-{measured_on[:6]}")


@task(name="prune", cache_policy=NO_CACHE)
def prune_stage(config: TrainFlowConfig, labelled: str, trained: TrainResult) -> PruneResult:
    """Keep the cheapest level that is within the tolerance by what `evaluate_stage` measured."""
    job = PruneConfig(
        model=trained.model_uri,
        out=storage.join(config.work, "prune", trained.digest[:10]),
        tolerance=config.tolerance,
        confidence=config.confidence,
        metrics=storage.join(_evaluation_uri(config, labelled, trained.digest), "metrics.json"),
    )
    return _once(config.work, "prune", _key(job, trained.digest, labelled), job, PruneResult)


@task(name="gate", cache_policy=NO_CACHE)
def gate_stage(config: TrainFlowConfig, labelled: str, measured: EvaluateResult, pruned: PruneResult) -> GateResult:
    """Make the pruned model the current one, unless it is worse than that on the same validation split."""
    key = fingerprint({"digest": pruned.digest, "labelled": labelled, "margin": config.gate_margin})
    record_uri = _record_uri(config.work, "gate", key)
    decided = _read_record(record_uri, GateResult)
    if decided is not None and registry.current(config.models)[1] is not None:
        logger.info("gate: unchanged")
        return decided
    val_iou = level_iou(measured, pruned.level)
    while True:
        number, current = registry.current(config.models)
        accepted, reason = _compare(config, labelled, pruned, val_iou, current)
        if not accepted or (current is not None and current.digest == pruned.digest):
            break
        new = CurrentModel(
            digest=pruned.digest, level=pruned.level, val_iou=val_iou, labelled_fingerprint=labelled, gate=reason
        )
        if registry.promote(config.models, number + 1, new, pruned.model_uri):
            break
        logger.info("gate: somebody else promoted a model just now; comparing with that one")
    logger.info("gate: %s", reason)
    decision = GateResult(accepted=accepted, digest=pruned.digest, val_iou=val_iou, reason=reason)
    storage.write_bytes(record_uri, decision.model_dump_json(indent=2).encode())
    return decision


def _compare(
    config: TrainFlowConfig, labelled: str, pruned: PruneResult, val_iou: float, current: CurrentModel | None
) -> tuple[bool, str]:
    """Return whether the pruned model may be current, and the sentence that says why."""
    if current is None:
        return True, f"{pruned.digest[:10]} is the first model: it becomes the current one"
    if current.digest == pruned.digest:
        return True, f"{pruned.digest[:10]} is the current model already"
    uri = registry.model_uri(config.models, current.digest)
    current_iou = level_iou(evaluate_stage(config, labelled, uri, current.digest), current.level)
    accepted = val_iou >= current_iou - config.gate_margin
    verdict = "replaces" if accepted else "does not replace"
    return accepted, (
        f"{pruned.digest[:10]} (validation IoU {val_iou:.4f}) {verdict} the current model "
        f"{current.digest[:10]} ({current_iou:.4f}; margin {config.gate_margin:g})"
    )


@task(name="predict", cache_policy=NO_CACHE)
def predict_stage(config: ArchiveFlowConfig) -> PredictResult:
    """Segment what is new in the archive with the current model; ConfigError where there is none."""
    _, model = registry.current(config.models)
    if model is None:
        raise ConfigError(f"{config.models} has no current model: run flows.train or flows.nightly first")
    job = PredictConfig(
        model=registry.model_uri(config.models, model.digest),
        input=config.input,
        output=config.output,
        partial_ok=True,  # failed images are rows and counts, not a failed night
        **dict(config.predict),
    )
    predicted = run_job("predict", job, PredictResult)
    report_uri = predicted.report_uri or _newest_report(storage.canonical(config.output))
    return predicted.model_copy(update={"report_uri": report_uri})


def _newest_report(output: str) -> str | None:
    """Return the report of the newest run: what an unchanged archive has to show."""
    runs_uri = storage.join(output, "runs")
    reports = [
        entry.key for entry in storage.list_objects(runs_uri, missing_ok=True) if entry.key.endswith("/report.html")
    ]
    return storage.join(runs_uri, max(reports)) if reports else None


def level_iou(measured: EvaluateResult, level: int) -> float:
    """Return the mean IoU of one level; ConfigError where it was not measured."""
    for report in measured.reports:
        if report.name == f"L{level}":
            return report.score.mean_iou
    raise ConfigError(f"{measured.model_uri} has no level L{level}: {[report.name for report in measured.reports]}")


def _key(job: BaseModel, digest: str, labelled: str) -> str:
    plain = job.model_dump(mode="json", exclude={"model", "result", "threads"})
    return fingerprint({"config": plain, "digest": digest, "labelled": labelled})


def _once(work: str, stage: str, key: str, job: BaseModel, result_class: type[Result]) -> Result:
    """Run a job unless its record is there and what it names exists."""
    uri = _record_uri(work, stage, key)
    recorded = _read_record(uri, result_class)
    if recorded is not None and _still_there(recorded):
        logger.info("%s: unchanged", stage)
        return recorded
    result = run_job(stage, job, result_class)
    storage.write_bytes(uri, result.model_dump_json(indent=2).encode())
    return result


def _record_uri(work: str, stage: str, key: str) -> str:
    return storage.join(work, "stages", f"{stage}-{key[:16]}.json")


def _read_record(uri: str, result_class: type[Result]) -> Result | None:
    """Return the recorded result, None where there is none or where it was written by another version."""
    try:
        return result_class.model_validate_json(storage.read_bytes(uri))
    except (FileNotFoundError, ValidationError):
        return None


def _still_there(result: BaseModel) -> bool:
    model_uri = getattr(result, "model_uri", None)
    names = ("config.json", "model.safetensors")
    return model_uri is None or all(storage.exists(storage.join(model_uri, name)) for name in names)
