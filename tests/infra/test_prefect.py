"""What Prefect is told: every deployment names a flow that is there, with parameters that it takes; every automation
is one that the server accepts."""

import flows.embedded  # noqa: F401  before Prefect is imported

import asyncio
import importlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore
from prefect.server.database.dependencies import provide_database_interface
from prefect.server.events import triggers
from prefect.server.events.models.automations import create_automation
from prefect.server.events.schemas.automations import Automation
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.utilities.user_templates import validate_user_template
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings

from flows import automations, deploy
from flows.config import NightlyConfig
from flows.deploy import CONFIGS, FILE, PLACES, POOL, with_site
from jobs.config_file import load_config, read_yaml
from unetpp.errors import ConfigError

CONTENT = yaml.safe_load(FILE.read_text())
DEPLOYMENTS = {each["name"]: each for each in CONTENT["deployments"]}
VALUES = {name: f"s3://bucket/{name.lower()}" for name in PLACES} | {"UNETPP_TIMEZONE": "Europe/Berlin"}


def filled(node: Any) -> Any:
    """With the variables that `prefect deploy` fills in."""
    if isinstance(node, dict):
        return {name: filled(value) for name, value in node.items()}
    if isinstance(node, list):
        return [filled(each) for each in node]
    return re.sub(r"\{\{ \$(\w+) \}\}", lambda found: VALUES[found[1]], node) if isinstance(node, str) else node


def test_every_flow_has_a_deployment_and_no_other() -> None:
    assert set(DEPLOYMENTS) == set(CONFIGS) == {"nightly", "train", "archive", "backfill"}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_names_a_flow_and_begins_with_parameters_that_it_takes(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    path, _, function = deployment["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function)
    assert flow.name == name
    config_class = flow.fn.__annotations__["config"]
    given = filled(deployment["parameters"]["config"])
    assert set(given) <= set(config_class.model_fields)
    required = {field for field, about in config_class.model_fields.items() if about.is_required()}
    assert required - set(given) == ({"first", "last"} if name == "backfill" else set())
    settings = [f"{field}={value}" for field, value in given.items()]
    load_config(config_class, None, settings + (["first=2026-01-01", "last=2026-01-02"] if name == "backfill" else []))


SITE = """
data: s3://lab/labelled
tolerance: 0.005
train: {model: {filters: [16, 32, 64, 128, 256]}, epochs: 3}
predict: {engine: openvino-int8}
"""


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_begins_with_what_the_site_s_file_says_of_its_flow(tmp_path: Path, name: str) -> None:
    (tmp_path / "site.yaml").write_text(SITE)
    content = with_site(CONTENT, read_yaml(tmp_path / "site.yaml"))
    before, (after,) = DEPLOYMENTS[name], [each for each in content["deployments"] if each["name"] == name]
    trains, predicts = name in ("nightly", "train"), name != "train"
    expected = dict(before["parameters"]["config"])
    if trains:
        train = {"model": {"filters": [16, 32, 64, 128, 256]}, "epochs": 3}
        expected |= {"data": "s3://lab/labelled", "tolerance": 0.005, "train": train}
    if predicts:
        expected |= {"predict": {"engine": "openvino-int8"}}
    assert after == before | {"parameters": {"config": expected}}


def test_nights_begin_where_the_site_s_file_says_that_it_is_night() -> None:
    content = with_site(CONTENT, {"timezone": "Asia/Tokyo"})
    (nightly,) = [each for each in content["deployments"] if each["name"] == "nightly"]
    assert [schedule["timezone"] for schedule in nightly["schedules"]] == ["Asia/Tokyo"]
    assert nightly["parameters"]["config"]["timezone"] == "Asia/Tokyo"


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("tolerance: 2", "tolerance"),
        ("trian: {epochs: 3}", "did you mean train"),
        ("night: 2026-01-01", "night is of one night"),
        ("- tolerance", "wanted `key: value` lines"),
        ("input: s3://archive", "not set: UNETPP_DATA, UNETPP_MODELS, UNETPP_WORK, UNETPP_OUTPUT;"),
    ],
)
def test_a_site_s_file_that_is_wrong_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, words: str
) -> None:
    (tmp_path / "site.yaml").write_text(site)
    monkeypatch.setenv("UNETPP_CONFIG", str(tmp_path / "site.yaml"))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    for name in PLACES:
        if "not set" in words:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, VALUES[name])
    monkeypatch.setattr(deploy, "_prefect", lambda *_: pytest.fail("Prefect was told"))
    with pytest.raises(ConfigError, match=re.escape(words)):
        deploy.deploy()


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_no_deployment_has_a_secret_among_its_parameters(name: str) -> None:
    assert not re.search(r"secret|password|token|key_id", yaml.safe_dump(DEPLOYMENTS[name]["parameters"]), re.I)


def test_nights_do_not_overlap_and_trainings_wait() -> None:
    strategies = {name: each["concurrency_limit"]["collision_strategy"] for name, each in DEPLOYMENTS.items()}
    assert strategies == {"nightly": "CANCEL_NEW", "archive": "CANCEL_NEW", "train": "ENQUEUE", "backfill": "ENQUEUE"}
    assert {each["concurrency_limit"]["limit"] for each in DEPLOYMENTS.values()} == {1}
    assert {each["work_pool"]["name"] for each in DEPLOYMENTS.values()} == {POOL}


def test_a_night_that_takes_all_its_time_ends_before_the_next() -> None:
    shortest_day_h = 23
    assert 2 * NightlyConfig.model_fields["deadline_hours"].default <= shortest_day_h - 0.5


def test_every_schedule_has_a_slug_a_zone_and_says_whether_it_is_on() -> None:
    schedules = [schedule for each in DEPLOYMENTS.values() for schedule in each.get("schedules", [])]
    assert schedules
    for schedule in schedules:
        assert {"slug", "timezone", "active", "cron"} <= set(schedule)
        hour = int(schedule["cron"].split()[1])
        assert hour not in (1, 2), "summer time skips or repeats it"


@pytest.mark.parametrize("alarm", [None, "01a20dcb-9072-7ea3-8b29-672c4460e246"])
def test_every_automation_is_one_that_the_server_accepts(alarm: str | None) -> None:
    found = automations.read(alarm)
    assert tuple(each["name"] for each in found) == automations.NAMES
    for content in found:
        parsed = AutomationCore.model_validate(content)
        assert parsed.enabled
        for action in parsed.actions:
            validate_user_template(getattr(action, "payload", "") or "")


def test_the_hours_of_silence_begin_with_what_was_heard_last() -> None:
    silences = [each["trigger"] for each in automations.read(None) if each["trigger"]["posture"] == "Proactive"]
    assert [each.get("after") for each in silences] == [["prefect.flow-run.heartbeat"], ["prefect.flow-run.Running"]]


def test_a_night_that_ends_in_any_way_but_well_is_told() -> None:
    (failed,) = [each for each in automations.read(None) if each["name"] == "unetpp-failed"]
    assert set(failed["trigger"]["expect"]) == {
        f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut", "Cancelled")
    }


def test_a_resumption_is_bounded_by_the_parameters_own_limit() -> None:
    (resume,) = [each for each in automations.read(None) if each["name"] == "unetpp-resume"]
    template = resume["actions"][0]["parameters"]["config"]["value"]["template"]
    validate_user_template(template)
    assert "resumed" in template
    from flows.config import ArchiveFlowConfig

    limits = ArchiveFlowConfig.model_json_schema()["properties"]["resumed"]
    assert (limits["minimum"], limits["maximum"]) == (0, 3)


def test_the_doctor_and_the_file_speak_of_the_same_automations() -> None:
    there = yaml.safe_load(Path(automations.FILE).read_text())["automations"]
    assert tuple(each["name"] for each in there) == automations.NAMES


HOUR = timedelta(hours=1)
MIDNIGHT = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def server_database(tmp_path: Path) -> Iterator[None]:
    """A database of Prefect's server, with the tables of its automations."""

    async def make_tables() -> None:
        database = provide_database_interface()
        metadata = database.Base.metadata
        tables = [table for name, table in metadata.tables.items() if name.startswith(("automation", "composite"))]
        async with (await database.engine()).begin() as connection:
            await connection.run_sync(metadata.create_all, tables=tables)

    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{tmp_path}/prefect.db"}):
        asyncio.run(make_tables())
        yield


@pytest.mark.parametrize(("nights", "told_at"), [([10, 34, 82], [60]), ([10, 34, 58, 82], [])])
def test_a_lost_night_is_told_within_26_hours_of_the_last(
    nights: list[int], told_at: list[int], server_database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the server evaluates its triggers with, on a clock that is turned by hand."""
    (content,) = [each for each in automations.read(None) if each["name"] == "unetpp-dead-man"]
    told: list[int] = []

    async def turn_the_clock() -> None:
        automation = Automation(id=uuid4(), **content)
        async with provide_database_interface().session_context(begin_transaction=True) as session:
            await create_automation(session, automation)
        triggers.clear_loaded_automations()
        triggers.load_automation(automation)
        (trigger,) = triggers.triggers.values()
        for hour in range(100):
            now = MIDNIGHT + hour * HOUR
            monkeypatch.setattr(triggers, "act", lambda firing, hour=hour: answered(told.append(hour)))
            await triggers.reset_events_clock()
            await triggers.proactive_evaluation(trigger, now)
            if hour in nights:
                await triggers.reactive_evaluation(begun(now))
        triggers.clear_loaded_automations()

    async def answered(_: None) -> None:
        pass

    def begun(now: datetime) -> ReceivedEvent:
        return ReceivedEvent(
            id=uuid4(),
            occurred=now,
            received=now,
            event="prefect.flow-run.Running",
            resource={"prefect.resource.id": f"prefect.flow-run.{uuid4()}"},
            related=[{"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.night"}],
            payload={},
        )

    asyncio.run(turn_the_clock())
    assert told == told_at
