"""A range of nights, whatever one of them meets."""

import flows.embedded  # noqa: F401  before Prefect is imported

import contextlib
import itertools
import shlex
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows import publish, stages
from flows.backfill import backfill
from flows.config import ArchiveFlowConfig, BackfillConfig
from jobs import compact, forget, gc, predict, registry, table
from jobs.contract import CompactConfig, ForgetConfig, GcConfig, PredictConfig, PredictResult
from jobs.registry import CurrentModel
from tests.flows.test_ray_jobs import Cluster, failed
from unetpp.errors import ConfigError, JobError, StorageError, TransientError

NIGHTS = {"first": date(2026, 3, 24), "last": date(2026, 3, 26)}
CONFIG = BackfillConfig.model_validate({"models": "m", "input": "i", "output": "o", **NIGHTS})


def test_a_store_that_does_not_answer_costs_the_night_that_asked_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def is_night_done(config: object, night: str) -> None:
        if night == "20260324":
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
    with pytest.raises(JobError, match="3 of 3 nights failed: 2026-03-24, 2026-03-25, 2026-03-26"):
        backfill.fn(CONFIG)
    assert begun == ["20260325", "20260326"]
    assert published[0] == ["failed", "working", "waiting"]


def test_without_a_model_no_night_is_begun(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"models": str(tmp_path)})
    with pytest.raises(ConfigError, match="has no current model"):
        backfill.fn(config)


def test_a_night_that_has_not_begun_is_not_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "current_model", lambda models_uri: None)
    config = CONFIG.model_copy(update={"last": date(9999, 12, 31)})
    with pytest.raises(ConfigError, match=r"the night 9999-12-31 has not begun: in UTC it is 20\d\d-"):
        backfill.fn(config)
    with pytest.raises(ConfigError, match="9999-12-31 has not begun"):
        stages.tonight(ArchiveFlowConfig(models="m", input="i", output="o", night=config.last))


def test_a_cluster_is_told_of_places_as_they_are_seen_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(Cluster):
        command = ""

        def submit(self, submission_id: str, command: str, metadata: dict[str, str]) -> bool:
            self.command, self.jobs[submission_id] = command, [failed(10)]
            return True

    cluster = Elsewhere()
    model = CurrentModel(digest="d" * 64, level=2, val_iou=0.5, labelled_fingerprint="f" * 64, gate="first")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "backend_of", lambda place: cluster)
    monkeypatch.setattr(registry, "current", lambda models: (1, model))
    monkeypatch.setattr(
        publish, "Following", lambda *what: contextlib.nullcontext(SimpleNamespace(say=print, tick=int))
    )
    with pytest.raises(JobError, match="would end the same way"):
        stages.predict_stage.fn(CONFIG, "20260324", time.monotonic() + 600)
    said = dict(itertools.pairwise(shlex.split(cluster.command)))
    places = [said[flag] for flag in ("--model", "--input", "--output", "--result")]
    assert [Path(place).is_relative_to(tmp_path) for place in places] == [True] * 4


def test_a_night_that_was_compacted_is_done_while_its_rows_are_there(
    tiny_model: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path)
    model = CurrentModel(digest="d" * 64, level=2, val_iou=0.5, labelled_fingerprint="f" * 64, gate="first")
    where = {"model": str(tiny_model), "input": str(archive), "output": output}
    how = {"backend": "inline", "threads": 1, "shard_images": 2}

    def segment(*patterns: str) -> PredictResult:
        return predict.run(PredictConfig.model_validate(where | how | {"include": patterns}))

    night = segment("[a-e]*.png")
    monkeypatch.setattr(registry, "current", lambda models: (1, model))
    monkeypatch.setattr(stages, "_read", lambda uri, result_class: night)
    assert stages.is_night_done(CONFIG, "20260324") == night

    compact.run(CompactConfig(output=output))
    forget.run(ForgetConfig(output=output, key="a.png"))  # also from the parts that were copied
    assert stages.is_night_done(CONFIG, "20260324") == night

    segment("*")
    compact.run(CompactConfig(output=output))
    gc.run(GcConfig(output=output, older_than_hours=0, delete=True))
    (part,) = table.list_parts(output, None)
    assert part.run == "r00004"
    assert stages.is_night_done(CONFIG, "20260324") == night

    Path(part.uri).unlink()
    assert stages.is_night_done(CONFIG, "20260324") is None
