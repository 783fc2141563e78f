"""Tell a Prefect server about this project: `python -m flows.deploy`; say it again after any change.

Makes the work pool, the deployments of infra/prefect/prefect.yaml and the automations of automations.yaml. From the
environment come PREFECT_API_URL, and what the deployments' parameters begin with: the places UNETPP_DATA,
UNETPP_MODELS, UNETPP_WORK, UNETPP_INPUT, UNETPP_OUTPUT, and UNETPP_TIMEZONE. UNETPP_CONFIG is a YAML file as
`python -m flows.nightly --config` takes, which says the rest: how to train, the tolerance, how to predict. Each
deployment gets those of its keys that its flow knows; a place in it goes before the variable. UNETPP_ALARM_URL is where
alarms are posted to.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from flows.config import ArchiveFlowConfig, BackfillConfig, NightlyConfig, TrainFlowConfig
from jobs import logs
from jobs.config_file import load_config, read_yaml
from unetpp.errors import ConfigError

HOME = Path(__file__).parents[1]
FILE = HOME / "infra" / "prefect" / "prefect.yaml"
POOL = "unetpp"
PLACES = {
    "UNETPP_DATA": "data",
    "UNETPP_MODELS": "models",
    "UNETPP_WORK": "work",
    "UNETPP_INPUT": "input",
    "UNETPP_OUTPUT": "output",
}
"""Variables, and the parameters that they are."""
CONFIGS: dict[str, type[BaseModel]] = {
    "nightly": NightlyConfig,
    "train": TrainFlowConfig,
    "archive": ArchiveFlowConfig,
    "backfill": BackfillConfig,
}
OF_ONE_NIGHT = ("again", "due", "night", "resumed")


def deploy() -> None:
    """Make or update everything. ConfigError where a variable is missing, the file is wrong, or Prefect refuses."""
    file = os.environ.get("UNETPP_CONFIG")
    site = read_yaml(file) if file else {}
    wanted = ["PREFECT_API_URL", *(name for name, field in PLACES.items() if field not in site)]
    if missing := [name for name in wanted if not os.environ.get(name)]:
        raise ConfigError(f"not set: {', '.join(missing)}; the deployments' parameters begin with them")
    if file:
        load_config(NightlyConfig, file, flags={(PLACES[name],): os.environ[name] for name in wanted if name in PLACES})
        if standing := [name for name in OF_ONE_NIGHT if name in site]:
            raise ConfigError(f"{file}: {', '.join(standing)} is of one night, and would be of every one; leave it out")
    environment = {"UNETPP_HOME": str(HOME), "UNETPP_TIMEZONE": "UTC", **os.environ}
    _prefect(environment, "work-pool", "create", POOL, "--type", "process", "--overwrite")
    with tempfile.TemporaryDirectory() as folder:
        filled = Path(folder) / FILE.name
        filled.write_text(yaml.safe_dump(with_site(read_yaml(FILE), site), sort_keys=False), encoding="utf-8")
        _prefect(environment, "--no-prompt", "deploy", "--all", "--prefect-file", str(filled))
    from flows import automations

    for line in automations.apply():
        sys.stdout.write(f"{line}\n")
    if not os.environ.get("UNETPP_ALARM_URL"):
        sys.stdout.write("nobody is told of failures: set UNETPP_ALARM_URL to a webhook and deploy again\n")


def with_site(content: dict[str, Any], site: dict[str, Any]) -> dict[str, Any]:
    """The content of prefect.yaml, whose deployments begin with what a site says of their flows and of where it is."""
    zone = {"timezone": site["timezone"]} if "timezone" in site else {}
    deployments = []
    for each in content["deployments"]:
        known = {name: value for name, value in site.items() if name in CONFIGS[each["name"]].model_fields}
        begun = {**each, "parameters": {"config": {**each["parameters"]["config"], **known}}}
        if "schedules" in each:
            begun["schedules"] = [{**schedule, **zone} for schedule in each["schedules"]]
        deployments.append(begun)
    return {**content, "deployments": deployments}


def _prefect(environment: dict[str, str], *words: str) -> None:
    command = [sys.executable, "-m", "prefect", *words]
    done = subprocess.run(command, env=environment, cwd=HOME, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"prefect {' '.join(words)} failed:\n{(done.stdout + done.stderr).strip()[-3000:]}")


if __name__ == "__main__":
    from jobs.command_line import run_plain

    logs.configure()
    sys.exit(run_plain("flows.deploy", deploy))
