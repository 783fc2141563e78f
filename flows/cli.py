"""The `unetpp` command: every job, here or on a cluster, and the doctor. It loads neither Prefect nor torch nor Ray."""

import sys
from functools import partial
from typing import Any, NoReturn

from pydantic import BaseModel

from flows.config import DoctorConfig
from jobs import logs
from jobs.cli import HELP, JOBS, add_jobs
from jobs.command_line import add_command, new_app, run_app

SUBMIT_SWITCHES = {
    "address": "the cluster's dashboard, such as http://head:8265; default: RAY_API_SERVER_ADDRESS",
    "detach": "say the job's name and leave it alone (switch)",
}


def main() -> NoReturn:
    """Be the process of `unetpp`."""
    logs.configure()
    sys.exit(run_command_line(sys.argv[1:]))


def run_command_line(words: list[str]) -> int:
    """Run `unetpp words` and return the exit code."""
    app = new_app("unetpp", HELP)
    add_jobs(app)
    submit = new_app("submit", "Send a job to a Ray cluster, follow it there, stop it with Ctrl-C.")
    for name, config_class in JOBS.items():
        add_command(submit, name, config_class, partial(_submit, name), SUBMIT_SWITCHES)
    app.command(submit)
    add_command(app, "doctor", DoctorConfig, _doctor)
    return run_app(app, words)


def _submit(job: str, config: BaseModel, **switches: Any) -> int:
    from flows.submit import submit

    return submit(job, config, **switches)


def _doctor(config: DoctorConfig) -> int:
    from flows.doctor import run

    return run(config)


if __name__ == "__main__":
    main()
