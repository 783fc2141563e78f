"""The Ray that a job runs on: the cluster it was sent to, else a private one on this machine."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping

from unetpp import devices

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the behaviour Ray is moving to; unset, it warns at every start
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the jobs show their own
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
}
"""What the processes of a private Ray need not gather or watch, since there is no dashboard and one machine."""


def is_cluster() -> bool:
    """Whether this is a submitted job, whose Ray is the cluster that it was sent to."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _set_where_unset(values: Mapping[str, str]) -> None:
    for name, value in values.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """Connect to Ray for the duration of a job.

    Inside a submitted job (RAY_ADDRESS is set) that is its cluster. Else a new private one is started on this machine,
    never one that happens to run here, with at least `num_cpus` logical CPUs; it ends with the block.
    """
    _set_where_unset(QUIET)
    # A private cluster asks for a token by itself, and says so as a warning; its log format is not ours.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    import ray

    if ray.is_initialized():
        yield
        return
    if is_cluster():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        _set_where_unset(UNWATCHED)
        ray.init(
            address="local",
            num_cpus=max(num_cpus, devices.num_cpus()),
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    try:
        yield
    finally:
        ray.shutdown()
