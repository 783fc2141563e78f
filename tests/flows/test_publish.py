"""What Prefect is told, and how little of it."""

import flows.embedded  # noqa: F401  before Prefect is imported

import logging
from pathlib import Path
from uuid import UUID

import pytest

from flows import lineage, publish
from jobs.contract import PredictConfig, PredictResult


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, with a Prefect server somewhere."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    caplog.set_level(logging.INFO, logger="flows.job")
    return caplog


class Place:
    """A cluster with a page for every job."""

    where, survives = "a cluster", True

    def url(self, submission_id: str) -> str:
        return f"http://cluster/{submission_id}"


def test_a_chatty_job_fills_no_database(lines: pytest.LogCaptureFixture) -> None:
    following = publish.Following(Place(), "job", None)  # type: ignore[arg-type]
    for number in range(10_000):
        following.say(f"line {number}")
    following.__exit__(None, None, None)
    said = [record.getMessage() for record in lines.records if record.name == "flows.job"]
    assert publish.BURST_LINES <= len(said) <= publish.BURST_LINES + 5
    assert said[0] == "line 0"
    left_out = 10_000 - sum(line.startswith("line ") for line in said)
    assert said[-1] == f"... {left_out} lines left out; all of them: http://cluster/job"


def test_a_long_line_is_cut(lines: pytest.LogCaptureFixture) -> None:
    publish.Following(Place(), "job", None).say("x" * 100_000)  # type: ignore[arg-type]
    (said,) = [record.getMessage() for record in lines.records if record.name == "flows.job"]
    assert len(said) < publish.MAX_LINE + 10


def test_without_a_server_every_line_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    following = publish.Following(Place(), "job", None)  # type: ignore[arg-type]
    for number in range(1000):
        following.say(f"line {number}")
    assert capsys.readouterr().err.splitlines() == [f"line {number}" for number in range(1000)]


def test_what_cannot_be_published_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    @publish.never_in_the_way
    def publish_something() -> None:
        raise OSError("the server is away")

    publish_something()
    assert "publish_something: Prefect did not take it (OSError: the server is away)" in caplog.text


def test_a_job_is_named_again_until_prefect_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []

    def create(text: str, key: str, description: str) -> None:
        named.append(description)
        if len(named) < 3:
            raise OSError("the server is away")

    monkeypatch.setattr(publish, "create_markdown_artifact", create)
    monkeypatch.setattr(publish, "PROGRESS_EVERY_S", 0.0)
    with publish.Following(Place(), "job", None) as following:  # type: ignore[arg-type]
        for _ in range(5):
            following.tick()
    assert named == ["job"] * 3


def test_an_event_names_archive_model_and_table_as_openlineage_does(tmp_path: Path) -> None:
    job = PredictConfig(model="s3://models/nuclei/abc", input="s3://profile@archive/2026", output=str(tmp_path))
    predicted = PredictResult(
        status="complete",
        exit_code=0,
        runs=("r00001",),
        model_digest="d" * 64,
        table_uri=f"{tmp_path}/table",
        report_uri=None,
        num_listed=12,
        num_predicted=6,
        num_failed=1,
        num_unchanged=5,
        failures={"decode": 1},
        megapixels=1.0,
        seconds=1.0,
    )
    event = lineage.event(job, predicted, "r00001")
    assert [(each["namespace"], each["name"]) for each in event["inputs"]] == [
        ("s3://archive", "2026"),
        ("s3://models", "nuclei/abc"),
    ]
    (table,) = event["outputs"]
    assert (table["namespace"], table["name"]) == ("file", f"{tmp_path}/table")
    assert table["outputFacets"]["outputStatistics"]["rowCount"] == 7
    assert UUID(event["run"]["runId"])
    assert event["eventType"] == "COMPLETE"
    assert {"eventTime", "job", "producer", "schemaURL"} <= set(event)
