"""Segment the nights of a range that are not done, one after the other: `python -m flows.backfill --config F`."""

import flows.embedded  # noqa: F401  before Prefect is imported

import contextlib
import logging

from prefect import flow
from prefect.states import Completed

from flows import hooks, publish, stages
from flows.archive import segment
from flows.command import main
from flows.config import ArchiveFlowConfig, BackfillConfig
from flows.nights import nights_between, refuse_future
from jobs.contract import PredictResult
from unetpp.errors import JobError, StorageError, UnetppError

logger = logging.getLogger(__name__)


@flow(name="backfill", on_cancellation=[hooks.stop_jobs], on_crashed=[hooks.leave_jobs])
def backfill(config: BackfillConfig) -> dict[str, PredictResult]:
    """Work on every night of the range that is not done, and publish the matrix; a night that fails stops no other.

    Each night has `deadline_hours`. ConfigError, before the first, where there is no model, or the last has not begun.
    """
    refuse_future(config.last, config.timezone)
    with contextlib.suppress(StorageError):  # each night asks anew
        stages.current_model(config.models)
    results: dict[str, PredictResult] = {}
    rows: dict[str, dict[str, str]] = {}
    failed: list[str] = []
    nights = nights_between(config.first, config.last)
    for night in nights:
        rows[f"{night}"] = _row(f"{night}", "waiting")
    for night in nights:
        plain = config.model_dump(include=set(ArchiveFlowConfig.model_fields)) | {"night": night}
        one, name = ArchiveFlowConfig.model_validate(plain), f"{night:%Y%m%d}"
        try:
            if not config.again and (done := stages.is_night_done(one, name)) is not None:
                results[name], rows[f"{night}"] = done, _row(f"{night}", "done before", done)
                continue
            rows[f"{night}"] = _row(f"{night}", "working")
            publish.publish_nights(list(rows.values()))
            results[name] = segment(one, name, stages.deadline(config))
            rows[f"{night}"] = _row(f"{night}", results[name].status, results[name])
        except UnetppError as error:
            logger.error("night %s: %s", night, error)
            failed.append(f"{night}")
            rows[f"{night}"] = _row(f"{night}", "failed")
    publish.publish_nights(list(rows.values()))
    if failed:
        raise JobError("backfill", None, f"{len(failed)} of {len(nights)} nights failed: {', '.join(failed)}")
    words = ", ".join(f"{row['night']} {row['state']}" for row in rows.values())
    return Completed(message=words, data=results)  # type: ignore[return-value]


def _row(night: str, state: str, result: PredictResult | None = None) -> dict[str, str]:
    row = {"night": night, "state": state, "images": "", "predicted": "", "failed": "", "report": ""}
    if result is not None:
        row |= {
            "images": str(result.num_listed),
            "predicted": str(result.num_predicted),
            "failed": str(result.num_failed),
            "report": result.report_uri or "",
        }
    return row


def _show(results: dict[str, PredictResult]) -> None:
    for result in results.values():
        publish.show(None, result)


if __name__ == "__main__":
    main("flows.backfill", BackfillConfig, lambda config: _show(backfill(config)))
