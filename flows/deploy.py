"""Tell a Prefect server about this project: `python -m flows.deploy`; say it again after any change.

Makes the work pool, the deployments of infra/prefect/prefect.yaml and the automations of automations.yaml. From the
environment come PREFECT_API_URL, and what the deployments' parameters begin with: UNETPP_DATA, UNETPP_MODELS,
UNETPP_WORK, UNETPP_INPUT, UNETPP_OUTPUT, UNETPP_TIMEZONE; UNETPP_ALARM_URL is where alarms are posted to.
"""

import os
import subprocess
import sys
from pathlib import Path

from jobs import logs
from unetpp.errors import ConfigError

HOME = Path(__file__).parents[1]
FILE = HOME / "infra" / "prefect" / "prefect.yaml"
POOL = "unetpp"
PLACES = ("UNETPP_DATA", "UNETPP_MODELS", "UNETPP_WORK", "UNETPP_INPUT", "UNETPP_OUTPUT")


def deploy() -> None:
    """Make or update everything. ConfigError where a variable is missing or Prefect refuses."""
    if missing := [name for name in ("PREFECT_API_URL", *PLACES) if not os.environ.get(name)]:
        raise ConfigError(f"not set: {', '.join(missing)}; the deployments' parameters begin with them")
    environment = {"UNETPP_HOME": str(HOME), "UNETPP_TIMEZONE": "UTC", **os.environ}
    _prefect(environment, "work-pool", "create", POOL, "--type", "process", "--overwrite")
    _prefect(environment, "--no-prompt", "deploy", "--all", "--prefect-file", str(FILE))
    from flows import automations

    for line in automations.apply():
        sys.stdout.write(f"{line}\n")
    if not os.environ.get("UNETPP_ALARM_URL"):
        sys.stdout.write("nobody is told of failures: set UNETPP_ALARM_URL to a webhook and deploy again\n")


def _prefect(environment: dict[str, str], *words: str) -> None:
    command = [sys.executable, "-m", "prefect", *words]
    done = subprocess.run(command, env=environment, cwd=HOME, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"prefect {' '.join(words)} failed:\n{(done.stdout + done.stderr).strip()[-3000:]}")


if __name__ == "__main__":
    from jobs.command_line import run_plain

    logs.configure()
    sys.exit(run_plain("flows.deploy", deploy))
