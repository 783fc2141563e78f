"""Nights on real servers: they start by themselves, and whatever is killed on the way, the table is whole."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from flows.jobs_api import RayJobs
from infra.cluster import Site
from jobs import registry, storage
from tests.cluster.conftest import Nights, put_images, wait_for
from unetpp.errors import ConfigError, TransientError

NUM_NUCLEI = 200

Config = dict[str, Any]


def is_whole(nights: Nights, output: str, number: int = NUM_NUCLEI) -> bool:
    """Every image has one row, and it has a mask."""
    rows = nights.rows(output)
    keys = Counter(row["key"] for row in rows)
    return len(keys) == number and set(keys.values()) == {1} and not any(row["error_code"] for row in rows)


# ------------------------------------------------------------------------------------------------ a scheduled night


@pytest.fixture(scope="module")
def night_config(labelled: str, nuclei: str) -> Config:
    """A night that trains the smallest network there is."""
    return {
        "data": labelled,
        "models": "s3://models/nightly",
        "work": "s3://models/work",
        "input": nuclei,
        "output": "s3://output/nightly",
        "train": {
            "model": {"level": 2, "filters": [2, 4, 8]},
            "crop_px": 32,
            "batch_size": 2,
            "epochs": 1,
            "steps_per_epoch": 2,
        },
        "predict": {"shard_images": 25},
    }


@pytest.fixture(scope="module")
def scheduled_night(nights: Nights, night_config: Config) -> Iterator[dict[str, Any]]:
    """The flow run that a schedule, a minute ahead, has started by itself, and its end."""
    deployment = nights.deployment("nightly")
    # More than a minute ahead: so often the server looks for new schedules.
    due = (datetime.now(UTC) + timedelta(seconds=135)).replace(second=0)
    schedule = {
        "active": True,
        "slug": "test",
        "schedule": {"cron": f"{due.minute} {due.hour} * * *", "timezone": "UTC"},
        "parameters": {"config": night_config},
    }
    nights.ask("POST", f"/deployments/{deployment['id']}/schedules", json=[schedule])

    def started() -> list[dict[str, Any]]:
        wanted = {
            "deployment_id": {"any_": [deployment["id"]]},
            "expected_start_time": {"before_": f"{due + timedelta(seconds=1):%FT%TZ}"},
        }
        found: list[dict[str, Any]] = nights.ask("POST", "/flow_runs/filter", json={"flow_runs": wanted})
        return [run for run in found if run["auto_scheduled"] and run["state_type"] != "SCHEDULED"]

    wait_for(started, 300)
    (run,) = started()
    nights.ended(run["id"], 400)
    yield nights.flow_run(run["id"])
    (ours,) = [
        each
        for each in nights.ask("GET", f"/deployments/{deployment['id']}/schedules")
        if each["parameters"].get("config", {}).get("models") == "s3://models/nightly"
    ]
    nights.ask("DELETE", f"/deployments/{deployment['id']}/schedules/{ours['id']}")


def test_a_scheduled_night_starts_by_itself_and_completes(nights: Nights, scheduled_night: dict[str, Any]) -> None:
    assert scheduled_night["state_type"] == "COMPLETED", nights.log(scheduled_night["id"])
    assert is_whole(nights, "s3://output/nightly")
    stages = [name.split("-")[1] for name, status in nights.jobs("s3://").items() if status == "SUCCEEDED"]
    assert {"train", "evaluate", "prune", "predict"} <= set(stages)
    assert registry.current("s3://models/nightly")[0] == 1


def test_a_night_leaves_its_artifacts(nights: Nights, scheduled_night: dict[str, Any]) -> None:
    artifacts = nights.artifacts(scheduled_night["id"])
    assert {"ray-job", "progress", "levels", "archive", "report"} <= set(artifacts)
    assert artifacts["progress"]["data"] == 100
    assert "200 images -> 200 rows" in str(artifacts["archive"]["data"])
    assert artifacts["ray-job"]["description"].startswith("unetpp-predict-")
    assert f"{nights.site.ray_url}/#/jobs/unetpp-predict-" in artifacts["ray-job"]["data"]


def test_the_log_of_a_night_has_the_job_s_lines(nights: Nights, scheduled_night: dict[str, Any]) -> None:
    log = nights.log(scheduled_night["id"])
    assert "predict: started unetpp-predict-" in log
    assert "200 listed = 200 predicted + 0 failed + 0 unchanged" in log


def test_no_secret_is_in_what_a_night_leaves(nights: Nights, scheduled_night: dict[str, Any]) -> None:
    run = scheduled_night["id"]
    jobs = nights.ray._ask("GET", "/api/jobs/").text
    everything = jobs + nights.log(run) + json.dumps(nights.artifacts(run)) + json.dumps(nights.flow_run(run))
    for bucket in ("s3://output/nightly", "s3://models/nightly", "s3://models/work"):
        for entry in storage.list_objects(bucket):
            everything += storage.read_bytes(storage.join(bucket, entry.key)).decode(errors="replace")
    for name in ("s3-key", "s3-secret", "ray-token", "prefect-password"):
        assert nights.site.secret(name) not in everything, name


def test_a_finished_night_is_not_done_again_and_a_deleted_output_is(
    nights: Nights, scheduled_night: dict[str, Any], night_config: Config
) -> None:
    before = nights.jobs("unetpp-")
    again = nights.start("nightly", night_config)
    assert nights.ended(again)["type"] == "COMPLETED"
    assert nights.jobs("unetpp-") == before  # nothing was started
    for stage in ("train", "evaluate", "prune", "gate", "predict"):
        wait_for(lambda stage=stage: f"{stage}: unchanged" in nights.log(again), 30, lambda: nights.log(again))

    part = nights.parts("s3://output/nightly")[0]
    storage.delete(f"s3://output/nightly/table/{part}")
    third = nights.start("nightly", night_config)
    assert nights.ended(third)["type"] == "COMPLETED", nights.log(third)
    (new,) = set(nights.jobs("unetpp-")) - set(before)
    assert new.startswith("unetpp-predict-")
    assert new.endswith("-a1")
    assert is_whole(nights, "s3://output/nightly")


# ---------------------------------------------------------------------------------------------------- overlap


def test_a_second_run_while_the_first_works_is_cancelled_before_it_starts(
    nights: Nights, archive_config: Config
) -> None:
    output = archive_config["output"]
    first = nights.start("archive", archive_config)
    wait_for(lambda: nights.state(first)["type"] == "RUNNING", 90)
    second = nights.start("archive", archive_config)
    refused = nights.ended(second, 120)
    assert refused["type"] == "CANCELLED"
    assert "concurrency limit" in refused["message"]
    assert nights.ended(first)["type"] == "COMPLETED", nights.log(first)
    assert list(nights.jobs(output).values()) == ["SUCCEEDED"]
    assert is_whole(nights, output)


def submit_words(models: str, config: Config, shard_images: int) -> list[str]:
    """`unetpp` these words: the predict job of an archive flow, sent by hand."""
    _, model = registry.current(models)
    assert model is not None
    words = ["submit", "predict", "--model", registry.model_uri(models, model.digest), "--input", config["input"]]
    return [*words, "--output", config["output"], "--write", "parquet", "--shard-images", str(shard_images)]


def test_two_starts_of_one_spec_outside_prefect_share_one_job(
    nights: Nights, models: str, archive_config: Config
) -> None:
    output = archive_config["output"]
    words = submit_words(models, archive_config, shard_images=25)
    both = [nights.unetpp(*words) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert list(nights.jobs(output).values()) == ["SUCCEEDED"]
    assert sorted(("attached to" in text, "started" in text) for text in said) == [(False, True), (True, False)]
    assert is_whole(nights, output)


def test_a_submitted_job_is_stopped_by_ctrl_c_and_goes_on_when_it_is_said_again(
    nights: Nights, models: str, archive_config: Config
) -> None:
    output = archive_config["output"]
    words = submit_words(models, archive_config, shard_images=5)
    process = nights.unetpp(*words)
    wait_for(lambda: nights.is_working(output), 120)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 4, said
    assert list(nights.jobs(output).values()) == ["STOPPED"]
    num_before = len(nights.rows(output))
    assert 0 < num_before < NUM_NUCLEI
    again = nights.unetpp(*words)
    assert (again.communicate(timeout=240)[0], again.returncode)[1] == 0
    assert is_whole(nights, output)


# ------------------------------------------------------------------------------------------------ cancel, kill


def test_a_cancelled_night_stops_its_job_and_the_next_one_finishes_the_rest(
    nights: Nights, archive_config: Config
) -> None:
    output = archive_config["output"]
    run = nights.start("archive", archive_config)
    wait_for(lambda: nights.is_working(output), 120, lambda: nights.log(run))
    nights.ask("POST", f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert nights.ended(run, 180)["type"] == "CANCELLED"
    wait_for(lambda: "RUNNING" not in nights.jobs(output).values(), 120)
    assert list(nights.jobs(output).values()) == ["STOPPED"]
    said = nights.result(output)
    assert (said["status"], said["exit_code"]) == ("interrupted", 4)
    done = len(nights.rows(output))
    assert 0 < done < NUM_NUCLEI  # what was in flight was drained, not thrown away

    after = nights.start("archive", archive_config)
    assert nights.ended(after)["type"] == "COMPLETED", nights.log(after)
    assert is_whole(nights, output)
    assert sorted(nights.jobs(output).values()) == ["STOPPED", "SUCCEEDED"]


@pytest.mark.parametrize("kill", [Nights.kill_flow, Nights.kill_worker, Nights.kill_server, Nights.kill_node])
def test_whatever_is_killed_the_table_is_whole_and_one_job_did_it(
    nights: Nights, archive_config: Config, kill: Any
) -> None:
    output = archive_config["output"]
    run = nights.start("archive", archive_config)
    wait_for(lambda: nights.is_working(output), 120, lambda: nights.log(run))
    kill(nights)
    ended = nights.ended(run, 300)
    assert ended["type"] in ("COMPLETED", "CRASHED"), nights.log(run)
    if ended["type"] == "CRASHED":
        resumption(nights, output)
    # A crashed night is started again by the automation; a person who does it too finds it at work, or done.
    wait_for(lambda: set(nights.jobs(output).values()) == {"SUCCEEDED"}, 240, lambda: str(nights.jobs(output)))
    wait_for(lambda: not active_runs(nights), 240)
    after = nights.start("archive", archive_config)
    assert nights.ended(after)["type"] == "COMPLETED", nights.log(after)
    assert is_whole(nights, output)
    assert len(nights.jobs(output)) == 1


def active_runs(nights: Nights) -> list[str]:
    """Flow runs that hold a slot of their deployment or will: a night that starts beside them is cancelled."""
    wanted = {
        "state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]}},
        "expected_start_time": {"before_": datetime.now(UTC).isoformat()},
    }
    return [run["id"] for run in nights.ask("POST", "/flow_runs/filter", json={"flow_runs": wanted})]


def resumption(nights: Nights, output: str) -> dict[str, Any]:
    """The flow run by which the automation resumes the crashed night of an output, as soon as it is there."""
    wanted = {"deployment_id": {"any_": [nights.deployment("archive")["id"]]}}

    def found() -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = nights.ask("POST", "/flow_runs/filter", json={"flow_runs": wanted})
        configs = [run["parameters"]["config"] for run in runs]
        is_it = [config.get("resumed") == 1 and config["output"] == output for config in configs]
        return [run for run, yes in zip(runs, is_it, strict=True) if yes]

    wait_for(found, 120)
    (run,) = found()
    return run


def test_a_crashed_night_is_resumed_by_the_server_with_the_same_parameters(
    nights: Nights, archive_config: Config, alarms: list[str]
) -> None:
    output = archive_config["output"]
    run = nights.start("archive", archive_config)
    wait_for(lambda: nights.is_working(output), 120, lambda: nights.log(run))
    nights.kill_flow()
    assert nights.ended(run, 120)["type"] == "CRASHED"

    second = resumption(nights, output)
    assert nights.ended(second["id"])["type"] == "COMPLETED", nights.log(second["id"])
    assert {name: second["parameters"]["config"][name] for name in archive_config} == archive_config
    assert second["parameters"]["config"]["due"] == nights.flow_run(run)["expected_start_time"].replace("Z", "+00:00")
    assert "attached to" in nights.log(second["id"])
    assert list(nights.jobs(output).values()) == ["SUCCEEDED"]
    assert is_whole(nights, output)
    name = nights.flow_run(run)["name"]
    wait_for(lambda: any(f"{name} is Crashed" in text for text in alarms), 60, lambda: alarms)


def test_a_night_whose_machine_died_is_found_by_its_silence_and_resumed(
    nights: Nights, archive_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flow and worker are gone in one moment: nobody is left to report a crash."""
    output, site = archive_config["output"], nights.site
    (zombie,) = [each for each in nights.ask("POST", "/automations/filter", json={}) if each["name"] == "unetpp-zombie"]
    quick = {name: zombie[name] for name in ("name", "description", "enabled", "actions")}
    quick["trigger"] = {**zombie["trigger"], "within": 75}
    nights.ask("PUT", f"/automations/{zombie['id']}", json=quick)
    site.kill("worker")
    with_heartbeats = site.flow_environment() | {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    monkeypatch.setattr(site, "flow_environment", lambda: with_heartbeats)
    site.start_worker()
    try:
        slow = {**archive_config["predict"], "shard_images": 1, "tile_px": 64}  # or the night is over before that
        run = nights.start("archive", archive_config | {"predict": slow})
        wait_for(lambda: nights.is_working(output), 120, lambda: nights.log(run))
        time.sleep(30)  # the first heartbeat has come
        site.kill("worker")
        with contextlib.suppress(ValueError):
            nights.kill_flow()
        site.start_worker()
        assert nights.state(run)["type"] == "RUNNING"
        wait_for(lambda: nights.state(run)["type"] == "CRASHED", 240, lambda: nights.state(run))
        assert "no heartbeat" in nights.state(run)["message"]
        resumption(nights, output)
        wait_for(lambda: set(nights.jobs(output).values()) == {"SUCCEEDED"}, 240, lambda: nights.jobs(output))
        wait_for(lambda: not active_runs(nights), 240)
    finally:
        nights.ask("PUT", f"/automations/{zombie['id']}", json=quick | {"trigger": zombie["trigger"]})
        monkeypatch.undo()
        site.kill("worker")
        site.start_worker()
    assert len(nights.jobs(output)) == 1
    assert is_whole(nights, output)


def test_a_lost_head_loses_no_night(nights: Nights, archive_config: Config) -> None:
    output, site = archive_config["output"], nights.site
    run = nights.start("archive", archive_config)
    wait_for(lambda: nights.is_working(output), 120, lambda: nights.log(run))
    for name in ("ray-head", "ray-node-1", "ray-node-2"):
        site.kill(name)
    num_before = len(nights.parts(output))
    assert num_before
    site.start_ray()
    assert nights.ended(run, 300)["type"] == "COMPLETED", nights.log(run)
    assert "was lost" in nights.log(run)
    assert list(nights.jobs(output).values()) == ["SUCCEEDED"]
    assert is_whole(nights, output)


# -------------------------------------------------------------------------------------------- what goes wrong


def test_a_night_with_a_corrupt_image_is_completed_with_a_warning_and_one_job(
    nights: Nights, archive_config: Config, alarms: list[str]
) -> None:
    put_images("s3://archive/corrupt", 20)
    storage.write_bytes("s3://archive/corrupt/broken.png", b"\x89PNG\r\n\x1a\n, and then nothing")
    config = archive_config | {"input": "s3://archive/corrupt"}
    run = nights.start("archive", config)
    state = nights.ended(run)
    assert state["type"] == "COMPLETED", nights.log(run)
    assert "warning, 1 images failed (decode 1)" in state["message"]
    assert list(nights.jobs(config["output"]).values()) == ["SUCCEEDED"]
    assert nights.result(config["output"])["status"] == "partial"
    assert Counter(row["error_code"] for row in nights.rows(config["output"])) == {None: 20, "decode": 1}
    wait_for(lambda: any("warning, 1 images failed" in text for text in alarms), 60, lambda: alarms)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"predict": {"shard_images": 0}}, "config.predict.shard_images"),
        ({"predict": {"mode": "slow"}}, "config.predict.mode"),
        ({"outputs": "s3://output/x"}, "outputs"),
        ({"deadline_hours": -1}, "config.deadline_hours"),
        ({"resumed": 4}, "config.resumed"),
        ({"night": "yesterday"}, "config.night"),
    ],
)
def test_bad_parameters_are_refused_by_the_server_with_the_field(
    nights: Nights, archive_config: Config, change: Config, field: str
) -> None:
    deployment = nights.deployment("archive")
    body = {"parameters": {"config": archive_config | change}, "state": {"type": "SCHEDULED"}}
    answer = nights.http.post(f"/deployments/{deployment['id']}/create_flow_run", json=body)
    assert answer.status_code == 409
    assert field in answer.text


def test_without_credentials_nobody_gets_in(site: Site) -> None:
    assert httpx.get(f"{site.prefect_url}/api/flows/count").status_code in (401, 403, 405)
    assert httpx.post(f"{site.prefect_url}/api/deployments/filter", json={}).status_code == 401
    for path in ("/api/jobs/", "/api/version"):
        assert httpx.get(f"{site.ray_url}{path}").status_code in (401, 403)
    submitted = httpx.post(f"{site.ray_url}/api/jobs/", json={"entrypoint": "true"})
    assert submitted.status_code in (401, 403)
    assert httpx.get(f"{site.s3_url}/archive").status_code == 403


def test_a_wrong_token_is_one_sentence(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 48)
    with pytest.raises(ConfigError, match="refuses the token: set RAY_AUTH_TOKEN_PATH"):
        RayJobs(site.ray_url).status("job")


def test_a_night_that_cannot_reach_its_cluster_fails_with_one_sentence(nights: Nights, archive_config: Config) -> None:
    words = ["submit", "predict", "--model", "./m", "--input", "i", "--output", "o", "--address", "http://127.0.0.1:9"]
    process = nights.unetpp(*words)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 20
    assert "no Ray cluster answers at http://127.0.0.1:9" in said
    assert "Traceback" not in said
    with pytest.raises(TransientError):
        RayJobs("http://127.0.0.1:9").version()


# ---------------------------------------------------------------------------------------------------- backfill


def test_a_backfill_works_on_the_nights_that_are_not_done(nights: Nights, archive_config: Config) -> None:
    for day in (1, 2, 3):
        put_images(f"s3://archive/by-night/2026-03-0{day}", 4 + day)
    config = archive_config | {"input": "s3://archive/by-night/{night}"}
    output = config["output"]
    first = nights.start("archive", config | {"night": "2026-03-02"})
    assert nights.ended(first)["type"] == "COMPLETED", nights.log(first)
    assert len(nights.rows(output)) == 6

    run = nights.start("backfill", config | {"first": "2026-03-01", "last": "2026-03-03"})
    state = nights.ended(run)
    assert state["type"] == "COMPLETED", nights.log(run)
    assert state["message"] == "2026-03-01 complete, 2026-03-02 done before, 2026-03-03 complete"
    matrix = json.loads(nights.artifacts(run)["nights"]["data"])
    assert [(row["night"], row["state"], row["predicted"]) for row in matrix] == [
        ("2026-03-01", "complete", "5"),
        ("2026-03-02", "done before", "6"),
        ("2026-03-03", "complete", "7"),
    ]
    assert list(nights.jobs(output).values()) == ["SUCCEEDED"] * 3
    assert len(nights.rows(output)) == 5 + 6 + 7


def test_the_worker_and_the_site_come_down(tmp_path: Any) -> None:
    """A site is stopped by its folder alone, and leaves no process behind."""
    site = Site(tmp_path / "site", 22650)
    site.folder.mkdir()
    site._make_secrets()
    site._start("worker", ["sleep", "1000"], {})
    process = site.process("worker")
    assert process is not None
    Site(tmp_path / "site").down()
    assert not process.is_running()
    assert subprocess.run(["pgrep", "-f", "sleep 1000"], capture_output=True, check=False).returncode in (0, 1)
    assert os.path.exists(site.folder)
