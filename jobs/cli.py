"""Every job as a command: `unetpp <job> ...` is `python -m jobs.<job> ...` is what a flow or a cluster runs.

Only the chosen job is imported, so that `--help` and a mistyped flag answer at once, without torch and Ray.
"""

import importlib
import sys
from functools import partial
from typing import NoReturn

from cyclopts import App
from pydantic import BaseModel

from jobs import logs
from jobs.command_line import add_command, new_app, run_app
from jobs.contract import (
    AbandonConfig,
    AssembleConfig,
    CompactConfig,
    EvaluateConfig,
    ExitCode,
    ExplainConfig,
    ForgetConfig,
    GcConfig,
    InspectConfig,
    PredictConfig,
    PruneConfig,
    QuantiseConfig,
    RebuildConfig,
    RetryConfig,
    RollbackConfig,
    StatusConfig,
    SynthConfig,
    TrainConfig,
)

JOBS: dict[str, type[BaseModel]] = {
    "inspect": InspectConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "prune": PruneConfig,
    "quantise": QuantiseConfig,
    "predict": PredictConfig,
    "status": StatusConfig,
    "explain": ExplainConfig,
    "retry": RetryConfig,
    "rebuild": RebuildConfig,
    "abandon": AbandonConfig,
    "compact": CompactConfig,
    "gc": GcConfig,
    "forget": ForgetConfig,
    "assemble": AssembleConfig,
    "rollback": RollbackConfig,
    "synth": SynthConfig,
}
"""Every job: module `jobs.<name>` has `run(config) -> result` for this config class."""

HELP = "Train UNet++, prune it to the smallest level that is good enough, and segment an image archive."


def run_command_line(job: str | None = None, words: list[str] | None = None) -> int:
    """Run `unetpp words`, or `unetpp job words`, and return the exit code."""
    app = new_app("unetpp", HELP)
    add_jobs(app)
    words = sys.argv[1:] if words is None else words
    return run_app(app, words if job is None else [job, *words])


def add_jobs(app: App) -> None:
    """Add a command for every job."""
    for name, config_class in JOBS.items():
        add_command(app, name, config_class, partial(_run, name))


def main() -> NoReturn:
    """Be the process of `python -m jobs.cli`."""
    logs.configure()
    sys.exit(run_command_line())


def run_job(job: str) -> NoReturn:
    """Be the process of `python -m jobs.<job>`."""
    logs.configure()
    sys.exit(run_command_line(job))


def _run(job: str, config: BaseModel) -> int:
    """Run a job, write its result where the config says, show a summary and return the exit code."""
    from rich.console import Console

    from jobs.summary import show

    result_uri: str | None = getattr(config, "result", None)
    if result_uri is not None:
        from jobs import storage

        storage.refuse_unwritable(result_uri)
    result: BaseModel = importlib.import_module(f"jobs.{job}").run(config)
    if result_uri is not None:
        storage.write_bytes(result_uri, result.model_dump_json(indent=2).encode())
    show(result, Console(emoji=False))
    return int(getattr(result, "exit_code", ExitCode.DONE))


if __name__ == "__main__":
    main()
