"""`unetpp submit <job> ...`: the same job, flags and config, on a cluster instead of here."""

import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel

from flows import ray_jobs
from flows.backends import backend_of
from flows.jobs_api import RayJobs
from flows.ray_jobs import State
from jobs import models, storage
from jobs.config_file import write_command
from jobs.contract import AssembleConfig, ExitCode
from unetpp.errors import ConfigError

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=BaseModel)

PLACES: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(
        ("data", "input", "metrics", "models", "out", "output", "result", "run", "source"), storage.canonical
    ),
    **dict.fromkeys(("init", "model"), models.canonical),
}
"""Fields that say where something is, each with what gives a place its one spelling."""


def submit(job: str, config: BaseModel, *, address: str | None = None, detach: bool | None = None) -> int:
    """Start a job on a cluster, or attach to the one that does the same, and follow it; Ctrl-C stops it.

    Returns:
        The job's exit code; 0 when detached.

    Raises:
        ConfigError: no cluster answers there, or it refuses.
    """
    backend = RayJobs(address) if address else backend_of("ray")
    there = seen_from_elsewhere(config)
    spec: dict[str, object] = {"job": job, "config": there.model_dump(mode="json", exclude={"result"})}
    name = ray_jobs.submission_id(job, None, spec)
    metadata = {"by": os.environ.get("USER", "")}
    # Whoever says it once more wants it done once more, unless it is being done, and hears of a silent cluster at once.
    submission = ray_jobs.ensure(
        backend, name, write_command(job, there), metadata, is_done=lambda: False, again=True, grace_s=0.0
    )
    verb = "attached to" if submission.attached else "started"
    logger.info("%s %s: %s", verb, submission.submission_id, backend.url(submission.submission_id))
    if detach:
        sys.stdout.write(f"{submission.submission_id}\n")
        return int(ExitCode.DONE)
    try:
        status = ray_jobs.follow(backend, submission.submission_id, say=_say, poll_s=2.0)
    except KeyboardInterrupt:
        logger.info("stopping %s; what it is at gets time to be finished", submission.submission_id)
        logger.info("%s", ray_jobs.stop_in_words(backend, submission.submission_id))
        return int(ExitCode.INTERRUPTED)
    if status is None:
        raise ConfigError(f"the cluster lost {submission.submission_id}; say the same again, it goes on from there")
    if status.state is State.STOPPED:
        logger.info("%s was stopped; say the same again, it goes on from there", submission.submission_id)
        return int(ExitCode.INTERRUPTED)
    return int(ExitCode.OTHER) if status.exit_code is None else status.exit_code


def seen_from_elsewhere(config: Config) -> Config:
    """Return the config with its relative paths made absolute: a cluster's working directory is another one.

    A packaged model stays one: the cluster has the package as well. What `assemble` calls a model is a digest.
    """
    seen: dict[str, object] = {}
    for name, spelt in PLACES.items():
        match getattr(config, name, None):
            case _ if name == "model" and isinstance(config, AssembleConfig):
                continue
            case str(place):
                seen[name] = spelt(place)
            case tuple(several):
                seen[name] = tuple(map(spelt, several))
    return config.model_copy(update=seen)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
