"""The doctor on a real site: well when it is well, and each planted fault is found, with what to do."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from jobs import registry, storage
from tests.cluster.conftest import Nights, wait_for


def diagnose(nights: Nights, *words: str, **environment: str) -> tuple[int, dict[str, str]]:
    """(exit code, text by thing looked at, with the fix) of `unetpp doctor` on the site."""
    asked = {"--input": "s3://archive/nuclei", "--output": "s3://output/doctor", "--models": "s3://models/given"}
    asked |= dict(zip(words[::2], words[1::2], strict=True))
    flags = [word for pair in asked.items() for word in pair]
    process = nights.unetpp("doctor", *flags, **environment)
    said, _ = process.communicate(timeout=120)
    findings: dict[str, str] = {}
    last = ""
    for line in said.splitlines():
        state = next((state for state in ("ok", "wrong", "not asked") if line.strip().startswith(f"{state}  ")), None)
        if state is not None:
            last = line.strip().removeprefix(state).strip().split("  ")[0]
            findings[last] = f"{state}: {line}"
        elif last:
            findings[last] += "\n" + line
    return process.returncode, findings


@pytest.fixture(scope="module", autouse=True)
def prepared(nights: Nights, models: str, nuclei: str) -> None:
    """A worker that Prefect has heard of, a model and an archive."""
    wait_for(lambda: nights.ask("POST", "/work_pools/unetpp/workers/filter", json={}), 60)


def test_a_site_that_is_well_has_nothing_wrong(nights: Nights) -> None:
    code, findings = diagnose(nights)
    assert code == 0, findings
    looked_at = {"input", "output", "clock", "disk", "model", "ray", "ray resources", "prefect", "work pool"}
    assert looked_at | {"deployments", "automations"} == {
        what for what, text in findings.items() if text.startswith("ok")
    }
    assert {what for what, text in findings.items() if text.startswith("not asked")} == {"gpus"}


@contextlib.contextmanager
def a_paused_pool(nights: Nights) -> Iterator[None]:
    nights.ask("PATCH", "/work_pools/unetpp", json={"is_paused": True})
    yield
    nights.ask("PATCH", "/work_pools/unetpp", json={"is_paused": False})


@contextlib.contextmanager
def a_missing_automation(nights: Nights) -> Iterator[None]:
    (found,) = [each for each in nights.ask("POST", "/automations/filter", json={}) if each["name"] == "unetpp-late"]
    nights.ask("DELETE", f"/automations/{found['id']}")
    yield
    nights.site.deploy()


@contextlib.contextmanager
def a_deployment_that_is_paused(nights: Nights) -> Iterator[None]:
    uri = f"/deployments/{nights.deployment('train')['id']}"
    nights.ask("PATCH", uri, json={"paused": True})
    yield
    nights.ask("PATCH", uri, json={"paused": False})


@contextlib.contextmanager
def a_schedule_that_is_paused(nights: Nights) -> Iterator[None]:
    (schedule,) = nights.deployment("nightly")["schedules"]
    uri = f"/deployments/{nights.deployment('nightly')['id']}/schedules/{schedule['id']}"
    nights.ask("PATCH", uri, json={"active": False})
    yield
    nights.ask("PATCH", uri, json={"active": True})


@contextlib.contextmanager
def a_damaged_model(nights: Nights) -> Iterator[None]:
    _, model = registry.current("s3://models/given")
    assert model is not None
    uri = storage.join("s3://models/given", model.digest, "model.safetensors")
    content = storage.read_bytes(uri)
    storage.write_bytes(uri, content[:-5])
    yield
    storage.write_bytes(uri, content)


@contextlib.contextmanager
def nothing(nights: Nights) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("fault", "words", "environment", "what", "said"),
    [
        (nothing, ["--input", "s3://archive/empty"], {}, "input", "put images there, or mend --input"),
        (nothing, ["--input", "s3://no-such-bucket/x"], {}, "input", "no-such-bucket"),
        (nothing, [], {"AWS_SECRET_ACCESS_KEY": "wrong"}, "output", "credentials"),
        (nothing, ["--output", "/proc/no-room-for-masks"], {}, "output", "/proc/no-room-for-masks"),
        (nothing, ["--free-gb", "1000000"], {}, "disk", "make room there, or set TMPDIR to a larger disk"),
        (nothing, ["--models", "s3://models/none"], {}, "model", "run the train deployment"),
        (a_damaged_model, [], {}, "model", "copy the model there again"),
        (nothing, [], {"RAY_AUTH_TOKEN": "0" * 48}, "ray", "set RAY_AUTH_TOKEN_PATH"),
        (nothing, ["--ray", "http://127.0.0.1:9"], {}, "ray", "is it up"),
        (nothing, ["--gpus", "1"], {}, "gpus", "add GPU nodes"),
        (nothing, [], {"PREFECT_API_AUTH_STRING": "unetpp:wrong"}, "prefect", "set PREFECT_API_AUTH_STRING"),
        (nothing, ["--prefect", "http://127.0.0.1:9/api"], {}, "prefect", "start it, or mend its address"),
        (a_paused_pool, [], {}, "work pool", "prefect work-pool resume unetpp"),
        (nothing, ["--work-pool", "elsewhere"], {}, "work pool", "python -m flows.deploy"),
        (a_deployment_that_is_paused, [], {}, "deployments", "paused: train"),
        (a_schedule_that_is_paused, [], {}, "deployments", "no schedule is active: nightly"),
        (nothing, ["--deployments", "yearly"], {}, "deployments", "missing: yearly"),
        (a_missing_automation, [], {}, "automations", "missing: unetpp-late"),
    ],
)
def test_a_planted_fault_is_found_with_what_to_do(
    nights: Nights,
    fault: Callable[[Nights], AbstractContextManager[None]],
    words: list[str],
    environment: dict[str, str],
    what: str,
    said: str,
) -> None:
    with fault(nights):
        code, findings = diagnose(nights, *words, **environment)
    assert code == 1
    assert findings[what].startswith("wrong"), findings
    assert said in findings[what]
    if "AWS_SECRET_ACCESS_KEY" in environment:
        assert "0" * 48 not in str(findings)
