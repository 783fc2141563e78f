"""A range of nights, whatever one of them meets."""

import flows.embedded  # noqa: F401  before Prefect is imported

from datetime import date
from pathlib import Path

import pytest

from flows import publish, stages
from flows.backfill import backfill
from flows.config import BackfillConfig
from unetpp.errors import ConfigError, JobError, StorageError, TransientError

NIGHTS = {"first": date(2026, 11, 24), "last": date(2026, 11, 26)}
CONFIG = BackfillConfig.model_validate({"models": "m", "input": "i", "output": "o", **NIGHTS})


def test_a_store_that_does_not_answer_costs_the_night_that_asked_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def is_night_done(config: object, night: str) -> None:
        if night == "20261124":
            raise StorageError("s3://archive does not answer")

    def segment(config: object, night: str, until: float) -> None:
        begun.append(night)
        raise TransientError("the Ray cluster answers 502")

    def current_model(models_uri: str) -> None:
        raise StorageError("s3://models does not answer")

    published: list[list[str]] = []
    monkeypatch.setattr(stages, "current_model", current_model)
    monkeypatch.setattr(stages, "is_night_done", is_night_done)
    monkeypatch.setattr("flows.backfill.segment", segment)
    monkeypatch.setattr(publish, "publish_nights", lambda rows: published.append([row["state"] for row in rows]))
    with pytest.raises(JobError, match="3 of 3 nights failed: 2026-11-24, 2026-11-25, 2026-11-26"):
        backfill.fn(CONFIG)
    assert begun == ["20261125", "20261126"]
    assert published[0] == ["failed", "working", "waiting"]


def test_without_a_model_no_night_is_begun(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"models": str(tmp_path)})
    with pytest.raises(ConfigError, match="has no current model"):
        backfill.fn(config)
