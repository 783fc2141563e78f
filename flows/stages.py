"""The stages of a night as Prefect tasks. Each has one job done, or finds that it is done and still true.

A stage's record is the result that its job wrote, under the name of the job: a fingerprint of all that changes the
output. Prefect's own result cache is not used: a record is trusted only while what it names exists.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ValidationError

from flows import hooks, lineage, publish, ray_jobs
from flows.backends import backend_of
from flows.config import ArchiveFlowConfig, FlowOptions, TrainFlowConfig
from flows.nights import night_of, refuse_future
from flows.outcome import GateResult
from flows.ray_jobs import State
from flows.submit import seen_from_elsewhere
from jobs import models, registry, storage
from jobs.config_file import write_command
from jobs.contract import (
    METRICS,
    EvaluateConfig,
    EvaluateResult,
    ExitCode,
    PredictConfig,
    PredictResult,
    PruneConfig,
    PruneResult,
    QuantiseConfig,
    QuantiseResult,
    TrainConfig,
    TrainResult,
    fingerprint,
)
from jobs.labelled import find_set
from jobs.registry import CurrentModel
from jobs.run_records import SUCCESS, holder_of
from jobs.watch import Watch
from unetpp.errors import ConfigError, JobError, StorageError

logger = logging.getLogger(__name__)

Result = TypeVar("Result", bound=BaseModel)


def labelled_fingerprint(data: str) -> str:
    """Return the fingerprint of a labelled set: the keys and versions of all that belongs to it."""
    return find_set(data).fingerprint


def deadline(config: FlowOptions) -> float:
    """Return the moment, in monotonic time, at which this flow run's job is to stop."""
    return time.monotonic() + config.deadline_hours * 3600


def tonight(config: ArchiveFlowConfig) -> str:
    """Return the name of the night whose work a flow run does: the one asked for, else by its scheduled start.

    ConfigError where the one asked for has not begun.
    """
    if config.night is not None:
        refuse_future(config.night, config.timezone)
        return f"{config.night:%Y%m%d}"
    due = config.due or runtime.flow_run.scheduled_start_time or datetime.now(UTC)
    return night_of(due, config.timezone, config.period_minutes)


# ------------------------------------------------------------------------------------------------ a model


@task(name="train", cache_policy=NO_CACHE)
def train_stage(config: TrainFlowConfig, labelled: str, until: float) -> TrainResult:
    """Train on the labelled set, or return the result of having done so."""
    job = TrainConfig(data=config.data, output=storage.join(config.work, "train"), **dict(config.train))
    spec: dict[str, object] = {"config": job.run_fingerprint(), "labelled": labelled}
    if job.init is not None:
        spec["init"] = models.version(job.init)
    return _once(config, "train", spec, job, TrainResult, config.work, _has_model, until)


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate_stage(config: TrainFlowConfig, labelled: str, model_uri: str, digest: str, until: float) -> EvaluateResult:
    """Measure every level of a model on the validation split, for `prune_stage` to read too."""
    output = _evaluation_uri(config, labelled, digest)
    job = EvaluateConfig(
        model=model_uri,
        data=config.data,
        split_column=config.train.split_column,
        split=config.train.val_split,
        output=output,
        group_by=config.group_by,
    )
    spec = _spec(job, digest, labelled)

    def still_true(result: BaseModel) -> bool:
        return _has_model(result) and storage.exists(storage.join(output, METRICS))

    return _once(config, "evaluate", spec, job, EvaluateResult, config.work, still_true, until)


def _evaluation_uri(config: TrainFlowConfig, labelled: str, digest: str) -> str:
    split = (config.train.split_column, config.train.val_split)
    measured_on = fingerprint({"labelled": labelled, "split": split})
    return storage.join(config.work, "evaluate", f"{digest[:10]}-{measured_on[:6]}")


@task(name="prune", cache_policy=NO_CACHE)
def prune_stage(config: TrainFlowConfig, labelled: str, trained: TrainResult, until: float) -> PruneResult:
    """Keep the cheapest level that is within the tolerance by what `evaluate_stage` measured.

    All that decides the level is in the folder's name: another choice may be another level, and must not take the place
    of a model that a record names.
    """
    metrics = storage.join(_evaluation_uri(config, labelled, trained.digest), METRICS)
    choice = fingerprint({"tolerance": config.tolerance, "confidence": config.confidence, "metrics": metrics})
    job = PruneConfig(
        model=trained.model_uri,
        out=storage.join(config.work, "prune", f"{trained.digest[:10]}-{choice[:6]}"),
        tolerance=config.tolerance,
        confidence=config.confidence,
        metrics=metrics,
    )
    spec = _spec(job, trained.digest, labelled)
    return _once(config, "prune", spec, job, PruneResult, config.work, _has_model, until)


@task(name="gate", cache_policy=NO_CACHE)
def gate_stage(
    config: TrainFlowConfig, labelled: str, measured: EvaluateResult, pruned: PruneResult, until: float
) -> GateResult:
    """Make the pruned model the current one, unless it is worse than that on the same validation split."""
    compared: dict[str, object] = {"digest": pruned.digest, "labelled": labelled, "margin": config.gate_margin}
    key = fingerprint(compared | {"models": storage.canonical(config.models)})
    record_uri = storage.join(config.work, "results", f"gate-{key[:10]}.json")
    decided = _read(record_uri, GateResult)
    if decided is not None and registry.current(config.models)[1] is not None:
        logger.info("gate: unchanged")
        return decided
    val_iou = level_iou(measured, pruned.level)
    while True:
        number, current = registry.current(config.models)
        accepted, reason = _compare(config, labelled, pruned, val_iou, current, until)
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


@task(name="quantise", cache_policy=NO_CACHE)
def quantise_stage(config: TrainFlowConfig, labelled: str, until: float) -> QuantiseResult | None:
    """Make the int8 form of the current model, if it is as good as float32; None where it has one."""
    _, current = registry.current(config.models)
    assert current is not None, "the gate has let one through"
    if registry.has_int8(config.models, current.digest):
        return None
    job = QuantiseConfig(
        model=registry.model_uri(config.models, current.digest),
        data=config.data,
        split_column=config.train.split_column,
        split=config.train.val_split,
        calibration_split=config.train.train_split,
        group_by=config.group_by,
        max_iou_drop=config.max_iou_drop,
        refusal_ok=True,
    )
    spec = _spec(job, current.digest, labelled)

    def still_true(result: BaseModel) -> bool:
        return not getattr(result, "accepted", False) or registry.has_int8(config.models, current.digest)

    quantised = _once(config, "quantise", spec, job, QuantiseResult, config.work, still_true, until)
    if not quantised.accepted:
        logger.warning("%s: %s", current.digest[:10], quantised.message)
    return quantised


def _compare(
    config: TrainFlowConfig,
    labelled: str,
    pruned: PruneResult,
    val_iou: float,
    current: CurrentModel | None,
    until: float,
) -> tuple[bool, str]:
    """Return whether the pruned model may be current, and the sentence that says why."""
    if current is None:
        return True, f"{pruned.digest[:10]} is the first model: it becomes the current one"
    if current.digest == pruned.digest:
        return True, f"{pruned.digest[:10]} is the current model already"
    uri = registry.model_uri(config.models, current.digest)
    current_iou = level_iou(evaluate_stage(config, labelled, uri, current.digest, until), current.level)
    accepted = val_iou >= current_iou - config.gate_margin
    verdict = "replaces" if accepted else "does not replace"
    return accepted, (
        f"{pruned.digest[:10]} (validation IoU {val_iou:.4f}) {verdict} the current model "
        f"{current.digest[:10]} ({current_iou:.4f}; margin {config.gate_margin:g})"
    )


def level_iou(measured: EvaluateResult, level: int) -> float:
    """Return the mean IoU of one level; ConfigError where it was not measured."""
    for report in measured.reports:
        if report.name == f"L{level}":
            return report.score.mean_iou
    raise ConfigError(f"{measured.model_uri} has no level L{level}: {[report.name for report in measured.reports]}")


def _spec(job: BaseModel, digest: str, labelled: str) -> dict[str, object]:
    plain = job.model_dump(mode="json", exclude={"model", "result", "threads"})
    return {"config": plain, "digest": digest, "labelled": labelled}


def _has_model(result: BaseModel) -> bool:
    return models.is_there(getattr(result, "model_uri", ""))


# ---------------------------------------------------------------------------------------------- an archive


@task(name="predict", cache_policy=NO_CACHE)
def predict_stage(config: ArchiveFlowConfig, night: str, until: float) -> PredictResult:
    """Segment what is new in the archive with the current model; ConfigError where there is none."""
    job = _predict_job(config, night)
    watch, spec = Watch(job.output), _predict_spec(job)
    predicted = _once(config, "predict", spec, job, PredictResult, job.output, _has_masks, until, night, watch)
    if predicted.status in ("interrupted", "failed"):  # a record of a job that was stopped is no end
        raise JobError("predict", predicted.exit_code, predicted.message)
    lineage.publish_lineage(job, predicted)
    report_uri = predicted.report_uri or _newest_report(storage.canonical(config.output))
    return predicted.model_copy(update={"report_uri": report_uri})


def is_night_done(config: ArchiveFlowConfig, night: str) -> PredictResult | None:
    """Return the result of a night whose work is done, and still there."""
    job = _predict_job(config, night)
    name = ray_jobs.submission_id("predict", night, _predict_spec(job))
    result = _read(_result_uri(job.output, name), PredictResult)
    return result if result is not None and _has_masks(result) else None


def current_model(models_uri: str) -> CurrentModel:
    """Return the model that nights predict with; ConfigError where there is none."""
    _, model = registry.current(models_uri)
    if model is None:
        raise ConfigError(f"{models_uri} has no current model: run flows.train or flows.nightly first")
    return model


def _predict_job(config: ArchiveFlowConfig, night: str) -> PredictConfig:
    model = current_model(config.models)
    inputs = (config.input,) if isinstance(config.input, str) else config.input
    options = config.predict
    if options.engine == "openvino-int8" and not registry.has_int8(config.models, model.digest):
        logger.warning(
            "%s has no int8 form, so it computes in float32, by engine openvino: set quantise in the flow that trains, "
            "or make it with unetpp quantise; where int8 lost too much, this is as it should be",
            model.digest[:10],
        )
        options = options.model_copy(update={"engine": "openvino"})
    return PredictConfig(
        model=registry.model_uri(config.models, model.digest),
        input=tuple(uri.replace("{night}", f"{night[:4]}-{night[4:6]}-{night[6:8]}") for uri in inputs),
        output=config.output,
        on_new_model=config.on_new_model,
        backfill_images=config.backfill_images,
        partial_ok=True,  # failed images are rows and counts, not a failed night
        **dict(options),
    )


def _predict_spec(job: PredictConfig) -> dict[str, object]:
    return {"config": job.output_fingerprint()}


def _has_masks(result: BaseModel) -> bool:
    """Whether every run of a finished `predict` is sealed, and every part of it in the table.

    Of a compacted run, whose own parts may be removed or written over, the run that holds its rows now is asked for.
    """
    assert isinstance(result, PredictResult)
    if result.status in ("interrupted", "failed"):
        return False
    output = result.table_uri.removesuffix("/table")
    for run in result.runs:
        try:
            holder = holder_of(storage.join(output, "runs", run))
            sealed = storage.read_json(storage.join(output, "runs", holder, SUCCESS))
        except (FileNotFoundError, StorageError):
            return False
        parts_uri = storage.join(result.table_uri, f"model=m{result.model_digest[:10]}", f"run={holder}")
        there = {entry.key: entry.size_bytes for entry in storage.list_objects(parts_uri, missing_ok=True)}
        if any(there.get(part["name"]) != part["size_bytes"] for part in sealed["parts"]):
            return False
    return True


def _newest_report(output: str) -> str | None:
    """Return the report of the newest run: what an unchanged archive has to show."""
    runs_uri = storage.join(output, "runs")
    reports = [
        entry.key for entry in storage.list_objects(runs_uri, missing_ok=True) if entry.key.endswith("/report.html")
    ]
    return storage.join(runs_uri, max(reports)) if reports else None


# --------------------------------------------------------------------------------------------- one job, once


def _once(
    config: FlowOptions,
    stage: str,
    spec: dict[str, object],
    job: BaseModel,
    result_class: type[Result],
    root: str,
    still_true: Callable[[Result], bool],
    until: float,
    night: str | None = None,
    watch: Watch | None = None,
) -> Result:
    """Have a job done: find its result, or attach to it, or start it, follow it, and read what it left.

    Raises:
        JobError: it ended badly, was stopped, or was lost too often.
    """
    backend = backend_of(config.jobs)
    name = ray_jobs.submission_id(stage, night, spec)
    result_uri = _result_uri(root, name)

    def recorded() -> Result | None:
        result = _read(result_uri, result_class)
        return result if result is not None and still_true(result) else None

    # What was found for a night may have changed since: by hand, and without a cluster, an archive is looked at anew.
    look_again = night is not None and (config.again or not backend.survives)
    if not look_again and (result := recorded()) is not None:
        logger.info("%s: unchanged, %s is done", stage, name)
        return result
    again = config.again
    told = job.model_copy(update={"result": result_uri})
    command = write_command(stage, seen_from_elsewhere(told) if backend.survives else told)
    metadata = {"night": night or "", "flow_run": runtime.flow_run.id or ""}
    for _ in range(ray_jobs.MAX_ATTEMPTS + 1):  # `ensure` ends it, where the cluster remembers
        submission = ray_jobs.ensure(
            backend,
            name,
            command,
            metadata,
            is_done=lambda: not look_again and recorded() is not None,
            again=again,
        )
        again = False
        logger.info("%s: %s %s", stage, "attached to" if submission.attached else "started", submission.submission_id)
        attached_at = time.monotonic()
        with publish.Following(backend, submission.submission_id, watch) as following:
            status = _follow(backend, submission.submission_id, following, until)
        if status is not None and status.state is State.SUCCEEDED:
            if (result := recorded()) is not None:
                return result
            raise JobError(submission.submission_id, 0, f"it left no readable result at {result_uri}")
        if status is not None and status.state is State.STOPPED:
            if submission.attached and time.monotonic() - attached_at < ray_jobs.STOP_S:
                logger.info("%s: %s was being stopped when this flow run came", stage, submission.submission_id)
                continue
            raise JobError(
                submission.submission_id, int(ExitCode.INTERRUPTED), "it was stopped; the next start goes on from there"
            )
        if not backend.survives:
            assert status is not None
            why = (
                "its last lines above say why" if following.on_screen else backend.log(submission.submission_id)[-4000:]
            )
            raise JobError(submission.submission_id, status.exit_code, why)
        if status is None:
            logger.warning("%s: %s was lost, its cluster does not know it any more", stage, submission.submission_id)
    raise JobError(name, None, f"lost {ray_jobs.MAX_ATTEMPTS} times: look after the cluster at {backend.where}")


def _follow(
    backend: ray_jobs.JobBackend, name: str, following: publish.Following, until: float
) -> ray_jobs.JobStatus | None:
    """Follow a job; Ctrl-C stops it, the end of this process alone does not, where the job can live without it."""
    poll_s = ray_jobs.POLL_S if backend.survives else 0.2

    def others() -> set[str]:
        return hooks.others_following(name) if backend.survives else set()

    try:
        return ray_jobs.follow(
            backend, name, say=following.say, tick=following.tick, others=others, deadline=until, poll_s=poll_s
        )
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and (found := others()):
            logger.info("%s goes on: flow run %s follows it too", name, ", ".join(sorted(found)))
        elif isinstance(error, KeyboardInterrupt) or not backend.survives:
            logger.info("%s: %s", name, ray_jobs.stop_in_words(backend, name))
        raise


def _result_uri(root: str, name: str) -> str:
    return storage.join(root, "results", f"{name}.json")


def _read(uri: str, result_class: type[Result]) -> Result | None:
    """Return the recorded result, None where there is none or where it was written by another version."""
    try:
        return result_class.model_validate_json(storage.read_bytes(uri))
    except (FileNotFoundError, ValidationError):
        return None
